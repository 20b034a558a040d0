"""How time and peak memory grow with batch, row, spans and width, and where the two methods of DSA cross.

``python -m bench memory``. An exponent is the slope of the line through the logarithms, of the sizes from an eighth of
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

from bench import peak, plots
from bench.harness import PARITY, Effort, Times, alternate, check_parity
from bench.report import Entry, Report, Section, entry, machine, markdown_table, number, skipped
from bench.workload import PUBLIC, REFERENCE, STUDENT_DIM, TEACHER_DIM, cpu_backends, loss_call
from mta_fast.contract import gram_from

METHODS = {"pairwise": "pairwise", "Gram": "gram"}
LOSS = "bench.workload:loss_call"
LEAST_MEGABYTES = 0.1  # smaller peaks are pages, not tensors: shown as this


@dataclass(frozen=True)
class Sweep:
    """One size that grows while the others stay."""

    size: str  # its letter
    fixed: str  # what stays
    dims: tuple[int, int]  # d_S and d_T where they do
    values: Sequence[int]  # what it takes
    maker: str  # of a side's call at a value, as the next two, for ``peak.Probe``
    arguments: Callable[[str, int], dict[str, Any]]
    warm_up: dict[str, Any]
    public: bool = False  # whether the public algorithm is a side

    def sides(self, names: Sequence[str]) -> list[str]:
        """The sides' names; of DSA alone, each backend's two methods."""
        if self.size == "N":
            return [f"{name}, {method}" for name in names for method in METHODS]
        return [*names, *([PUBLIC] if self.public else [])]

    def probe(self, side: str, value: int) -> peak.Probe:
        """What is timed here, and measured in a process of its own."""
        return peak.Probe(self.maker, self.arguments(side, value), self.warm_up)


def _sweeps(dims: tuple[int, int], batch: int, seq_len: int, most: int, points: int) -> list[Sweep]:
    """The four sweeps, up to ``batch`` rows and ``most`` spans; ``points`` of most of them."""
    tiny, widths = {"batch": 1, "seq_len": 16}, f"d {dims[0]} and {dims[1]}"

    def up_to(last: int, count: int = points, factor: float = 2) -> list[int]:
        return [round(last / factor**i) for i in range(count - 1, -1, -1)]

    def loss(side: str, batch: int, seq_len: int, dims: Sequence[int] = dims) -> dict[str, Any]:
        return {"side": side, "batch": batch, "seq_len": seq_len, "dims": list(dims)}

    def pairs(side: str, spans: int) -> dict[str, Any]:
        backend, method = side.rsplit(", ", 1)
        return {"backend": backend, "method": METHODS[method], "spans": spans, "dims": list(dims)}

    def rows(side: str, value: int) -> dict[str, Any]:
        return loss(side, value, seq_len)

    def row(side: str, value: int) -> dict[str, Any]:
        return loss(side, 1, value)

    def width(side: str, value: int) -> dict[str, Any]:
        return loss(side, 4, 2 * seq_len, [value // 2, value])

    spans, halves = up_to(most, 2 * points, 2**0.5), up_to(2 * dims[0], points - 1)
    return [
        Sweep("B", f"S={seq_len}, {widths}", dims, up_to(batch), LOSS, rows, tiny, public=True),
        Sweep("S", f"B=1, {widths}", dims, up_to(16 * seq_len), LOSS, row, tiny),
        Sweep("N", f"DSA of one row, {widths}", dims, spans, "bench.ops.span_pairs:call", pairs, {"spans": 8}),
        Sweep("d", f"B=4 S={2 * seq_len}, d_S = d/2", dims, halves, LOSS, width, tiny),
    ]


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

    def by_round(self, side: str) -> list[list[float]]:
        """Of each round that every size has, the side's seconds at all sizes."""
        return [list(times) for times in zip(*(times[side] for times in self.times), strict=False)]

    def peaks(self, side: str) -> list[float]:
        """In MB; empty where they can't be measured."""
        return [found[side] for found in self.megabytes]


def measure(backends: Sequence[str] | None = None, rounds: int | None = None, quick: bool = False) -> Report:
    """Every sweep, the exponents, and the crossover."""
    names, effort = cpu_backends(backends), (QUICK_EFFORT if quick else EFFORT).asked(rounds)
    found = [_measure(sweep, names, effort) for sweep in (QUICK if quick else FULL)]
    _measure_peaks(found)
    of_spans = next(each for each in found if each.sweep.size == "N")
    dims = of_spans.sweep.dims
    predicted = gram_from(*dims)
    sections = [
        Section("Exponents", [made for each in found for made in _exponents(each)]),
        Section("Crossover of pairwise and Gram", _crossovers(of_spans, names, predicted)),
        *(Section(f"Against {each.sweep.size}: {each.sweep.fixed}", (), "", _table(each)) for each in found),
    ]
    samples = {
        each.sweep.size: {
            str(value): {"seconds": times, "megabytes": peaks}
            for value, times, peaks in zip(each.sweep.values, each.times, each.megabytes or cycle([{}]), strict=False)
        }
        for each in found
    }
    figures = {
        "": partial(_draw_scaling, found),
        "_crossover": partial(_draw_crossover, of_spans, names, predicted),
    }
    about = machine(widths=f"{dims[0]} and {dims[1]} where they stay")
    return Report("mta-fast bench memory", about, sections, samples, figures)


