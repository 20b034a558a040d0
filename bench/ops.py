"""Single ops: every backend, the compiled reference and the op's peers side by side: ``mta-fast bench ops``.

``pytest bench/test_ops.py`` runs the same cases under pytest-benchmark, one side at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import hidden_alignment, importance, plots, pooling, span_pairs
from bench.cases import SHAPES, Op, Shape
from bench.compiled import compiled_reference
from bench.floor import SIZES, CopyRate, GemmRate
from bench.harness import Effort, Tensors, Times, alternate, check_parity
from bench.machine import machine
from bench.report import Report, Row, Section, make_row, markdown_table, number, publish
from bench.sides import REFERENCE, cpu_backends

OPS: tuple[Op, ...] = (importance.OP, pooling.OP, span_pairs.OP, hidden_alignment.OP)


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


def main(backends: Sequence[str] | None, rounds: int | None, out: Path | None, quick: bool = False) -> int:
    """Measure, print, write, and return 1 if a backend is slower than the reference."""
    plan, names = QUICK if quick else FULL, cpu_backends(backends)
    sections, samples, panels = [], {}, []
    with compiled_reference() as compiled:
        beside = [REFERENCE, *([] if quick else [compiled])]
        for shape in plan.shapes:
            found = [_measure(op, shape, mode, names, beside, plan, rounds) for op in OPS for mode in op.modes]
            rows = [row for each in found for row in _rows(each, names)]
            sections.append(Section(f"Times, {shape.name}", (), TEXT, _table(found, names[0])))
            sections.append(Section(f"Ratios, {shape.name}", rows))
            samples |= {f"{each.label}, {shape.name}": each.times.samples | {"floor": each.floor} for each in found}
            panels.append(_panel(shape.name, found))
    figures = {"": lambda path: plots.dots(panels, path, "Single ops, float32")}
    return publish(Report("mta-fast bench ops", machine(widths="768 and 1600"), sections, samples, figures), out)


def _measure(
    op: Op, shape: Shape, mode: str, names: Sequence[str], beside: Sequence[str], plan: Plan, rounds: int | None
) -> Found:
    inputs, label = op.make(shape), f"{op.name}, {mode}"
    sides = {name: op.side(inputs, name, mode) for name in dict.fromkeys((*names, *beside, *op.peers))}

    def check(results: dict[str, Tensors]) -> None:
        for name in sides:
            check_parity(f"{label}, {shape.name}: {name} against the reference", results[name], results[REFERENCE])

    work = op.work(inputs, mode)
    rate = GemmRate(plan.gemm_sizes) if work.flops else CopyRate(plan.copied_megabytes)
    times = alternate({"machine": rate, **sides}, plan.effort.asked(rounds), check)
    floor = [(work.flops or work.bytes) / each for each in rate.last(len(times.samples.pop("machine")))]
    return Found(label, floor, times)


# --- figures -----------------------------------------------------------------------------------------------------

TEXT = (
    "Floor: the op's products at the GEMM rate of the same round; pooling's bytes at the rate of a copy. "
    "Ratios within a round."
)


def _rows(found: Found, names: Sequence[str]) -> list[Row]:
    """The reference against every backend, which must not be slower; everything else against the first backend."""
    rows = []
    for other in found.times.samples:
        for name in names if other == REFERENCE else names[:1]:
            if other != name:
                target, ratios = (1.0 if other == REFERENCE else None), found.times.ratio(other, name)
                rows.append(make_row(f"{found.label}: {other} / {name}", "x", ">=", target, ratios))
    return rows


def _table(found: Sequence[Found], first: str) -> list[str]:
    lines = []
    for each in found:
        for side, values in each.times.samples.items():
            time = make_row("", "ms", "", None, [1e3 * t for t in values])
            over = make_row("", "", "", None, each.over_floor(side))
            ratio = make_row("", "x", "", None, each.times.ratio(side, first))
            spread = f"{number(time.p10, '')} to {number(time.p90, '')}"
            lines.append(
                [each.label, side, number(time.median, "ms"), spread, *(number(r.median, "x") for r in (over, ratio))]
            )
    head = ("op", "side", "time", "p10 to p90, ms", "time / floor", f"time / {first}")
    return markdown_table(head, lines)


def _panel(title: str, found: Sequence[Found]) -> plots.Panel:
    points = [
        plots.Point(each.label, side, make_row("", "x", "", None, each.over_floor(side)))
        for each in found
        for side in each.times.samples
    ]
    return plots.Panel(title, "time / floor (lower is better)", points)
