"""Pictures of the experiment: how the arms learn, and what lies between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mta_fast.distill.ablation_report import interval_margin
from mta_fast.errors import InputError
from mta_fast.files import save_figure
from mta_fast.pictures import (
    BAND,
    BLUE,
    DPI,
    INK,
    LINES,
    SOFT,
    VERMILLION,
    frame,
    legend_below,
    new_figure,
    plain_ticks,
)

WIDTH, WIDER, SMALL = 8.0, 9.0, 9.5  # inches; points
LOG_FROM = 4.0  # the largest value as a multiple of the smallest from which an axis is logarithmic
Points = Sequence[tuple[int, float]]


# --- learning curves ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """An arm over its seeds: the mean at each step, and its 95 % interval where there are several seeds."""

    label: str
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def learning_curves(
    path: Path,
    curves: Mapping[str, Sequence[Points]],
    *,
    title: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
) -> None:
    """The whole of the runs, and larger their second half.

    Lines are the means over the seeds, bands their 95 % intervals (Student's t); between arms these are not paired, as
    those of ``forest`` are.

    Args:
        path: the PNG.
        curves: by arm, in the order in which colours are taken, (step, value) of each seed.
        title, y_label: in words.
        reference: a name and the value of a horizontal line, in the chart of the whole.

    Raises:
        InputError: an arm without points, or whose seeds were not measured at the same steps.
    """
    arms = [_averaged(arm, seeds) for arm, seeds in curves.items()]
    figure = new_figure((WIDTH, 4.4), title)
    whole, later = figure.subplots(1, 2)
    half = max(arm.steps[-1] for arm in arms) / 2
    for arm, (colour, style) in zip(arms, _looks(len(arms)), strict=True):
        for axes in (whole, later):
            axes.plot(arm.steps, arm.mean, color=colour, linestyle=style, linewidth=1.8, label=arm.label)
            axes.fill_between(arm.steps, arm.low, arm.high, color=colour, alpha=0.18, linewidth=0)
    if reference is not None:
        name, value = reference
        whole.axhline(value, color=SOFT, linewidth=1.2, label=f"{name}: {value:.3g}")
    _fit(whole, arms, reference)
    _fit(later, [_from(half, arm) for arm in arms])
    later.set_xlim(left=half)
    whole.set_ylabel(y_label)
    for axes, words in ((whole, "The whole run"), (later, "Its second half")):
        axes.set_xlabel("step")
        frame(axes, words)
    entries = len(arms) + (reference is not None)
    legend_below(figure, columns=2 if entries == 4 else min(entries, 3))
    save_figure(figure, path, dpi=DPI)


def _averaged(arm: str, seeds: Sequence[Points]) -> _Curve:
    steps = [[step for step, _ in points] for points in seeds]
    if not steps or not steps[0] or any(each != steps[0] for each in steps):
        raise InputError(
            f"curves: expected points of {arm!r} at the same steps with every seed, got "
            f"{' and '.join(str(len(each)) for each in steps) or 'no'} points; leave out runs that did not finish"
        )
    at_step = [[value for _, value in points] for points in zip(*seeds, strict=True)]
    mean = [statistics.fmean(values) for values in at_step]
    margin = [interval_margin(values) or 0.0 for values in at_step]
    label = f"{arm} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    low, high = ([m + sign * half for m, half in zip(mean, margin, strict=True)] for sign in (-1, 1))
    return _Curve(label, steps[0], mean, low, high)


def _from(step: float, arm: _Curve) -> _Curve:
    """What an arm has from a step on; nothing, if it ended before."""
    kept = [i for i, each in enumerate(arm.steps) if each >= step]
    parts = ([values[i] for i in kept] for values in (arm.mean, arm.low, arm.high))
    return _Curve(arm.label, [arm.steps[i] for i in kept], *parts)


def _fit(axes: Any, arms: Sequence[_Curve], reference: tuple[str, float] | None = None) -> None:
    """The height of a chart: all bands that are positive, a logarithmic axis where values spread widely."""
    means = [value for arm in arms for value in arm.mean]
    ends = [value for arm in arms for value in (*arm.low, *arm.high)] + ([reference[1]] if reference else [])
    if min(means) > 0 and max(means) > LOG_FROM * min(means):
        low = min([value for value in ends if value > 0.5 * min(means)] + [min(means)])
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, max(ends) * 1.1)
        plain_ticks(axes.yaxis)
    else:
        room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
        axes.set_ylim(min(ends) - room, max(ends) + room)


def _looks(count: int) -> Iterable[tuple[str, Any]]:
    return (LINES[i % len(LINES)] for i in range(count))


# --- differences -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A line of the forest plot.

    Attributes:
        label: what is compared, such as "base + MTA against base".
        mean: of the differences with the same seed; None where no pair of runs finished.
        low, high: its 95 % interval; there is none of fewer than two pairs.
        n: pairs.
        verdict: in a word or two.
    """

    label: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.n < 2 or self.low is None or self.high is None else (self.low, self.high)


def forest(
    path: Path,
    groups: Sequence[tuple[str, Sequence[Difference]]],
    *,
    title: str = "Differences with the same seed, and their 95 % intervals",
    x_label: str = "the first − the second, nats a token",
    left: str = "the first is better",
    right: str = "the second is better",
) -> None:
    """Differences with their intervals around a line at zero, under the headings of their groups; the numbers beside.

    An interval below zero is drawn blue, one above it red, one that holds it grey and hollow.

    Args:
        path: the PNG.
        groups: a heading and its lines, top to bottom, all in one unit.
        title: in words.
        x_label: what the difference is of, and its unit.
        left, right: what a negative and a positive difference mean; by default of losses, under labels "A - B".

    Raises:
        InputError: no difference at all.
    """
    every = [line for _, lines in groups for line in lines]
    if not every:
        raise InputError("groups: expected at least one difference, got none")
    figure = new_figure((WIDER, 1.8 + 0.3 * (len(every) + len(groups))), title)
    axes = figure.subplots()
    numbers = axes.twinx()
    places, digits = _places(groups), _digits(every)
    for y, (heading, line) in enumerate(places):
        if line is None:
            axes.axhspan(y - 0.5, y + 0.5, color=BAND, zorder=2)
            across = axes.get_yaxis_transform()
            axes.text(0, y, heading, transform=across, va="center", fontsize=SMALL, color=INK, weight="bold", zorder=3)
        else:
            _draw_difference(axes, y, line)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    lines = {y: line for y, (_, line) in enumerate(places) if line is not None}
    axes.set_yticks(list(lines), [line.label for line in lines.values()], fontsize=SMALL)
    numbers.set_yticks(list(lines), [_described(line, digits) for line in lines.values()], fontsize=SMALL)
    for each in (axes, numbers):
        each.set_ylim(len(places) - 0.5, -0.5)
        each.tick_params(axis="y", length=0)
        frame(each, "", "x", ("top", "right", "left"))
    axes.set_xlim(*_limits(every))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(x_label, labelpad=34)
    for place, side, down, words in ((0, "left", 22, f"← {left}"), (1, "right", 37, f"{right} →")):
        axes.annotate(words, (place, 0), (0, -down), "axes fraction", "offset points", ha=side, va="top", color=SOFT)
    save_figure(figure, path, dpi=DPI)


def _places(groups: Sequence[tuple[str, Sequence[Difference]]]) -> list[tuple[str, Difference | None]]:
    """The lines of the picture, headings without a difference among them."""
    made: list[tuple[str, Difference | None]] = []
    for heading, lines in groups:
        made.append((heading, None))
        made.extend((line.label, line) for line in lines)
    return made


def _draw_difference(axes: Any, y: int, line: Difference) -> None:
    if line.mean is None:
        return
    colour, filled = SOFT, False
    if line.interval is not None:
        low, high = line.interval
        filled = low > 0 or high < 0
        colour = (BLUE if high < 0 else VERMILLION) if filled else SOFT
        axes.plot([low, high], [y, y], color=colour, linewidth=2, zorder=2)
    axes.plot(line.mean, y, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=6, zorder=3)


def _described(line: Difference, digits: int) -> str:
    if line.mean is None:
        return f"no pair of runs   {line.verdict}"
    interval = "one pair" if line.interval is None else " … ".join(f"{end:+.{digits}f}" for end in line.interval)
    return f"{line.mean:+.{digits}f} [{interval}]".replace("-", "−") + f"   {line.verdict}, n = {line.n}"


def _digits(lines: Iterable[Difference]) -> int:
    """Decimals that show two digits of the narrowest interval, or of the smallest difference where there is none."""
    sizes = [line.interval[1] - line.interval[0] for line in lines if line.interval is not None]
    sizes = [size for size in sizes if size > 0] or [abs(line.mean) for line in lines if line.mean]
    return min(6, max(0, 1 - math.floor(math.log10(min(sizes))))) if sizes else 3


def _limits(lines: Iterable[Difference]) -> tuple[float, float]:
    """Both sides of zero are in sight, so that the words below have their place."""
    ends = np.array([end for line in lines for end in (line.mean, *(line.interval or ())) if end is not None] or [1.0])
    reach = float(np.abs(ends).max()) or 1.0
    return min(-0.35 * reach, 1.08 * float(ends.min())), max(0.35 * reach, 1.08 * float(ends.max()))
