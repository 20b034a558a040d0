"""The benchmarks' harness: sides in turn, nothing before they agree, figures as their files hold them."""

from __future__ import annotations

import csv
import gc
import json
import math
from pathlib import Path

import pytest
import torch

from bench import harness, loss, peak, plots
from bench.compiled import compiled_reference
from bench.floor import GemmRate, Rate, check_floor, loss_flops, pair_flops
from bench.harness import Effort, alternate, check_parity, median_interval
from bench.memory import crossing
from bench.ops import run as ops
from bench.report import Report, Section, entry, publish, skipped
from bench.workload import cpu_backends, loss_side, standard_workload
from mta_fast.backends import BACKENDS
from mta_fast.contract import gram_from
from mta_fast.errors import BackendUnavailableError, InputError

# --- times -------------------------------------------------------------------------------------------------------


def test_sides_are_timed_in_turn_and_none_is_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_REPEATS", 1)
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, Effort(3))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # a warm-up, then the rounds
    assert len(times["a"]) == len(times["b"]) == 3
    assert times.ratio("a", "b") == [a / b for a, b in zip(times["a"], times["b"], strict=True)]
    assert gc.isenabled()


def test_short_calls_repeat_within_a_sample() -> None:
    calls: list[bool] = []  # whether garbage may be collected
    alternate({"short": lambda: calls.append(gc.isenabled())}, Effort(2))
    assert calls == [True, *[False] * (2 * harness.MOST_REPEATS)]


def test_results_are_checked_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_REPEATS", 1)
    calls: list[str] = []
    sides = {"a": lambda: calls.append("a") or 1, "b": lambda: calls.append("b") or 2}

    def check(results: dict[str, int]) -> None:
        assert results == {"a": 1, "b": 2}
        raise SystemExit(f"called {''.join(calls)}")

    with pytest.raises(SystemExit, match="called ab"):
        alternate(sides, Effort(3), check)


def test_the_machines_rate_is_taken_once_a_round() -> None:
    gemm = GemmRate([(8, 8, 8)])
    times = alternate({"gemm": gemm}, Effort(3))
    assert len(gemm.rates) == 4
    assert gemm.last(len(times["gemm"])) == gemm.rates[1:]


def test_rounds_end_with_the_time_set_aside_but_not_before_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # a second passes between any two looks at the clock
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))

    def rounds(effort: Effort) -> int:
        return len(alternate({"a": lambda: None}, effort)["a"])

    assert rounds(Effort(50, seconds=20)) in range(3, 10)
    assert rounds(Effort(50, seconds=0, least=4)) == 4
    assert rounds(Effort(5)) == 5
    assert rounds(Effort(50, seconds=0).asked(7)) == 7


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([2.0, 1.1], r"one: expected parity below 1e-05, got 0\.1.*; nothing timed"),
        ([2.0, math.nan], "got nan; nothing timed"),
        ([2.0], "expected 2 tensors to compare, got 1; nothing timed"),
    ],
)
def test_no_parity_no_time(made: list[float], message: str) -> None:
    expected = [torch.tensor([2.0]), torch.tensor([1.0])]
    check_parity("one", expected, expected)
    check_parity("zero", [torch.zeros(2)], [torch.zeros(2)])
    with pytest.raises(SystemExit, match=message):
        check_parity("one", [torch.tensor([value]) for value in made], expected)


def test_interval_of_the_median() -> None:
    # P(fewer than k + 1 of n values lie below the median): 1/256 for n = 8, k = 0; 11/1024 for n = 10, k = 1
    assert median_interval([3, 1, 2, 8, 7, 6, 5, 4]) == (1, 8)
    assert median_interval(list(range(10))) == (1, 8)
    assert median_interval([5.0]) == (5.0, 5.0)


# --- what is compared --------------------------------------------------------------------------------------------


def test_backends_that_are_compared() -> None:
    names = cpu_backends()
    assert names[-1] == "reference"
    assert "triton" not in names  # interpreted, or without a GPU
    assert cpu_backends(["reference", "reference"]) == ["reference"]
    with pytest.raises(InputError, match="got 'cuda'"):
        cpu_backends(["cuda"])


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mta_fast.backends._interpreted", lambda: False)
    with pytest.raises(BackendUnavailableError, match="CPU tensors need Triton's interpreter"):
        cpu_backends(["triton"])


def test_the_compiled_reference_is_a_backend_only_while_it_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "bench._compiled_reference", raising=False)
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function.__name__) or function)
    before, workload = list(BACKENDS), standard_workload(1, 8, (8, 16))
    with compiled_reference() as name:
        assert name not in cpu_backends()
        check_parity(name, loss_side(workload, name)(), loss_side(workload, "reference")())
    assert list(BACKENDS) == before
    assert {"_row_importance", "_pairwise", "hidden_alignment"} <= set(compiled)
    monkeypatch.delitem(__import__("sys").modules, "bench._compiled_reference")


