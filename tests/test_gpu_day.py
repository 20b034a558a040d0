"""A GPU day without a GPU: every part at tiny sizes, and the command's processes, limits and files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs the package triton")
pytest.importorskip("typer")
from bench import accuracy
from bench.gpu_day import (
    clock,
    command,
    compiled,
    correctness,
    day,
    every_kernel,
    graph,
    heads,
    kernels,
    plan,
    sanitizer,
    step,
    times,
)  # fmt: skip
from bench.gpu_day.child import run
from bench.gpu_day.day import Day, attempt, failed
from bench.gpu_day.plan import Part
from bench.report import Entry, entry
from mta_fast.__main__ import main
from mta_fast.kernels import _table
from mta_fast.kernels._launch import INTERPRETED, observe

DRY = Day("cpu", quick=True)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(day, "QUICK_SHAPES", day.QUICK_SHAPES[:1])


def _rows(made: Iterator[Any]) -> dict[str, Entry]:
    rows = {each.what: each for each in made if isinstance(each, Entry)}
    assert [each.note for each in rows.values() if each.note.startswith("failed")] == []
    return rows


# --- parts -------------------------------------------------------------------------------------------------------


def test_correctness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "DTYPES", (torch.bfloat16,))
    rows = _rows(correctness.measure(DRY))
    ops = ["importance", "pooling", "span pairs", "hidden alignment", "linear divergence", "MTALoss"]
    assert [what.split(",")[0] for what in rows] == ops
    assert all(row.reached for row in rows.values())
    exact = correctness.token_importance
    monkeypatch.setattr(correctness, "DTYPES", (torch.float32,))
    calls = iter([1.001, *[1] * 100])  # of the first result alone
    monkeypatch.setattr(correctness, "token_importance", lambda *a, **b: exact(*a, **b) * next(calls))
    row = next(each for each in correctness.measure(DRY) if isinstance(each, Entry))
    assert row.reached is False
    assert row.what == "importance, float32: largest of 6 (right, tensor 0)"


def test_ratios_are_those_of_the_contract() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager, ours = (exact + 1e-3).float(), (exact + 4e-3).float()
    (ratio, place), (infinite, _) = (
        next(correctness.ratios([[x], [eager], [exact]], "left")) for x in (ours, ours * torch.nan)
    )
    assert ratio == pytest.approx(2, rel=1e-3)
    assert place == "left, tensor 0"
    assert infinite == float("inf")
    error, bound = accuracy.error_and_bound(ours, eager, exact)
    assert ratio == error / bound


@pytest.mark.parametrize("layout", correctness.LAYOUTS)
def test_the_rows_are_the_same_in_every_layout(layout: str) -> None:
    made, packed = (correctness.batch(each, (7, 1, 0, 5, 3), "cpu") for each in (layout, "packed"))
    states = made.lay(4, torch.float32).reshape(-1, 4)
    kept = states[~states.isnan().any(1)]
    assert torch.equal(kept, packed.lay(4, torch.float32))
    assert made.spans.num_spans == packed.spans.num_spans > 0
    assert not made.fill(states).isnan().any()


def test_times_and_graph() -> None:
    rows = _rows(times.measure(DRY))
    shape = DRY.shapes[0].name
    for part in ("eager", "host", "device", "eager reference / triton", "public algorithm / triton"):
        assert rows[f"{shape}: {part}"].median > 0  # type: ignore[operator]
    assert "not installed" in rows["importance, flash-colreduce / triton"].note
    rows = _rows(graph.measure(DRY))
    assert len(rows) == 6
    assert all(row.reached for row in rows.values())


def test_a_replay_that_differs_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "captured", lambda call, device: (lambda: None, [x + 1 for x in call()]))
    rows = [row for row in graph.measure(DRY) if isinstance(row, Entry)]
    assert rows
    assert not any(row.reached for row in rows)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # tests/test_compile.py compiles
    assert len(_rows(compiled.measure(DRY))) == 2 * len(compiled.MODES)
    assert f"{DRY.shapes[0].name}: compiled reference / triton" in _rows(times.compiled_reference(DRY))


@pytest.mark.skipif(not INTERPRETED, reason="the dry clock shows launches of interpreted kernels")
def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.model, "record", lambda shape: None)  # tests/test_bench_model.py has it
    known = {"kernel": "pool", "ms": {kernels.SHEET: 0.5}, "bytes": 10, "flops": 0}
    monkeypatch.setattr(kernels.model, "summarise", lambda *given: {"kernels": [known]})
    made = list(kernels.measure(DRY))
    rows = {each.what: each for each in made if isinstance(each, Entry)}
    (pool,) = (what for what in rows if what.startswith("tiny: pool ("))
    assert "modelled 0.50 ms, measured / modelled" in pool
    assert any(what.startswith("tiny: align (") and "not modelled" in what for what in rows)
    assert rows["tiny: all, device busy"].median > rows[pool].median > 0  # type: ignore[operator]
    (samples,) = (each for each in made if not isinstance(each, Entry))
    assert samples["tiny"]["kernels"]["pool"]["ms"] == rows[pool].median


def test_the_sanitizer_sees_every_kernel() -> None:
    with observe(lambda launch: None, execute=False):
        assert set(every_kernel.run("cpu")) == {name for name, _ in _table.TABLE}


def test_a_profile_is_told_by_kernel() -> None:
    found = 3 * [("_pool", 1.0), ("_pool", 2.0), ("nvjet_tst_128x64", 4.0), ("elementwise", 0.5)]
    made = kernels.by_kernel(found, {"_pool": "pool"})
    assert made == {"pool": (2, 3.0), kernels.GEMM: (1, 4.0), kernels.OTHER: (1, 0.5)}


def test_heads_and_step() -> None:
    rows = _rows(heads.measure(DRY))
    assert any(what.endswith("logits / through the heads") for what in rows)
    assert any("liger-kernel is not installed" in row.note for row in rows.values()) or "Liger" in str(list(rows))
    pytest.importorskip("transformers")
    rows = _rows(step.measure(DRY))
    assert [what for what in rows if what.endswith("with MTA / without")] == [
        f"{pair.name}: step with MTA / without" for pair in step.QUICK
    ]


def test_the_step_reads_both_models() -> None:
    transformers = pytest.importorskip("transformers")
    made = step.Stepper(step.QUICK[0], DRY, transformers)
    before = [x.detach().clone() for x in made.mta.parameters()]
    made.step(step.WITHOUT)
    assert all(torch.equal(x, y) for x, y in zip(before, made.mta.parameters(), strict=True))
    made.step(step.WITH)
    assert not all(torch.equal(x, y) for x, y in zip(before, made.mta.parameters(), strict=True))


def test_warming_up_makes_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    warm = Day("cpu", quick=True, warm=True)
    for part in (heads.measure, step.measure, compiled.measure, times.compiled_reference):
        assert [row for row in part(warm) if isinstance(row, Entry) and "installed" not in row.note] == []


def _tool(folder: Path, script: str) -> None:
    tool = folder / sanitizer.TOOL
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    (row,) = sanitizer.measure(DRY)
    assert "not present" in row.note  # type: ignore[union-attr]
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/bin", "/usr/bin"]))
    _tool(tmp_path, "echo kernels: pool pairs; echo '=== ERROR SUMMARY: 3 errors'; echo RACECHECK SUMMARY: 2 hazards")
    made = [each for each in sanitizer.measure(DRY) if isinstance(each, Entry)]
    assert [row.median for row in made] == [5, 5]
    assert [row.reached for row in made] == [False, False]
    _tool(tmp_path, "echo lost; exit 3")
    assert all("exit code 3" in row.note for row in sanitizer.measure(DRY))  # type: ignore[union-attr]


# --- the day -----------------------------------------------------------------------------------------------------

FAKE = """
import os, pathlib, signal, time
from bench.report import entry

