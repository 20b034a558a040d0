"""How time and peak memory grow with batch, row, spans and width, and where the two methods of DSA cross.

``mta-fast bench memory``. An exponent is the slope of the line through the logarithms, of the sizes from an eighth of
the largest on. Times are taken side by side as everywhere, peaks in a process of their own (``bench.peak``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from bench import peak, plots, sides, span_pairs
from bench.harness import PARITY, Call, Effort, Times, alternate, check_parity
from bench.machine import machine
from bench.report import Report, Row, Section, make_row, markdown_table, number, publish, skipped_row
from bench.workload import STUDENT_DIM, TEACHER_DIM
from mta_fast.reference import gram_from

METHODS = {"pairwise": "pairwise", "Gram": "gram"}
LEAST_MEGABYTES = 0.1  # smaller peaks are pages, not tensors: shown as this


@dataclass(frozen=True)
class Sweep:
    """One size that grows while the others stay.

    Attributes:
        size: its letter; fixed: what stays; dims: d_S and d_T where they do.
        values: what it takes.
        maker, arguments: what makes a side's call at a value, as ``peak.Probe`` has it.
        public: whether the public algorithm is a side.
    """

    size: str
    fixed: str
    dims: tuple[int, int]
    values: Sequence[int]
    maker: str
    arguments: Callable[[str, int], dict[str, Any]]
    warm_up: dict[str, Any]
    public: bool = False

    def sides(self, names: Sequence[str]) -> list[str]:
        """The sides' names; of DSA alone, each backend's two methods."""
        if self.size == "N":
            return [f"{name}, {method}" for name in names for method in METHODS]
        return [*names, *([sides.PUBLIC] if self.public else [])]

    def call(self, side: str, value: int) -> Call:
        """What is timed."""
        make = {"bench.sides:loss_call": sides.loss_call, "bench.span_pairs:call": span_pairs.call}[self.maker]
        return make(**self.arguments(side, value))

    def probe(self, side: str, value: int) -> peak.Probe:
        """What is measured in a process of its own."""
        return peak.Probe(self.maker, self.arguments(side, value), self.warm_up)


def _loss(side: str, batch: int, seq_len: int, dims: Sequence[int] = (STUDENT_DIM, TEACHER_DIM)) -> dict[str, Any]:
    return {"side": side, "batch": batch, "seq_len": seq_len, "dims": list(dims)}


def _pairs(side: str, spans: int, dims: Sequence[int]) -> dict[str, Any]:
    backend, method = side.rsplit(", ", 1)
    return {"backend": backend, "method": METHODS[method], "spans": spans, "dims": list(dims)}


def _sweeps(dims: tuple[int, int], batch: int, seq_len: int, most: int, points: int) -> list[Sweep]:
    """The four sweeps, up to ``batch`` rows and ``most`` spans; ``points`` of most of them."""
    tiny, loss = {"batch": 1, "seq_len": 16}, "bench.sides:loss_call"
    widths, wide = f"d {dims[0]} and {dims[1]}", list(dims)
    widest = 2 * dims[0]
    spans = [round(most / 2 ** (i / 2)) for i in range(2 * points - 1, -1, -1)]
    return [
        Sweep(
            "B", f"S={seq_len}, {widths}", dims, [batch // 2**i for i in range(points - 1, -1, -1)], loss,
            lambda side, value: _loss(side, value, seq_len, wide), tiny, public=True,
        ),
        Sweep(
            "S", f"B=1, {widths}", dims, [16 * seq_len // 2**i for i in range(points - 1, -1, -1)], loss,
            lambda side, value: _loss(side, 1, value, wide), tiny,
        ),
        Sweep(
            "N", f"DSA of one row, {widths}", dims, spans, "bench.span_pairs:call",
            lambda side, value: _pairs(side, value, wide), {"spans": 8},
        ),
        Sweep(
            "d", f"B=4 S={2 * seq_len}, d_S = d/2", dims, [widest // 2**i for i in range(points - 2, -1, -1)], loss,
            lambda side, value: _loss(side, 4, 2 * seq_len, [value // 2, value]), tiny,
        ),
    ]  # fmt: skip


FULL, QUICK = _sweeps((STUDENT_DIM, TEACHER_DIM), 16, 128, 4096, 5), _sweeps((8, 16), 4, 8, 64, 3)
EFFORT, QUICK_EFFORT = Effort(7, 1.5), Effort(2)


@dataclass
class Found:
    """What a sweep found, by side and value."""

    sweep: Sweep
    sides: list[str]
    times: list[Times] = field(default_factory=list)
    megabytes: list[dict[str, float]] = field(default_factory=list)

    def milliseconds(self, side: str) -> list[float]:
        """Medians."""
        return [1e3 * statistics.median(times[side]) for times in self.times]

    def peaks(self, side: str) -> list[float]:
        """In MB; empty where they can't be measured."""
        return [found[side] for found in self.megabytes]


