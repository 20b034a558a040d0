"""The loss, forward + backward, against the public algorithm, the floor, the reference: ``python -m bench loss``.

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
from typing import Any

from bench import peak, plots
from bench.compiled import compiled_reference
from bench.floor import SIZES, GemmRate, check_floor, loss_flops
from bench.harness import Call, Effort, Times, alternate, check_parity
from bench.report import Entry, Report, Section, entry, machine, markdown_table, milliseconds, skipped
from bench.workload import (
    PUBLIC,
    REFERENCE,
    STUDENT_DIM,
    TEACHER_DIM,
    Workload,
    cpu_backends,
    loss_side,
    public_gigabytes,
    standard_workload,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One line of the table, and how long to measure it."""

    batch: int
    seq_len: int
    kernels: Effort  # rounds of the backends and the floor
    public: Effort | None = None  # of the public algorithm beside them
    all_beside_public: bool = True  # or the first backend alone: a call takes half a minute
    without_public: str = ""  # why the public algorithm is not timed
    public_memory: bool = False  # whether its peak is measured too
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
    """What a backend must reach at a shape; empty where nothing is asked."""

    public: str = ""
    floor: str = ""
    megabytes: str = ""


TARGETS = {
    ("cpp", "B=16 S=256"): Target(">= 2.9", "<= 1.25", "<= 120"),
    ("cpp", "B=16 S=512"): Target(">= 5.5", "<= 1.25", "<= 200"),
    ("cpp", "B=64 S=256"): Target(">= 11", "<= 1.25", "<= 350"),
    ("cpp", "B=64 S=512"): Target("", "<= 1.25", "<= 700"),
    ("cpp", "B=1 S=8192, without Hid"): Target("", "<= 1.35", "<= 400"),
    ("cpp", "B=16 S=256, without Hid"): Target(">= 10"),
    (REFERENCE, "B=16 S=256"): Target(">= 2.5"),
    (REFERENCE, "B=16 S=512"): Target(">= 3.8"),
}
GEMM, GEMM_AGAIN = "GEMM", "GEMM again"  # at both ends of a round: the better one counts
GROWTH, SMALL, LARGE = "< 5", "B=16 S=256", "B=64 S=256"  # four times the rows


