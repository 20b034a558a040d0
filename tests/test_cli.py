"""The command line: doctor, demo, and one-line errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT, children, ignore_interrupts, wait_for, wait_until_gone

import mta_fast
from mta_fast.__main__ import main
from mta_fast.distill.data import load_sample
from mta_fast.errors import MissingPackageError

pytest.importorskip("typer")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for fact in (f"mta_fast {mta_fast.__version__}", "torch ", "device", "reference: ready", "spaCy model: en_core"):
        assert fact in report


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast import doctor

    original = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n: None if n in ("peft", "spacy") else original(n))
    report = doctor.report()
    assert "peft: missing (LoRA students); pip install '.[train]' in the checkout" in report
    assert "spacy: missing (span extraction); pip install '.[spacy]' in the checkout" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--stepz", "3"], "No such option: --stepz"),
        (["demo", "--steps", "0"], "Invalid value for '--steps'"),
        (["demo", "--out", "/dev/null/x"], "expected a path in a folder, got one below the file /dev/null"),
        (["trian"], "No such command 'trian'"),
        ([], "Missing command"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise MissingPackageError("demo: expected the package rich,\nit is not installed")

    monkeypatch.setattr("mta_fast.demo._require_packages", missing)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "mta-fast: demo: expected the package rich, it is not installed\n"


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mta_fast.demo._require_packages", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "mta-fast: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mta_fast.demo._require_packages", bug)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--teacher-steps", "2", "--steps", "3"]) == 0
    results = json.loads((out / "results.json").read_text())
    base, with_mta, placebo = results["runs"]
    assert [run["name"] for run in results["runs"]] == ["SRKL", "SRKL + MTA", "SRKL + placebo"]
    assert [run["placebo"] for run in results["runs"]] == [False, False, True]
    for name in ("srkl", "cross_entropy", "dsa", "hid"):
        assert base["curves"][name][0] == with_mta["curves"][name][0] == placebo["curves"][name][0]  # the same start
        assert len({base[name], with_mta[name], placebo[name]}) == 3
    assert with_mta["dsa"] < base["dsa"]
    assert with_mta["dsa"] < placebo["dsa"]  # which learns the distances of other tokens
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    for fact in ("SRKL + MTA", "dsa", "hid", "step", "share of MTA in the step"):
        assert fact in table


def test_sample_is_what_the_readme_says() -> None:
    rows = load_sample()
    assert len(rows) >= 200
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["output"].strip() for row in rows)
    outputs = [row["output"] for row in rows]
    lengths = [len(text) for text in outputs]
    assert min(lengths) < 20
    assert max(lengths) > 700
    for kind, count in {
        "non-ASCII": sum(not text.isascii() for text in outputs),
        "lists": sum("\n- " in text or "\n2. " in text for text in outputs),
        "numbers": sum(any(c.isdigit() for c in text) for text in outputs),
        "code": sum("    " in text or "SELECT" in text or "def " in text for text in outputs),
    }.items():
        assert count >= 10, kind


def test_import_is_light() -> None:
    # neither Triton nor spaCy nor transformers, no device, no random numbers
    code = (
        "import sys, torch; state = torch.get_rng_state(); import mta_fast; "
        "heavy = {'triton', 'spacy', 'transformers', 'pyarrow', 'yaml', 'typer', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; assert torch.equal(state, torch.get_rng_state()); "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_whose_ctrl_c_is_ignored_ends_on_sigterm(tmp_path: Path) -> None:
    """As ``nohup mta-fast spans make ... &`` starts it; with its processes, which would otherwise be left behind."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "", "output": f"Row {i}. " * 50}) + "\n" for i in range(5000)))
    words = ["spans", "make", str(data), "--cache", str(tmp_path / "cache"), "--n-process", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mta_fast", *words],
        preexec_fn=ignore_interrupts,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, told  # 130 after a Ctrl-C
    assert "mta-fast: terminated" in told
    wait_until_gone(workers)