def main(backends: Sequence[str] | None, rounds: int | None, out: Path | None, quick: bool = False) -> int:
    """Measure, print, write."""
    names, effort = sides.cpu_backends(backends), (QUICK_EFFORT if quick else EFFORT).asked(rounds)
    found = [_measure(sweep, names, effort) for sweep in (QUICK if quick else FULL)]
    _measure_peaks(found)
    of_spans = next(each for each in found if each.sweep.size == "N")
    dims = of_spans.sweep.dims
    predicted = gram_from(*dims)
    sections = [
        Section("Exponents", [row for each in found for row in _exponent_rows(each)]),
        Section("Crossover of pairwise and Gram", _crossover_rows(of_spans, names, predicted)),
        *(Section(f"Against {each.sweep.size}: {each.sweep.fixed}", (), "", _table(each)) for each in found),
    ]
    samples = {
        each.sweep.size: {
            str(value): {"seconds": times.samples, "megabytes": peaks}
            for value, times, peaks in zip(each.sweep.values, each.times, each.megabytes or cycle([{}]), strict=False)
        }
        for each in found
    }
    figures = {
        "": partial(_draw_scaling, found),
        "_crossover": partial(_draw_crossover, of_spans, names, predicted),
    }
    about = machine(widths=f"{dims[0]} and {dims[1]} where they stay")
    return publish(Report("mta-fast bench memory", about, sections, samples, figures), out)


def _measure(sweep: Sweep, names: Sequence[str], effort: Effort) -> Found:
    found = Found(sweep, sweep.sides(names))
    for value in sweep.values:
        calls = {side: sweep.call(side, value) for side in found.sides}
        found.times.append(alternate(calls, effort, partial(_check, sweep, value, names)))
    return found


def _measure_peaks(found: Sequence[Found]) -> None:
    """Fill in the peaks of all sweeps, from one process."""
    if peak.why_not() is not None:
        return
    probes = [each.sweep.probe(side, value) for each in found for value in each.sweep.values for side in each.sides]
    peaks = iter(peak.peaks(probes))
    for each in found:
        each.megabytes = [{side: max(next(peaks), LEAST_MEGABYTES) for side in each.sides} for _ in each.sweep.values]


def _check(sweep: Sweep, value: int, names: Sequence[str], results: dict[str, Any]) -> None:
    """Every side against the reference; the public algorithm's numbers are the public preset's."""
    what = f"{sweep.size}={value}"
    reference = f"{sides.REFERENCE}, pairwise" if sweep.size == "N" else sides.REFERENCE
    expected = results.get(reference) or sweep.call(reference, value)()
    for side, made in results.items():
        if side == sides.PUBLIC:
            same = sides.loss_call(**sweep.arguments(names[0], value), preset="public")
            check_parity(f"{what}: {names[0]} against the {side}", same(), made)
        else:
            # the two methods sum in another order, and the Gram form's terms cancel
            limit = 1e-4 if side.endswith("Gram") else PARITY
            check_parity(f"{what}: {side} against the reference", made, expected, limit)


# --- figures -----------------------------------------------------------------------------------------------------


