"""The loss, forward + backward, against the public algorithm, the floor, the reference: ``mta-fast bench loss``.

Two groups of sides are timed at each shape. One holds the machine's matrix multiplication, every backend and, at the
first shape, the compiled reference; the other the public algorithm and the backends in both presets. The paper preset
takes the teacher's importance alone, as the floor does; the public preset computes the public algorithm's numbers,
which is checked before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import peak, plots
from bench.compiled import compiled_reference
from bench.floor import SIZES, GemmRate, loss_flops
from bench.harness import Call, Effort, Times, alternate, check_parity
from bench.machine import machine
from bench.report import Report, Row, Section, cell, make_row, markdown_table, publish, skipped_row
from bench.sides import PUBLIC, REFERENCE, cpu_backends, loss_side, public_gigabytes
from bench.workload import STUDENT_DIM, TEACHER_DIM, Workload, standard_workload


@dataclass(frozen=True)
class Shape:
    """One line of the table, and how long to measure it.

    Attributes:
        kernels: rounds of the backends and the floor; public: of the public algorithm beside them.
        all_beside_public: whether all backends are timed beside it, or the first alone (a call takes half a minute).
        without_public: why the public algorithm is not timed.
        public_memory: whether its peak is measured too.
    """

    batch: int
    seq_len: int
    kernels: Effort
    public: Effort | None = None
    all_beside_public: bool = True
    without_public: str = ""
    public_memory: bool = False
    dims: tuple[int, int] = (STUDENT_DIM, TEACHER_DIM)
    hid: bool = True

    @property
    def name(self) -> str:
        return f"B={self.batch} S={self.seq_len}" + ("" if self.hid else ", without Hid")

    def workload(self) -> Workload:
        return standard_workload(self.batch, self.seq_len, self.dims, hid=self.hid)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    shapes: Sequence[Shape]
    grid: Sequence[tuple[int, int, tuple[int, int]]]  # batch, tokens, widths: backends against the reference
    grid_effort: Effort
    gemm_sizes: Sequence[tuple[int, int, int]]


WIDE, NARROW = (STUDENT_DIM, TEACHER_DIM), (64, 128)
FULL = Plan(
    (
        Shape(16, 256, Effort(9, 20, 5), Effort(5, 17, 3), public_memory=True),
        Shape(16, 512, Effort(7, 22, 4), Effort(3, 40), public_memory=True),
        Shape(64, 256, Effort(5, 24, 3), Effort(2), all_beside_public=False),
        Shape(64, 512, Effort(3, least=3)),
        Shape(1, 8192, Effort(3, least=3), without_public="not comparable, its maps hold S x S values", hid=False),
        Shape(16, 256, Effort(5, 8), Effort(5, 12), hid=False),
    ),
    # one token row after another, from a call of a few operations to one that fills the caches
    tuple((b, s, WIDE) for b, s in ((1, 8), (1, 32), (1, 128), (1, 512), (1, 2048), (4, 64), (4, 256), (16, 64)))
    + tuple((b, s, NARROW) for b, s in ((1, 8), (4, 64), (16, 256))),
    Effort(11, 1, 5),
    SIZES,
)
QUICK = Plan(
    (Shape(2, 12, Effort(2), Effort(2), dims=(8, 16)), Shape(1, 16, Effort(2), Effort(2), dims=(8, 16), hid=False)),
    ((1, 8, (8, 16)),),
    Effort(2),
    ((32, 32, 32),),
)


@dataclass(frozen=True)
class Target:
    """What a backend must reach at a shape; None where nothing is asked."""

    public: float | None = None
    floor: float | None = None
    megabytes: float | None = None


TARGETS = {
    ("cpp", "B=16 S=256"): Target(2.9, 1.25, 120),
    ("cpp", "B=16 S=512"): Target(5.5, 1.25, 200),
    ("cpp", "B=64 S=256"): Target(11, 1.25, 350),
    ("cpp", "B=64 S=512"): Target(None, 1.25, 700),
    ("cpp", "B=1 S=8192, without Hid"): Target(None, 1.35, 400),
    ("cpp", "B=16 S=256, without Hid"): Target(10),
    (REFERENCE, "B=16 S=256"): Target(2.5),
    (REFERENCE, "B=16 S=512"): Target(3.8),
}
GEMM, GEMM_AGAIN = "GEMM", "GEMM again"  # at both ends of a round: the better one counts
GROWTH, SMALL, LARGE = 5.0, "B=16 S=256", "B=64 S=256"  # four times the rows


@dataclass
class Found:
    """What was measured at one shape."""

    shape: Shape
    flops: int
    kernels: Times
    rates: list[float]
    public: Times | None
    without_public: str
    megabytes: dict[str, list[float]] = field(default_factory=dict)


def main(backends: Sequence[str] | None, rounds: int | None, out: Path | None, quick: bool = False) -> int:
    """Measure, print, write, and return 1 if a target was missed."""
    plan, names = QUICK if quick else FULL, cpu_backends(backends)
    with ExitStack() as stack:
        compiled = [] if quick else [stack.enter_context(compiled_reference())]
        found = []
        for i, shape in enumerate(plan.shapes):
            found.append(_measure(shape, plan, names, compiled if i == 0 else [], rounds))
        grid = _grid(plan, names, rounds)
    _measure_memory(found, names)
    best = max(rate for each in found for rate in each.rates)
    sections = [
        Section("Must reach", (), _summary_text(best), _summary(found, names, best)),
        Section("Against the public algorithm", _public_rows(found, names)),
        Section("Against the floor", _floor_rows(found, names, best)),
        Section("Peak memory", _memory_rows(found, names)),
        Section("Against the reference", [*_reference_rows(found, names, compiled), *grid]),
        Section("Growth with the batch", _growth_rows(found, names)),
        Section("Times", _time_rows(found)),
    ]
    samples = {
        each.shape.name: {
            "floor flops": each.flops,
            "gemm flops a second": each.rates,
            "seconds": each.kernels.samples,
            "seconds beside the public algorithm": each.public.samples if each.public else {},
            "megabytes": each.megabytes,
        }
        for each in found
    }
    panels = _panels(found, names)
    figures = {"": lambda path: plots.dots(panels, path, "Loss, forward + backward, float32")}
    about = machine(widths="768 and 1600, 3 layer pairs")
    return publish(Report("mta-fast bench loss", about, sections, samples, figures), out)


# --- measuring ---------------------------------------------------------------------------------------------------


def _measure(shape: Shape, plan: Plan, names: Sequence[str], compiled: Sequence[str], rounds: int | None) -> Found:
    workload = shape.workload()
    public, reason = _beside_public(shape, workload, names, rounds)
    sides: dict[str, Call] = {name: loss_side(workload, name) for name in (*names, *compiled)}
    if shape.name == LARGE:
        small = standard_workload(16, 256)
        sides |= {_small(name): loss_side(small, name) for name in names}
    gemm, check = GemmRate(plan.gemm_sizes), partial(_check, shape.name, workload)
    around = {GEMM: gemm, **sides, GEMM_AGAIN: gemm}
    times = alternate(around, shape.kernels.asked(rounds), check)
    taken = gemm.last(2 * len(times.samples.pop(GEMM)))
    times.samples.pop(GEMM_AGAIN)
    rates = [max(pair) for pair in zip(taken[::2], taken[1::2], strict=True)]
    return Found(shape, loss_flops(workload.loss, workload.spans), times, rates, public, reason)


def _check(what: str, workload: Workload, results: dict[str, Any]) -> None:
    """Every backend's loss and gradients against the reference's, in the paper preset."""
    expected = results.get(REFERENCE) or loss_side(workload, REFERENCE)()
    for name, made in results.items():
        if name not in (REFERENCE, GEMM, GEMM_AGAIN) and not name.endswith(SMALL):
            check_parity(f"{what}: {name} against the reference", made, expected)


def _beside_public(
    shape: Shape, workload: Workload, names: Sequence[str], rounds: int | None
) -> tuple[Times | None, str]:
    """The public algorithm and the backends in both presets; or why it is not run."""
    if shape.without_public:
        return None, shape.without_public
    if shape.public is None:
        need = public_gigabytes(workload)
        return None, f"it needs about {need:.0f} GB (ten float32 matrices of (spans of the batch)^2)"
    sides, names = {PUBLIC: loss_side(workload, PUBLIC)}, names if shape.all_beside_public else names[:1]
    for name in names:
        sides |= {name: loss_side(workload, name), _same(name): loss_side(workload, name, "public")}

    def check(results: dict[str, Any]) -> None:
        for name in names:
            what = f"{shape.name}: {name} against the public algorithm"
            check_parity(what, results[_same(name)], results[PUBLIC])
        _check(shape.name, workload, {name: results[name] for name in names})

    return alternate(sides, shape.public.asked(rounds), check), ""


def _small(name: str) -> str:
    return f"{name} at {SMALL}"


def _same(name: str) -> str:
    return f"{name}, public preset"


def _measure_memory(found: Sequence[Found], names: Sequence[str]) -> None:
    """Fill in the peaks of all shapes, from one process."""
    if peak.why_not():
        return
    probes = {
        (each.shape.name, side): peak.Probe(
            "bench.sides:loss_call",
            {
                "side": side,
                "batch": each.shape.batch,
                "seq_len": each.shape.seq_len,
                "dims": list(each.shape.dims),
                "hid": each.shape.hid,
            },
            {"batch": 1, "seq_len": 16},
        )
        for each in found
        for side in (*names, *([PUBLIC] if each.shape.public_memory else []))
    }
    for (shape, side), megabytes in zip(probes, peak.peaks(list(probes.values())), strict=True):
        next(each for each in found if each.shape.name == shape).megabytes[side] = [megabytes]


def _grid(plan: Plan, names: Sequence[str], rounds: int | None) -> list[Row]:
    rows = []
    for batch, seq_len, dims in plan.grid if set(names) - {REFERENCE} else ():
        workload = standard_workload(batch, seq_len, dims)
        sides = {name: loss_side(workload, name) for name in dict.fromkeys((*names, REFERENCE))}
        what = f"B={batch} S={seq_len}, widths {dims[0]} and {dims[1]}"
        times = alternate(sides, plan.grid_effort.asked(rounds), partial(_check, what, workload))
        rows += [
            make_row(f"{what}: {REFERENCE} / {name}", "x", ">=", 1.0, times.ratio(REFERENCE, name))
            for name in names
            if name != REFERENCE
        ]
    return rows


# --- figures -----------------------------------------------------------------------------------------------------


def _target(name: str, shape: Shape) -> Target:
    return TARGETS.get((name, shape.name), Target())


def _public_rows(found: Sequence[Found], names: Sequence[str]) -> list[Row]:
    rows = []
    for each in found:
        for name in names:
            target = _target(name, each.shape).public
            what = f"{each.shape.name}: {PUBLIC} / {name}"
            if each.public is None or name not in each.public.samples:
                rows.append(skipped_row(what, each.without_public or f"{names[0]} alone is timed beside it"))
                continue
            rows.append(make_row(f"{what}, paper preset", "x", ">=", target, each.public.ratio(PUBLIC, name)))
            ratios = each.public.ratio(PUBLIC, _same(name))
            rows.append(make_row(f"{what}, public preset (the same numbers)", "x", ">=", None, ratios))
    return rows


def _floor(each: Found, name: str, best: float | None = None) -> list[float]:
    """Time / floor of each round, at the round's own GEMM rate or at ``best``."""
    return [t * (best or rate) / each.flops for t, rate in zip(each.kernels[name], each.rates, strict=True)]