def good(day):
    count = pathlib.Path(os.environ["FAKE_COUNT"])
    count.write_text(count.read_text() + ("w" if day.warm else "r"))
    yield entry("a figure", [1.0])
    yield {"shape": {"n": 1}}

def bad(day):
    yield entry("before", [2.0])
    raise ValueError("it broke")

def endless(day):
    while True:
        signal.pause()
"""
KEY = {"code": "1", "card": "none"}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_parts.py").write_text(FAKE)
    (tmp_path / "count").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_COUNT", str(tmp_path / "count"))
    return tmp_path


def test_a_day_goes_on_and_is_resumed(fakes: Path) -> None:
    parts = [
        Part("bad", "fake_parts:bad", 300),
        Part("endless", "fake_parts:endless", 0),
        Part("good", "fake_parts:good", 300),
    ]
    folder, said, dry = fakes / "out", list[str](), asdict(DRY)
    plan.run_day(folder, parts, KEY, dry, say=said.append)
    bad, endless, good = (plan.read(folder, part) for part in parts)
    assert bad is not None
    assert endless is not None
    assert good is not None
    assert "ValueError: it broke" in bad["state"]
    assert [row["what"] for row in bad["rows"]] == ["before"]
    assert endless["state"] == "over its 0 s"
    assert (good["state"], good["samples"]) == ("done", {"shape": {"n": 1}})
    plan.run_day(folder, parts[2:], KEY, dry, say=said.append)
    assert (fakes / "count").read_text() == "r"
    assert "there already" in said[-1]
    assert not plan.is_done(good, {**KEY, "card": "other"})
    plan.run_day(folder, parts[:1], {**KEY, "card": "other"}, dry, minutes=0, say=said.append)
    assert "not begun" in said[-1]


def test_what_compiles_is_compiled_beside_the_first_part(fakes: Path) -> None:
    parts = [Part("first", "fake_parts:endless", 0), Part("second", "fake_parts:good", 300, warm=True)]
    plan.run_day(fakes / "out", parts, KEY, asdict(Day("cuda", quick=True)), say=str)
    assert (fakes / "count").read_text() == "wr"
    assert not (fakes / "out" / "second.warm.json").exists()


def test_the_report_shows_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, lost, other = (Part(name, f"bench.gpu_day.{name}:measure", 1) for name in ("graph", "times", "heads"))
    rows = [asdict(entry("a figure", [3.0], "ms"))]
    content = {"part": "graph", "key": KEY, "state": "done", "seconds": 1.0, "rows": rows, "samples": {}}
    for part, changes in ((there, {}), (lost, {"state": "over its 9 s"}), (other, {"key": {"code": "2"}})):
        plan.file_of(tmp_path, part).write_text(json.dumps({**content, **changes}))
    made = command.report(tmp_path, (there, lost, other), KEY, {})
    text = made.markdown()
    assert made.missed
    assert "failed: over its 9 s" in text
    assert "not run; the same command goes on" in text
    assert "3.00 ms" in text


def test_a_card_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    given = []
    monkeypatch.setattr(command, "run_day", lambda *rest: given.append(rest))
    made = command.measure(tmp_path, ["times"], 9, False)
    assert {"gpu": "a card", "card": "a card", "cuda": "13.0"}.items() <= made.about.items()
    ((_, parts, key, fields, minutes),) = given
    assert ([part.name for part in parts], key["card"], minutes) == (["times"], "a card", 9)
    assert fields == {"device": "cuda", "quick": False, "warm": False}


def test_a_part_survives_its_sides() -> None:
    def broken(error: BaseException) -> Iterator[Any]:
        yield entry("before", [1.0])
        raise error

    for error, fits, note in (
        (ValueError("no"), True, "failed: ValueError: no"),
        (SystemExit("bench: parity"), True, "failed: SystemExit: bench: parity"),
        (torch.OutOfMemoryError("full"), True, "failed: full"),
        (torch.OutOfMemoryError("full"), False, "skipped: it does not fit into the device's memory"),
    ):
        made = list(attempt("side", lambda error=error: broken(error), fits=fits))  # type: ignore[misc]
        assert [row.note for row in made if isinstance(row, Entry)] == ["", note]
    assert failed("x", "y").reached is False


def test_every_part_can_be_called() -> None:
    for part in plan.PARTS:
        module, name = part.call.split(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert plan.PARTS[0].name == "correctness"
    assert not plan.PARTS[0].warm  # the others' compilation runs beside it


def test_a_child_writes_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "compiled.json"
    job = {"part": "sanitizer", "key": KEY, "call": "bench.gpu_day.sanitizer:measure", "day": asdict(DRY)}
    run({**job, "file": str(file)})
    assert json.loads(file.read_text())["state"] == "done"
    run({**job, "file": None})
    assert [path.name for path in tmp_path.iterdir()] == ["compiled.json"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--quick"]) == 2
    assert "expected --all beside them" in capsys.readouterr().err
    assert main(["bench", "gpu", "--all"]) == 2
    assert "expected --out FOLDER" in capsys.readouterr().err
    out = tmp_path / "day"
    assert main(["bench", "gpu", "--all", "--quick", "--out", str(out), "--part", "other"]) == 2
    assert "part: expected one of correctness" in capsys.readouterr().err
    assert main(["bench", "gpu", "--all", "--quick", "--out", str(out), "--part", "sanitizer"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [section["title"] for section in report["sections"]] == [part.name for part in plan.PARTS]
    assert report["machine"]["code"] == plan.code_hash()
    (out / "times.json").write_text("mine")
    assert main(["bench", "gpu", "--all", "--quick", "--out", str(out)]) == 2
    assert (out / "times.json").read_text() == "mine"