@dataclass
class Found:
    """What was measured at one shape; ``names`` are the backends."""

    shape: Shape
    names: Sequence[str]
    flops: int
    kernels: Times
    rates: list[float]
    public: Times | None
    without_public: str
    megabytes: dict[str, list[float]] = field(default_factory=dict)

    def target(self, name: str) -> Target:
        """What a backend must reach here."""
        return TARGETS.get((name, self.shape.name), Target())

    def over_floor(self, name: str, best: float | None = None) -> list[float]:
        """Time / floor of each round, at the round's own GEMM rate or at ``best``."""
        return [t * (best or rate) / self.flops for t, rate in zip(self.kernels[name], self.rates, strict=True)]

    def over_public(self, name: str, preset: str = "paper") -> list[float]:
        """The public algorithm's time over a backend's; empty where it isn't timed beside it."""
        if self.public is None or name not in self.public:
            return []
        return self.public.ratio(PUBLIC, name if preset == "paper" else _same(name))

    @property
    def sides(self) -> list[str]:
        """The sides whose times are of this shape."""
        return [name for name in self.kernels if f" at {SMALL}" not in name]

    def against_public(self) -> list[Entry]:
        """In both presets."""
        made = []
        for name in self.names:
            what, ratios = f"{self.shape.name}: {PUBLIC} / {name}", self.over_public(name)
            if not ratios:
                made.append(skipped(what, self.without_public or f"{self.names[0]} alone is timed beside it"))
                continue
            made.append(entry(f"{what}, paper preset", ratios, target=self.target(name).public))
            made.append(entry(f"{what}, public preset (the same numbers)", self.over_public(name, "public")))
        return made

    def against_floor(self, best: float) -> list[Entry]:
        """At both rates."""
        made = []
        for name in self.names:
            what, target = f"{self.shape.name}: {name} / floor", self.target(name).floor
            made.append(entry(f"{what}, GEMM rate of the same round", self.over_floor(name), target=target))
            made.append(entry(f"{what}, best GEMM rate of the whole run", self.over_floor(name, best), target=target))
        return made

    def peaks(self) -> list[Entry]:
        """Of every side, or why there are none."""
        if not self.megabytes:
            return [skipped(f"{self.shape.name}: {name}", peak.why_not()) for name in self.names]
        of = self.megabytes.items()
        return [entry(f"{self.shape.name}: {name}", each, "MB", self.target(name).megabytes) for name, each in of]

    def against_reference(self, compiled: Sequence[str]) -> list[Entry]:
        """The reference, and compiled ones, over every backend."""
        made = _over(self.shape.name, self.kernels, REFERENCE, self.names, ">= 1")
        return made + [each for other in compiled for each in _over(self.shape.name, self.kernels, other, self.names)]

    def growth(self) -> list[Entry]:
        """Time here over that of the small shape, where both were measured side by side."""
        names = [name for name in self.names if _small(name) in self.kernels]
        ratios = {name: self.kernels.ratio(name, _small(name)) for name in names}
        return [entry(f"{name}: {LARGE} / {SMALL}", each, target=GROWTH) for name, each in ratios.items()]

    def times(self) -> list[Entry]:
        """Of every side."""
        public = {} if self.public is None else {PUBLIC: self.public[PUBLIC]}
        taken = public | {name: self.kernels[name] for name in self.sides}
        return [milliseconds(f"{self.shape.name}: {name}", each) for name, each in taken.items()]

    def summary(self, name: str, best: float) -> list[str]:
        """A backend's line in the table that must be reached."""
        target, ratios = self.target(name), self.over_public(name)
        public = entry("", ratios, target=target.public).cell if ratios else self.without_public or "-"
        floor = entry("", self.over_floor(name), target=target.floor).cell
        strict = statistics.median(self.over_floor(name, best))
        megabytes = self.megabytes.get(name)
        memory = "-" if megabytes is None else entry("", megabytes, "MB", target.megabytes).cell
        return [name, self.shape.name, public, f"{floor} [{strict:.2f}]", memory]


def measure(backends: Sequence[str] | None = None, rounds: int | None = None, quick: bool = False) -> Report:
    """Every shape, the grid against the reference, and the peaks."""
    plan, names = QUICK if quick else FULL, cpu_backends(backends)
    with ExitStack() as stack:
        compiled = [] if quick else [stack.enter_context(compiled_reference())]
        found = []
        for i, shape in enumerate(plan.shapes):
            found.append(_measure(shape, plan, names, compiled if i == 0 else [], rounds))
        grid = _grid(plan, names, rounds)
    _measure_memory(found, names)
    best = max(rate for each in found for rate in each.rates)
    head = ("backend", "shape", "faster than the public algorithm", "time / floor", "peak memory")
    summary = [each.summary(name, best) for name in names for each in found]
    text = (
        "Medians. Against the public algorithm and the floor: ratios within a round. Floor: the products of the "
        "formulas at the GEMM rate measured in the same round; in brackets at the best rate of the whole run, "
        f"{best / 1e9:.0f} GFLOP/s. Peak memory: above inputs and returned gradients."
    )
    sections = [
        Section("Must reach", (), text, markdown_table(head, summary)),
        Section("Against the public algorithm", [e for each in found for e in each.against_public()]),
        Section("Against the floor", [e for each in found for e in each.against_floor(best)]),
        Section("Peak memory", [e for each in found for e in each.peaks()]),
        Section("Against the reference", [*(e for each in found for e in each.against_reference(compiled)), *grid]),
        Section("Growth with the batch", [e for each in found for e in each.growth()]),
        Section("Times", [e for each in found for e in each.times()]),
    ]
    samples = {
        each.shape.name: {
            "floor flops": each.flops,
            "gemm flops a second": each.rates,
            "seconds": each.kernels,
            "seconds beside the public algorithm": each.public or {},
            "megabytes": each.megabytes,
        }
        for each in found
    }
    figures = {"": partial(plots.dots, _panels(found), title="Loss, forward + backward, float32")}
    return Report("mta-fast bench loss", machine(widths="768 and 1600, 3 layer pairs"), sections, samples, figures)


