"""Pictures of the figures: dots with their spread, and lines over sizes.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; a side has its own marker too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Entry
from mta_fast.packages import require
from mta_fast.pictures import BAND, DPI, INK, SOFT, frame, legend_below, new_figure, plain_ticks

# sides that have a colour of their own wherever they appear; others take the rest in turn
LOOKS = {
    "cpp": ("#0072b2", "o"),
    "reference": ("#d55e00", "s"),
    "compiled reference": ("#cc79a7", "D"),
    "public algorithm": ("#1d2025", "^"),
    "cpp, pairwise": ("#0072b2", "o"),
    "cpp, Gram": ("#56b4e9", "D"),
    "reference, pairwise": ("#d55e00", "s"),
    "reference, Gram": ("#e69f00", "v"),
}
_OTHERS = "#009e73", "#e69f00", "#56b4e9", "#7f7f7f", "#b59f00", "#882255"
OTHER_LOOKS = list(zip(_OTHERS, "vPX*<>", strict=True))


@dataclass(frozen=True)
class Panel:
    """One chart: dots at medians, whiskers from p10 to p90, on a logarithmic axis."""

    title: str
    label: str
    points: Sequence[tuple[str, str, Entry]]  # line, side, figure


def dots(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Charts below each other, one line a figure's name, one colour and marker a side."""
    panels = [panel for panel in panels if panel.points]
    looks = _looks([side for panel in panels for _, side, _ in panel.points])
    lines = [list(dict.fromkeys(line for line, _, _ in panel.points)) for panel in panels]
    most = max(Counter((i, line) for i, panel in enumerate(panels) for line, _, _ in panel.points).values())
    columns, heights = 3, [0.9 + (0.2 + 0.16 * most) * len(names) for names in lines]
    figure = _figure((7.2, 0.4 + sum(heights) + 0.25 * -(-len(looks) // columns)), title)
    charts = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel, names in zip(charts.flat, panels, lines, strict=True):
        _dots(axes, panel, names, looks)
    legend_below(figure, columns)
    figure.savefig(path, format="png", dpi=DPI)


def _dots(axes: Any, panel: Panel, names: list[str], looks: Mapping[str, tuple[str, str]]) -> None:
    for i in range(1, len(names), 2):  # every other line on grey
        axes.axhspan(i - 0.5, i + 0.5, color=BAND, zorder=0)
    for line, side, each in panel.points:
        here = [other for at, other, _ in panel.points if at == line]
        offset = (here.index(side) - (len(here) - 1) / 2) * 0.8 / max(len(here), 2)
        y, (colour, marker) = names.index(line) + offset, looks[side]
        axes.plot([each.p10, each.p90], [y, y], color=colour, linewidth=2, alpha=0.55, zorder=2)
        axes.plot(each.median, y, marker, color=colour, markersize=6, zorder=3, label=side)
    axes.axvline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_xlabel(panel.label)
    axes.tick_params(axis="y", length=0)
    frame(axes, panel.title, "x", ("top", "right", "left"))


@dataclass(frozen=True)
class Curves:
    """One log-log chart: a line of values over the sizes for each side, its exponent in the legend."""

    title: str
    size: str
    unit: str
    sizes: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    marks: Mapping[str, float] = field(default_factory=dict)  # vertical lines by their text


FITTED = 8  # sizes from an eighth of the largest on: below, fixed costs show


def fitted(sizes: Sequence[float]) -> int:
    """How many of the largest sizes an exponent is fitted to."""
    return sum(FITTED * size >= max(sizes) for size in sizes)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line through the logarithms of the ``fitted`` sizes."""
    if len(sizes) < 2 or min(values) <= 0:
        return float("nan")
    last = fitted(sizes)
    return float(np.polyfit(np.log(sizes[-last:]), np.log(values[-last:]), 1)[0])


def curves(charts: Sequence[Sequence[Curves]], path: Path, title: str) -> None:
    """Charts in rows and columns."""
    looks = _looks([side for across in charts for chart in across for side in chart.lines])
    columns = max(map(len, charts))
    figure = _figure((max(6.4, 4.6 * columns), 0.8 + 3.9 * len(charts)), title)
    for cells, across in zip(figure.subplots(len(charts), columns, squeeze=False), charts, strict=True):
        for axes, chart in zip(cells, across, strict=False):
            _curves(axes, chart, looks)
    figure.savefig(path, format="png", dpi=DPI)


def _curves(axes: Any, chart: Curves, looks: Mapping[str, tuple[str, str]]) -> None:
    sizes = chart.sizes
    for side, values in chart.lines.items():
        colour, marker = looks[side]
        slope = exponent(sizes, values)
        shown = "" if np.isnan(slope) else f"  ${chart.size}^{{{slope:.2f}}}$"
        axes.plot(sizes, values, marker=marker, color=colour, markersize=5.5, label=side + shown)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[(len(sizes) - 1) % 2 :: 2] if len(sizes) > 6 else sizes, minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yscale("log")
    low, high = min(map(min, chart.lines.values())) / 1.3, max(map(max, chart.lines.values())) * 1.3
    low /= max(1.0, 8 / (high / low))  # noise alone fills no chart
    legend = 0.1 * (len(chart.lines) + len(chart.marks)) + 0.05  # room above the lines, so that it covers none
    axes.set_ylim(low, high * (high / low) ** legend)
    plain_ticks(axes.yaxis)
    axes.set(xlabel=chart.size, ylabel=chart.unit)
    for i, (text, size) in enumerate(chart.marks.items()):
        look = {"color": INK, "linestyle": (0, (4, 3))} if i else {"color": SOFT, "linestyle": ":"}
        axes.axvline(size, ymax=1 / (1 + legend), linewidth=1.4, label=text, **look)
    axes.legend(loc="upper left", fontsize=8.5, frameon=False)
    frame(axes, chart.title, "both", ("top", "right"))


def _looks(sides: Sequence[str]) -> dict[str, tuple[str, str]]:
    rest = iter(OTHER_LOOKS * len(sides))
    return {side: LOOKS[side] if side in LOOKS else next(rest) for side in dict.fromkeys(sides)}


def _figure(size: tuple[float, float], title: str) -> Any:
    require("matplotlib", "bench", "bench")
    return new_figure(size, title)
