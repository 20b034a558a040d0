"""A run beside an earlier report, and the command that forwards to a checkout's benchmarks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import recipes
from bench.against import compare, read_report
from bench.report import Entry, Report, Section, entry, publish, skipped
from mta_fast import cli
from mta_fast.__main__ import main
from mta_fast.errors import InputError

pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMMAND = "mta-fast bench recipes"
ABOUT = {"threads": 2, "torch": "2.13", "mta_fast": "0.1.0", "texts": "sample"}


def _report(*entries: Entry, **about: object) -> Report:
    return Report(COMMAND, ABOUT | about, [Section("Times", entries)])


def _verdicts(section: Section) -> dict[str, tuple[float | None, bool | None, str]]:
    return {each.what.removeprefix("Times: "): (each.median, each.reached, each.note) for each in section.entries}


def test_what_moved_beyond_noise() -> None:
    then = _report(
        entry("slower", [10, 10, 11], "ms"),
        entry("same", [10, 10, 11], "ms"),
        entry("near", [10, 10, 10], "ms"),
        entry("wide", [10, 20, 40], "ms"),
        entry("ratio", [2, 2, 2], target=">= 1"),
        entry("unjudged", [2, 2, 2]),
        entry("difference", [-1, -1, -1], "%"),
        entry("page", [0.1], "MB"),
        entry("then alone", [1]),
        skipped("skipped", "no reason"),
    )
    now = _report(
        entry("slower", [12, 13, 14], "ms"),
        entry("same", [10.5, 10.5, 10.5], "ms"),
        entry("near", [10.8, 10.8, 10.8], "ms"),
        entry("wide", [30, 35, 50], "ms"),
        entry("ratio", [3, 3, 3], target=">= 1"),
        entry("unjudged", [1, 1, 1]),
        entry("difference", [2, 2, 2], "%", "<= 4"),
        entry("page", [1.0], "MB"),
        entry("now alone", [1]),
        skipped("skipped", "no reason"),
        mta_fast="0.2.0",
    )
    made = compare(now, then, Path("then.json"))
    assert _verdicts(made) == {
        "slower": (1.3, False, "worse"),
        "same": (1.05, None, ""),
        "near": (1.08, None, ""),
        "wide": (1.75, None, ""),
        "ratio": (1.5, True, "better"),
        "unjudged": (0.5, None, "other"),
        "difference": (None, False, "worse"),
        "page": (10.0, None, ""),
    }
    assert made.table[2] == "| Times: slower | 10.00 ms | 13.00 ms | 1.30 | worse |"
    assert made.text.endswith("2 figures stand in one of the two alone.")
    assert "differ" not in made.text
    assert replace(now, sections=[*now.sections, made]).missed


def test_times_of_another_machine_are_left_out() -> None:
    then, now = (_report(entry("time", [time], "ms"), entry("ratio", [2])) for time in (1, 9))
    made = compare(replace(now, about=ABOUT | {"threads": 8, "rocm": "7"}), then, Path("then.json"))
    assert _verdicts(made) == {"ratio": (1.0, None, "")}
    assert "differ (rocm none then, 7 now, threads 2 then, 8 now): times can't be compared" in made.text


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            _report(entry("time", [1]), texts="rows.jsonl"),
            "the workload of then.json, .*texts sample then, rows.js",
        ),
        (_report(entry("time", [1]), sizes="quick"), "sizes none then, quick now"),
        (_report(entry("another size", [1])), "expected figures of the same sizes and sides in then.json, got none"),
    ],
)
def test_another_workload_is_refused(now: Report, message: str) -> None:
    with pytest.raises(InputError, match=f"--against: .*{message}"):
        compare(now, _report(entry("time", [1])), Path("then.json"))


def test_committed_reports_are_read_and_are_their_own_equals() -> None:
    read = 0
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text())
        if "sections" in content:
            report = read_report(file, content["command"])
            made = compare(report, report, file)
            assert {each.note for each in made.entries} == {""}, file
            with file.with_suffix(".csv").open() as opened:
                assert len(made.entries) == sum(bool(line["median"]) for line in csv.DictReader(opened)) >= 2
            read += 1
    assert read == 12


def test_what_is_no_report_of_the_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--against: expected a report of mta-fast bench loss in .*, got one of .*ops"):
        read_report(RESULTS / "ops.json", "mta-fast bench loss")
    for file in (RESULTS / "static.json", tmp_path / "none.json", RESULTS / "loss.md"):
        with pytest.raises(InputError, match=f"--against: expected a report of mta-fast bench loss in .*{file.name}"):
            read_report(file, "mta-fast bench loss")


def test_the_command_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    then, out = tmp_path / "then.json", tmp_path / "now"
    publish(_report(entry("time", [1], "ms")), then)

    def run(report: Report) -> int:
        monkeypatch.setattr(recipes, "measure", lambda: report)
        return main(["bench", "recipes", "--against", str(then), "--out", str(out)])

    assert run(_report(entry("time", [1], "ms"))) == 0
    assert run(_report(entry("time", [2], "ms"))) == 1
    assert "## Compared with then.json" in out.with_suffix(".md").read_text()
    again = read_report(out.with_suffix(".json"), COMMAND)  # its comparison is no figure of it
    assert len(compare(again, again, out).entries) == 1
    # what was measured is published even where it can't be compared
    assert run(_report(entry("other", [3], "ms"))) == 2
    assert "got none of them" in capsys.readouterr().err
    assert '"other"' in out.with_suffix(".json").read_text()
    monkeypatch.setattr(recipes, "measure", lambda: pytest.fail("measured before the file was looked at"))
    assert main(["bench", "recipes", "--against", str(RESULTS / "loss.json")]) == 2


# --- the forwarder -----------------------------------------------------------------------------------------------


def test_without_a_checkout_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert main(["bench", "loss", "--quick"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"expected the bench/ folder of a checkout beside the package, got {tmp_path};" in line


def test_only_the_checkouts_bench_is_imported_and_nothing_of_the_users_is_shadowed(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mta_fast").symlink_to(ROOT / "mta_fast")
    for name in ("bench", "kernels", "tests"):
        (tmp_path / f"{name}.py").write_text(f"WHOSE = 'the user'\nassert {name != 'bench'}, 'imported'\n")
    code = """if True:
        import sys
        before = list(sys.path)
        from mta_fast.__main__ import main
        code = main(["bench", "loss", "--rounds", "0"])
        import bench, kernels
        print(code, sys.path == before, kernels.WHOSE, bench.__file__, sep="\\n")
        """
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2", "True", "the user", str(ROOT / "bench" / "__init__.py")], done.stderr
    assert "Invalid value for '--rounds'" in done.stderr