def test_floor_by_hand() -> None:
    workload = standard_workload(2, 10, (4, 8))  # 8 words and 4 phrases a row, 8 covered tokens
    importance = 3 * 2 * (2 * 10**2 * 8)
    pairs = 2 * (2 * 8**2 + 2 * 2 * 4**2) * (2 * 4 + 8)
    hid = 3 * 6 * (2 * 8) * 4 * 8
    assert loss_flops(workload.loss, workload.spans) == importance + pairs + hid
    without = standard_workload(2, 10, (4, 8), hid=False)
    assert loss_flops(without.loss, without.spans) == importance + pairs
    from_here = gram_from(768, 1600)
    for count, method in ((from_here - 1, "pairwise"), (from_here, "gram")):
        assert pair_flops([count], 768, 1600) == pair_flops([count], 768, 1600, method)


def test_peak_is_what_a_call_adds_to_its_inputs_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if peak.why_not():
        pytest.skip(str(peak.why_not()))
    (tmp_path / "made_up.py").write_text(
        "import torch\n"
        "def make(megabytes):\n"
        "    inputs = torch.ones(megabytes * 250_000)\n"
        "    def call():\n"
        "        twice = [inputs + i for i in range(2)]\n"
        "        return [twice[0][:0].clone(), inputs.clone()]\n"
        "    return call\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probes = [peak.Probe("made_up:make", {"megabytes": size}, {"megabytes": 1}) for size in (64, 16)]
    assert peak.peaks(probes) == pytest.approx([128, 32], abs=2)
    with pytest.raises(SystemExit, match="measures memory failed.*made_up"):
        peak.peaks([peak.Probe("made_up:other", {})])


def test_exponents_and_crossing_by_hand() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    assert plots.exponent(sizes, [100, *[3 * n**1.5 for n in sizes[1:]]]) == pytest.approx(1.5)  # from 4 on
    assert math.isnan(plots.exponent([1], [1]))
    # squares against 10 n cross at 10
    assert crossing(sizes, [n**2 for n in sizes], [10 * n for n in sizes]) == pytest.approx(10)
    assert crossing(sizes, sizes, [2 * n for n in sizes]) is None


# --- reports -----------------------------------------------------------------------------------------------------


def _report(*rows: object) -> Report:
    sections = [Section("First", rows[:1]), Section("Second", rows[1:])]  # type: ignore[arg-type]
    return Report("mta-fast bench made-up", {"threads": 2}, sections, {"shape": [1.0]}, {"_plot": Path.touch})


def test_losing_and_skipped_rows_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    won = entry("ours / theirs", [0.5] * 9, target="< 1")
    lost = entry("theirs / ours", list(range(11)), target=">= 2", note="by hand")
    assert (lost.p10, lost.median, lost.p90, lost.rounds, lost.reached) == (1, 5, 9, 11, True)
    lost = entry("theirs / ours", list(range(11)), target=">= 6", note="by hand")
    left_out = skipped("too large", "it needs 27 GB")
    out = tmp_path / "made" / "up.json"
    assert publish(_report(won, lost, left_out), out) == 1
    text = (tmp_path / "made" / "up.md").read_text()
    assert text == capsys.readouterr().out
    assert "| ours / theirs | < 1 | 0.50 x | 0.50 x | 0.50 x | 9 | yes |" in text
    assert "| theirs / ours (by hand) | >= 6 | 5.00 x | 1.00 x | 9.00 x | 11 | NO |" in text
    assert "| too large (skipped: it needs 27 GB) | - | - | - | - | - | - |" in text
    report = json.loads(out.read_text())
    assert [row["reached"] for section in report["sections"] for row in section["rows"]] == [True, False, None]
    assert report["samples"] == {"shape": [1.0]}
    with (tmp_path / "made" / "up.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["section"], row["median"]) for row in rows] == [("First", "0.5"), ("Second", "5.0"), ("Second", "")]
    assert (tmp_path / "made" / "up_plot.png").exists()
    assert publish(_report(won, left_out), None) == 0
    assert lost.cell == "5.00 x (>= 6: NO)"
    assert left_out.cell == "skipped: it needs 27 GB"


def test_a_time_below_the_floor_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    check_floor("one", [0.1, 0.6, 0.7])
    with pytest.raises(SystemExit, match=r"bench: one: expected at least 0\.5 of the floor, got 0\.40: the b"):
        check_floor("one", [0.4, 0.4, 0.9])
    monkeypatch.setattr(loss, "FULL", loss.QUICK)
    monkeypatch.setattr(loss, "loss_flops", lambda *args: 10**15)
    with pytest.raises(SystemExit, match="B=1 S=16, without Hid: reference: expected at least"):
        loss._measure(loss.QUICK.shapes[1], loss.QUICK, ["reference"], [], 1)
    monkeypatch.setattr(ops, "FULL", ops.QUICK)
    monkeypatch.setattr(ops, "GemmRate", lambda sizes: _Slow())
    with pytest.raises(SystemExit, match="importance, forward, B=2 S=12: reference: expected at least"):
        ops._measure(ops.OPS[0], ops.QUICK.shapes[0], "forward", ["reference"], [], ops.QUICK, 1)


class _Slow(Rate):
    def __call__(self) -> None:
        self.rates.append(1.0)
