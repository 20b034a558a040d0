"""Differences between arms with the same seeds: their mean, their 95 % interval, and what that says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mta_fast.distill.ablation_report import interval_margin

POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """left - right over the seeds that both have.

    Attributes:
        values: of each seed; mean: theirs; margin: half the 95 % interval, Student's t; None for one seed.
    """

    left: str
    right: str
    values: Sequence[float]
    margin: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def verdict(self) -> str:
        """Which is lower, where the interval leaves zero out."""
        if self.margin is None or not abs(self.mean) > self.margin:
            return "undecided"
        return f"{self.left if self.mean < 0 else self.right} is lower"

    @property
    def cell(self) -> str:
        interval = "" if self.margin is None else f" [{self.mean - self.margin:+.4f}, {self.mean + self.margin:+.4f}]"
        return f"{self.mean:+.4f}{interval}"


def against(left: str, right: str) -> str:
    """What ``left - right`` is called; arms' names hold plus signs of their own."""
    return f"{left} vs {right}"


def difference(left: str, right: str, found: Mapping[str, Mapping[int, float]]) -> Difference | None:
    """Of {arm: {seed: value}}; None where no seed has both."""
    pairs = [(found[left][seed], found[right][seed]) for seed in found.get(left, {}) if seed in found.get(right, {})]
    if not pairs:
        return None
    values = [one - other for one, other in pairs]
    margin = interval_margin(values) if all(map(math.isfinite, values)) else None
    return Difference(left, right, values, margin)


def detectable(values: Sequence[Sequence[float]], seeds: int) -> float | None:
    """The difference that so many seeds find with a probability of 0.8 at 95 %, two-sided.

    Args:
        values: paired differences of a pilot in groups that share their mean, such as a learning rate's; their
            deviation within the groups is taken. None where no group has two.
    """
    from scipy.stats import t

    squares = sum(len(group) * statistics.pvariance(group) for group in values if len(group) > 1)
    free = sum(len(group) - 1 for group in values if len(group) > 1)
    if not free or seeds < 2:
        return None
    deviation = math.sqrt(squares / free)
    quantiles = float(t.ppf(0.975, seeds - 1)) + float(t.ppf(POWER, seeds - 1))
    return quantiles * deviation / math.sqrt(seeds)
