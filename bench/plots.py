"""Pictures of the figures: dots with their spread, and lines over sizes.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; a side has its own marker too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Row
from mta_fast.errors import MissingPackageError

DPI = 120
INK, SOFT, GRID = "#1d2025", "#5c626b", "#d9dce0"
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
OTHER_LOOKS = (
    ("#009e73", "v"),
    ("#e69f00", "P"),
    ("#56b4e9", "X"),
    ("#7f7f7f", "*"),
    ("#b59f00", "<"),
    ("#882255", ">"),
)


@dataclass(frozen=True)
class Point:
    """One figure of a dot chart: its line, its side, and the figure."""

    line: str
    side: str
    row: Row


@dataclass(frozen=True)
class Panel:
    """One chart: dots at medians, whiskers from p10 to p90, on a logarithmic axis."""

    title: str
    label: str
    points: Sequence[Point]


def dots(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Charts side by side, one line a figure's name, one colour and marker a side."""
    panels = [panel for panel in panels if panel.points]
    sides = list(dict.fromkeys(point.side for panel in panels for point in panel.points))
    looks = _looks(sides)
    tallest = max(len(_lines(panel)) for panel in panels)
    most = max(len({p.side for p in panel.points if p.line == line}) for panel in panels for line in _lines(panel))
    width, columns = 7.2 * len(panels), 3 * len(panels)
    height = 1.3 + (0.2 + 0.16 * most) * tallest + 0.25 * -(-len(sides) // columns)
    figure = _figure((width, height))
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _dots(axes, panel, looks)
    handles = [_handle(looks[side], side) for side in sides]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.savefig(path, format="png", dpi=DPI)


def _lines(panel: Panel) -> list[str]:
    return list(dict.fromkeys(point.line for point in panel.points))


def _dots(axes: Any, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    lines = _lines(panel)
    for i in range(1, len(lines), 2):  # every other line on grey
        axes.axhspan(i - 0.5, i + 0.5, color="#f3f4f6", zorder=0)
    for point in panel.points:
        here = [other.side for other in panel.points if other.line == point.line]
        offset = (here.index(point.side) - (len(here) - 1) / 2) * 0.8 / max(len(here), 2)
        y, (colour, marker) = lines.index(point.line) + offset, looks[point.side]
        axes.plot([point.row.p10, point.row.p90], [y, y], color=colour, linewidth=2, alpha=0.55, zorder=2)
        axes.plot(point.row.median, y, marker=marker, color=colour, markersize=6, zorder=3)
    axes.axvline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    rows = [point.row for point in panel.points]
    low = min(1.0, *(row.p10 for row in rows if row.p10)) / 1.15
    high = max(1.0, *(row.p90 for row in rows if row.p90)) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _log_ticks(axes.xaxis, low, high)
    axes.set_xlabel(panel.label)
    axes.set_title(panel.title, fontsize=11, color=INK, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, at 1, 2 and 5 of each decade where they fit."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_locator(_no_ticks())


@dataclass(frozen=True)
class Line:
    """What one side takes at each size."""

    side: str
    sizes: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """One log-log chart: lines over a size, the exponent of each in the legend."""

    title: str
    size: str
    unit: str
    lines: Sequence[Line]
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


def curves(rows: Sequence[Sequence[Curves]], path: Path, title: str) -> None:
    """Charts in rows and columns."""
    sides = list(dict.fromkeys(line.side for row in rows for chart in row for line in chart.lines))
    looks = _looks(sides)
    columns = max(map(len, rows))
    figure = _figure((max(6.4, 4.6 * columns), 0.8 + 3.9 * len(rows)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for cells, row in zip(grid, rows, strict=True):
        for axes, chart in zip(cells, row, strict=False):
            _curves(axes, chart, looks)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.savefig(path, format="png", dpi=DPI)


def _curves(axes: Any, chart: Curves, looks: Mapping[str, tuple[str, str]]) -> None:
    for line in chart.lines:
        colour, marker = looks[line.side]
        slope = exponent(line.sizes, line.values)
        shown = "" if np.isnan(slope) else f"  ${chart.size}^{{{slope:.2f}}}$"
        axes.plot(line.sizes, line.values, marker=marker, color=colour, markersize=5.5, label=line.side + shown)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = chart.lines[0].sizes
    axes.set_xticks(sizes[(len(sizes) - 1) % 2 :: 2] if len(sizes) > 6 else sizes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.set_xlabel(chart.size)
    axes.set_ylabel(chart.unit)
    axes.set_title(chart.title, fontsize=11, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.7)
    values = [value for line in chart.lines for value in line.values]
    low, high = min(values) / 1.3, max(values) * 1.3
    low /= max(1.0, 8 / (high / low))  # noise alone fills no chart
    legend = 0.1 * (len(chart.lines) + len(chart.marks)) + 0.05  # room above the lines, so that it covers none
    high *= (high / low) ** legend
    axes.set_ylim(low, high)
    _log_ticks(axes.yaxis, low, high)
    for i, (text, size) in enumerate(chart.marks.items()):
        look = {"color": INK, "linestyle": (0, (4, 3))} if i else {"color": SOFT, "linestyle": ":"}
        axes.axvline(size, ymax=1 / (1 + legend), linewidth=1.4, label=text, **look)
    axes.legend(loc="upper left", fontsize=8.5, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _looks(sides: Sequence[str]) -> dict[str, tuple[str, str]]:
    rest = iter(OTHER_LOOKS * len(sides))
    return {side: LOOKS[side] if side in LOOKS else next(rest) for side in sides}


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "bench: expected the package matplotlib for pictures, it is not installed; pip install '.[bench]' in the "
            "checkout"
        ) from None
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _handle(look: tuple[str, str], label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=look[0], marker=look[1], linewidth=2, markersize=6, label=label)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