def _floor_rows(found: Sequence[Found], names: Sequence[str], best: float) -> list[Row]:
    rows = []
    for each in found:
        for name in names:
            what, target = f"{each.shape.name}: {name} / floor", _target(name, each.shape).floor
            rows.append(make_row(f"{what}, GEMM rate of the same round", "x", "<=", target, _floor(each, name)))
            ratios = _floor(each, name, best)
            rows.append(make_row(f"{what}, best GEMM rate of the whole run", "x", "<=", target, ratios))
    return rows


def _memory_rows(found: Sequence[Found], names: Sequence[str]) -> list[Row]:
    rows = []
    for each in found:
        for name in each.megabytes or names:
            what, target = f"{each.shape.name}: {name}", _target(name, each.shape).megabytes
            if name not in each.megabytes:
                rows.append(skipped_row(what, str(peak.why_not())))
                continue
            rows.append(make_row(what, "MB", "<=", target, each.megabytes[name]))
    return rows


def _reference_rows(found: Sequence[Found], names: Sequence[str], compiled: Sequence[str]) -> list[Row]:
    rows = []
    for each in found:
        times = each.kernels
        if REFERENCE in times.samples:
            rows += [
                make_row(f"{each.shape.name}: {REFERENCE} / {name}", "x", ">=", 1.0, times.ratio(REFERENCE, name))
                for name in names
                if name != REFERENCE
            ]
        rows += [
            make_row(f"{each.shape.name}: {other} / {name}", "x", ">=", None, times.ratio(other, name))
            for other in compiled
            for name in names
            if other in times.samples
        ]
    return rows