def _measure(sweep: Sweep, names: Sequence[str], effort: Effort) -> Found:
    found = Found(sweep, sweep.sides(names))
    for value in sweep.values:
        calls = {side: sweep.probe(side, value).call() for side in found.sides}
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
    reference = f"{REFERENCE}, pairwise" if sweep.size == "N" else REFERENCE
    expected = results.get(reference) or sweep.probe(reference, value).call()()
    for side, made in results.items():
        if side == PUBLIC:
            same = loss_call(**sweep.arguments(names[0], value), preset="public")
            check_parity(f"{what}: {names[0]} against the {side}", same(), made)
        else:
            # the two methods sum in another order, and the Gram form's terms cancel
            limit = 1e-4 if side.endswith("Gram") else PARITY
            check_parity(f"{what}: {side} against the reference", made, expected, limit)


def _exponents(found: Found) -> list[Entry]:
    size, values, made = found.sweep.size, found.sweep.values, []
    last = f"{values[-plots.fitted(values)]} to {values[-1]}"
    for side in found.sides:
        fits = [plots.exponent(values, times) for times in found.by_round(side)]
        made.append(entry(f"time ~ {size}^x, {size} = {last}: {side}", fits, ""))
        what = f"peak memory ~ {size}^x, {size} = {last}: {side}"
        if found.megabytes:
            made.append(entry(what, [plots.exponent(values, found.peaks(side))], ""))
        else:
            made.append(skipped(what, peak.why_not()))
    return made


def crossing(sizes: Sequence[float], first: Sequence[float], second: Sequence[float]) -> float | None:
    """The size from which ``second`` stays below ``first``, on straight lines between logarithms."""
    gaps = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    for i in range(len(gaps) - 1, 0, -1):
        if gaps[i] < 0 <= gaps[i - 1]:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1]))
    return None


def _crossings(found: Found, name: str) -> list[float]:
    rounds = zip(*(found.by_round(f"{name}, {method}") for method in METHODS), strict=True)
    crossed = (crossing(found.sweep.values, *both) for both in rounds)
    return [size for size in crossed if size is not None]


def _crossovers(found: Found, names: Sequence[str], predicted: int) -> list[Entry]:
    made = []
    for name in names:
        sizes = _crossings(found, name)
        what = f'{name}: spans in a row from which the Gram form is faster ("auto" takes it from {predicted:,} on)'
        made.append(entry(what, sizes, "spans") if sizes else skipped(what, "they do not cross here"))
        pairwise, gram = (found.milliseconds(f"{name}, {method}") for method in METHODS)
        lost = [
            (g if size >= predicted else p) / min(p, g)
            for size, p, g in zip(found.sweep.values, pairwise, gram, strict=True)
        ]
        what = f'{name}: time of "auto" / time of the faster method, worst of {len(lost)} sizes'
        made.append(entry(what, [max(lost)]))
    return made


def _table(found: Found) -> list[str]:
    head = [found.sweep.size, *(f"{side}, ms" for side in found.sides)]
    head += [f"{side}, MB" for side in found.sides if found.megabytes]
    lines = []
    for i, value in enumerate(found.sweep.values):
        times = [number(found.milliseconds(side)[i]) for side in found.sides]
        peaks = [number(found.peaks(side)[i]) for side in found.sides if found.megabytes]
        lines.append([f"{value:,}", *times, *peaks])
    return markdown_table(head, lines)


def _draw_scaling(found: Sequence[Found], path: Path) -> None:
    rows = []
    for each in found:
        size, fixed, values = each.sweep.size, each.sweep.fixed, each.sweep.values
        lines = {side: each.milliseconds(side) for side in each.sides}
        charts = [plots.Curves(f"Time against {size}\n{fixed}", size, "ms", values, lines)]
        if each.megabytes:
            lines = {side: each.peaks(side) for side in each.sides}
            charts.append(plots.Curves(f"Peak memory against {size}\n{fixed}", size, "MB", values, lines))
        rows.append(charts)
    plots.curves(rows, path, "Forward + backward, float32: time, and peak memory above inputs and returned gradients")


def _draw_crossover(found: Found, names: Sequence[str], predicted: int, path: Path) -> None:
    charts = []
    for name in names:
        lines = {f"{name}, {method}": found.milliseconds(f"{name}, {method}") for method in METHODS}
        marks = {f'"auto" takes Gram from {predicted:,} on': float(predicted)}
        sizes = _crossings(found, name)
        if sizes:
            marks[f"measured crossing: {statistics.median(sizes):,.0f}"] = statistics.median(sizes)
        charts.append(plots.Curves(f"{name}: {found.sweep.fixed}", "N", "ms", found.sweep.values, lines, marks))
    plots.curves([charts], path, "DSA, forward + backward: pairwise and Gram form")