def _measure(shape: Shape, plan: Plan, names: Sequence[str], compiled: Sequence[str], rounds: int | None) -> Found:
    workload = shape.workload()
    public, reason = _beside_public(shape, workload, names, rounds)
    sides: dict[str, Call] = {name: loss_side(workload, name) for name in (*names, *compiled)}
    if shape.name == LARGE:
        small = standard_workload(16, 256)
        sides |= {_small(name): loss_side(small, name) for name in names}
    gemm, check = GemmRate(plan.gemm_sizes), partial(_check, shape.name, workload)
    around: dict[str, Call] = {GEMM: gemm, **sides, GEMM_AGAIN: gemm}
    times = alternate(around, shape.kernels.asked(rounds), check)
    taken = gemm.last(2 * len(times.pop(GEMM)))
    times.pop(GEMM_AGAIN)
    rates = [max(pair) for pair in zip(taken[::2], taken[1::2], strict=True)]
    found = Found(shape, names, loss_flops(workload.loss, workload.spans), times, rates, public, reason)
    for name in found.sides if plan is FULL else ():  # tiny products don't show the machine's rate
        check_floor(f"{shape.name}: {name}", found.over_floor(name))
    return found


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
    probed = [(each, side) for each in found for side in (*names, *([PUBLIC] if each.shape.public_memory else []))]
    probes = []
    for each, side in probed:
        shape = each.shape
        sizes = {"batch": shape.batch, "seq_len": shape.seq_len, "dims": list(shape.dims), "hid": shape.hid}
        probes.append(peak.Probe("bench.workload:loss_call", {"side": side, **sizes}, {"batch": 1, "seq_len": 16}))
    for (each, side), megabytes in zip(probed, peak.peaks(probes), strict=True):
        each.megabytes[side] = [megabytes]


def _grid(plan: Plan, names: Sequence[str], rounds: int | None) -> list[Entry]:
    made = []
    for batch, seq_len, dims in plan.grid if set(names) - {REFERENCE} else ():
        workload = standard_workload(batch, seq_len, dims)
        sides = {name: loss_side(workload, name) for name in dict.fromkeys((*names, REFERENCE))}
        what = f"B={batch} S={seq_len}, widths {dims[0]} and {dims[1]}"
        times = alternate(sides, plan.grid_effort.asked(rounds), partial(_check, what, workload))
        made += _over(what, times, REFERENCE, names, ">= 1")
    return made


def _over(what: str, times: Times, side: str, names: Sequence[str], target: str = "") -> list[Entry]:
    """A side's time over every backend's."""
    if side not in times:
        return []
    return [entry(f"{what}: {side} / {n}", times.ratio(side, n), target=target) for n in names if n != side]


def _panels(found: Sequence[Found]) -> list[plots.Panel]:
    ratios = [(each, name, each.over_public(name)) for each in found for name in each.names if each.over_public(name)]
    floors = [(each, name, each.over_floor(name)) for each in found for name in each.sides]
    labels = {
        "Against the public algorithm": ("public algorithm / side (higher is better)", ratios),
        "Against the floor": ("time / floor (lower is better)", floors),
    }
    return [
        plots.Panel(title, label, [(each.shape.name, name, entry("", values)) for each, name, values in of])
        for title, (label, of) in labels.items()
    ]