def _growth_rows(found: Sequence[Found], names: Sequence[str]) -> list[Row]:
    return [
        make_row(f"{name}: {LARGE} / {SMALL}", "x", "<", GROWTH, each.kernels.ratio(name, _small(name)))
        for each in found
        for name in names
        if _small(name) in each.kernels.samples
    ]


def _time_rows(found: Sequence[Found]) -> list[Row]:
    rows = []
    for each in found:
        public = {} if each.public is None else {PUBLIC: each.public[PUBLIC]}
        for name, values in (public | each.kernels.samples).items():
            if f" at {SMALL}" not in name:
                rows.append(make_row(f"{each.shape.name}: {name}", "ms", "", None, [1e3 * t for t in values]))
    return rows


def _panels(found: Sequence[Found], names: Sequence[str]) -> list[plots.Panel]:
    ratios, floors = [], []
    for each in found:
        for name in names:
            if each.public is not None and name in each.public.samples:
                row = make_row("", "x", "", None, each.public.ratio(PUBLIC, name))
                ratios.append(plots.Point(each.shape.name, name, row))
        for name in each.kernels.samples:
            if f" at {SMALL}" not in name:
                floors.append(plots.Point(each.shape.name, name, make_row("", "x", "", None, _floor(each, name))))
    return [
        plots.Panel("Against the public algorithm", "public algorithm / side (higher is better)", ratios),
        plots.Panel("Against the floor", "time / floor (lower is better)", floors),
    ]


# --- the table that must be reached ------------------------------------------------------------------------------


def _summary_text(best: float) -> str:
    return (
        "Medians. Against the public algorithm and the floor: ratios within a round. Floor: the products of the "
        "formulas at the GEMM rate measured in the same round; in brackets at the best rate of the whole run, "
        f"{best / 1e9:.0f} GFLOP/s. Peak memory: above inputs and returned gradients."
    )


def _summary(found: Sequence[Found], names: Sequence[str], best: float) -> list[str]:
    lines = []
    for name in names:
        for each in found:
            target = _target(name, each.shape)
            public = each.without_public or "-"
            if each.public is not None and name in each.public.samples:
                public = cell(make_row("", "x", ">=", target.public, each.public.ratio(PUBLIC, name)))
            floor = cell(make_row("", "x", "<=", target.floor, _floor(each, name)))
            strict = statistics.median(_floor(each, name, best))
            memory = "-"
            if name in each.megabytes:
                memory = cell(make_row("", "MB", "<=", target.megabytes, each.megabytes[name]))
            lines.append([name, each.shape.name, public, f"{floor} [{strict:.2f}]", memory])
    return markdown_table(
        ("backend", "shape", "faster than the public algorithm", "time / floor", "peak memory"), lines
    )
