"""Single ops: every backend, the compiled reference and the op's peers side by side: ``python -m bench ops``.

``pytest bench/test_ops.py`` runs the same cases under pytest-benchmark, one side at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import plots
from bench.compiled import compiled_reference
from bench.floor import SIZES, CopyRate, GemmRate, check_floor
from bench.harness import Effort, Tensors, Times, alternate, check_parity
from bench.ops import hidden_alignment, importance, linear_divergence, pooling, span_pairs
from bench.ops.cases import SHAPES, Op, Shape
from bench.report import Entry, Report, Section, entry, machine, markdown_table, milliseconds, number
from bench.workload import REFERENCE, cpu_backends

OPS: tuple[Op, ...] = (importance.OP, pooling.OP, span_pairs.OP, hidden_alignment.OP, linear_divergence.OP)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    shapes: Sequence[Shape]
    effort: Effort
    gemm_sizes: Sequence[tuple[int, int, int]]
    copied_megabytes: int


FULL = Plan(SHAPES, Effort(15, 3), SIZES[:2], 128)
QUICK = Plan((Shape(2, 12, (8, 16)),), Effort(2), ((32, 32, 32),), 1)


@dataclass
class Found:
    """One op at one shape."""

    label: str
    floor: list[float]  # seconds, round by round
    times: Times

    def over_floor(self, side: str) -> list[float]:
        """time / floor of each round."""
        return [t / floor for t, floor in zip(self.times[side], self.floor, strict=True)]


def measure(backends: Sequence[str] | None = None, rounds: int | None = None, quick: bool = False) -> Report:
    """Every op at every shape; a backend must not be slower than the reference."""
    plan, names = QUICK if quick else FULL, cpu_backends(backends)
    sections, panels = list[Section](), list[plots.Panel]()
    samples: dict[str, Any] = {}
    with compiled_reference() as compiled:
        others = [REFERENCE, *([] if quick else [compiled])]
        for shape in plan.shapes:
            found = [_measure(op, shape, mode, names, others, plan, rounds) for op in OPS for mode in op.modes]
            sections.append(Section(f"Times, {shape.name}", (), TEXT, _table(found, names[0])))
            sections.append(Section(f"Ratios, {shape.name}", [e for each in found for e in _ratios(each, names)]))
            samples |= {f"{each.label}, {shape.name}": each.times | {"floor": each.floor} for each in found}
            points = [(each.label, side, entry("", each.over_floor(side))) for each in found for side in each.times]
            panels.append(plots.Panel(shape.name, "time / floor (lower is better)", points))
    figures = {"": partial(plots.dots, panels, title="Single ops, float32")}
    return Report("mta-fast bench ops", machine(widths="768 and 1600"), sections, samples, figures)


def _measure(
    op: Op, shape: Shape, mode: str, names: Sequence[str], others: Sequence[str], plan: Plan, rounds: int | None
) -> Found:
    inputs, label = op.make(shape), f"{op.name}, {mode}"
    sides = {name: op.side(inputs, name, mode) for name in dict.fromkeys((*names, *others, *op.peers))}

    def check(results: dict[str, Tensors]) -> None:
        for name in sides:
            check_parity(f"{label}, {shape.name}: {name} against the reference", results[name], results[REFERENCE])

    work = op.work(inputs, mode)
    rate = GemmRate(plan.gemm_sizes) if work.flops else CopyRate(plan.copied_megabytes)
    times = alternate({"machine": rate, **sides}, plan.effort.asked(rounds), check)
    floor = [(work.flops or work.bytes) / each for each in rate.last(len(times.pop("machine")))]
    found = Found(label, floor, times)
    # tiny products don't show the machine's rate, and what only moves bytes may find them in a cache
    for name in sides if work.flops and plan is FULL else ():
        check_floor(f"{label}, {shape.name}: {name}", found.over_floor(name))
    return found


TEXT = (
    "Floor: the op's products at the GEMM rate of the same round; pooling's bytes at the rate of a copy. "
    "Ratios within a round."
)


def _ratios(found: Found, names: Sequence[str]) -> list[Entry]:
    """The reference against every backend, which must not be slower; everything else against the first backend."""
    return [
        entry(f"{found.label}: {side} / {name}", found.times.ratio(side, name), target=">= 1" * (side == REFERENCE))
        for side in found.times
        for name in (names if side == REFERENCE else names[:1])
        if side != name
    ]


def _table(found: Sequence[Found], first: str) -> list[str]:
    lines = []
    for each in found:
        for side, values in each.times.items():
            time, floor = milliseconds("", values), entry("", each.over_floor(side))
            spread = f"{number(time.p10)} to {number(time.p90)}"
            ratio = entry("", each.times.ratio(side, first))
            lines.append([each.label, side, time.cell, spread, number(floor.median, "x"), ratio.cell])
    head = ("op", "side", "time", "p10 to p90, ms", "time / floor", f"time / {first}")
    return markdown_table(head, lines)