def _exponent_rows(found: Found) -> list[Row]:
    size, values, rows = found.sweep.size, found.sweep.values, []
    last = f"{values[-plots.fitted(values)]} to {values[-1]}"
    for side in found.sides:
        rounds = min(len(times[side]) for times in found.times)
        fits = [plots.exponent(values, [times[side][i] for times in found.times]) for i in range(rounds)]
        rows.append(make_row(f"time ~ {size}^x, {size} = {last}: {side}", "", "", None, fits))
        what = f"peak memory ~ {size}^x, {size} = {last}: {side}"
        if found.megabytes:
            rows.append(make_row(what, "", "", None, [plots.exponent(values, found.peaks(side))]))
        else:
            rows.append(skipped_row(what, str(peak.why_not())))
    return rows


def crossing(sizes: Sequence[float], first: Sequence[float], second: Sequence[float]) -> float | None:
    """The size from which ``second`` stays below ``first``, on straight lines between logarithms."""
    gaps = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    for i in range(len(gaps) - 1, 0, -1):
        if gaps[i] < 0 <= gaps[i - 1]:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1]))
    return None


def _crossings(found: Found, name: str) -> list[float]:
    rounds = min(len(times.samples[found.sides[0]]) for times in found.times)
    per_round = (
        [[times[f"{name}, {method}"][i] for times in found.times] for method in METHODS] for i in range(rounds)
    )
    crossed = (crossing(found.sweep.values, *both) for both in per_round)
    return [size for size in crossed if size is not None]


def _crossover_rows(found: Found, names: Sequence[str], predicted: int) -> list[Row]:
    rows = []
    for name in names:
        sizes = _crossings(found, name)
        what = f'{name}: spans in a row from which the Gram form is faster ("auto" takes it from {predicted:,} on)'
        rows.append(make_row(what, "spans", "", None, sizes) if sizes else skipped_row(what, "they do not cross here"))
        pairwise, gram = (found.milliseconds(f"{name}, {method}") for method in METHODS)
        lost = [
            (g if size >= predicted else p) / min(p, g)
            for size, p, g in zip(found.sweep.values, pairwise, gram, strict=True)
        ]
        what = f'{name}: time of "auto" / time of the faster method, worst of {len(lost)} sizes'
        rows.append(make_row(what, "x", "", None, [max(lost)]))
    return rows


def _table(found: Found) -> list[str]:
    head = [found.sweep.size, *(f"{side}, ms" for side in found.sides)]
    head += [f"{side}, MB" for side in found.sides if found.megabytes]
    lines = []
    for i, value in enumerate(found.sweep.values):
        times = [number(found.milliseconds(side)[i], "") for side in found.sides]
        peaks = [number(found.peaks(side)[i], "") for side in found.sides if found.megabytes]
        lines.append([f"{value:,}", *times, *peaks])
    return markdown_table(head, lines)


def _draw_scaling(found: Sequence[Found], path: Path) -> None:
    rows: list[list[plots.Curves]] = [[], []]
    for each in found:
        size, fixed, values = each.sweep.size, each.sweep.fixed, each.sweep.values
        times = [plots.Line(side, values, each.milliseconds(side)) for side in each.sides]
        rows[0].append(plots.Curves(f"Time against {size}\n{fixed}", size, "ms", times))
        if each.megabytes:
            peaks = [plots.Line(side, values, each.peaks(side)) for side in each.sides]
            rows[1].append(plots.Curves(f"Peak memory against {size}\n{fixed}", size, "MB", peaks))
    title = "Forward + backward, float32: time, and peak memory above inputs and returned gradients"
    plots.curves([row for row in rows if row], path, title)


def _draw_crossover(found: Found, names: Sequence[str], predicted: int, path: Path) -> None:
    charts = []
    for name in names:
        lines = [
            plots.Line(f"{name}, {method}", found.sweep.values, found.milliseconds(f"{name}, {method}"))
            for method in METHODS
        ]
        marks = {f'"auto" takes Gram from {predicted:,} on': float(predicted)}
        sizes = _crossings(found, name)
        if sizes:
            marks[f"measured crossing: {statistics.median(sizes):,.0f}"] = statistics.median(sizes)
        charts.append(plots.Curves(f"{name}: {found.sweep.fixed}", "N", "ms", lines, marks))
    plots.curves([charts], path, "DSA, forward + backward: pairwise and Gram form")
