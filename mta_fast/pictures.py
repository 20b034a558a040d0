"""One look for the package's pictures, on white paper, so that they are read on light and on dark pages alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DPI = 120  # 8 inches fill the width of a page on the web, text as large as the page's
INK, SOFT, GRID, BAND = "#1d2025", "#5c626b", "#d9dce0", "#f3f4f6"
# Okabe and Ito's, which colour-blind eyes tell apart, in the order in which lines take them
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
LINES = (
    (INK, (0, (5, 2))),
    (BLUE, "-"),
    (VERMILLION, (0, (1, 1))),
    (GREEN, (0, (5, 1, 1, 1))),
    (PURPLE, "-"),
    (SKY, "-"),
)


def new_figure(size: tuple[float, float], title: str) -> Any:
    """A figure of matplotlib of a width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, color=INK)
    return figure


def frame(axes: Any, title: str, grid: str = "both", without: Sequence[str] = ("top", "right")) -> None:
    """Title, grid and edges of a chart."""
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.grid(axis=grid, color=GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.spines[[*without]].set_visible(False)


def legend_below(figure: Any, columns: int) -> None:
    """One legend for all charts of a figure, below them, where it covers nothing."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: made for each in drawn for made, label in zip(*each, strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, so many of each decade as fit."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    subs = (1, 2, 3, 5) if high / low < 20 else (1, 2, 5) if high / low < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:,g}")
