"""How times are taken: sides in turn within each round, nothing before they agree.

A noisy machine slows whole stretches of time down. Compared sides are therefore called one after the other in every
round (A B, then B A, so that none is always first), and what is reported is the median over the rounds of the
ratios within a round. Work whose result is wrong is never timed.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Call = Callable[[], Any]
Tensors = Sequence[Tensor]

SAMPLE = 0.01  # seconds: shorter calls are repeated within a sample
MOST_REPEATS = 200
PARITY = 1e-5  # relative difference of every compared tensor's norm, float32


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``rounds`` at most; from ``least`` rounds on none that would end after ``seconds``."""

    rounds: int
    seconds: float = math.inf
    least: int = 2

    def asked(self, rounds: int | None) -> Effort:
        """Exactly that many rounds where they are asked for."""
        return self if rounds is None else Effort(rounds)


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """How long a call takes, letting go of its result included."""
    begun = time.perf_counter()
    run(*args)
    return time.perf_counter() - begun


class Times(dict[str, list[float]]):
    """Seconds a call of each side, round by round."""

    def ratio(self, side: str, other: str) -> list[float]:
        """side / other of each round."""
        return [a / b for a, b in zip(self[side], self[other], strict=True)]


def alternate(
    sides: Mapping[str, Call],
    effort: Effort,
    check: Callable[[dict[str, Any]], None] | None = None,
    *,
    warm_up: bool = True,
    collect: bool = False,
) -> Times:
    """Time the sides in turn: in their order in even rounds, backwards in odd ones.

    Args:
        sides: what to call. One with an attribute ``keeps_its_own`` is called once in each round.
        effort: how many rounds.
        check: gets what the warm-up calls returned, by side, and ends the run where it is wrong.
        warm_up: whether each side is called once before; without, short calls do not repeat and nothing is checked.
        collect: whether Python may collect garbage in between, as it does where a call makes many objects.
    """
    results: dict[str, Any] = {}
    repeats = dict.fromkeys(sides, 1)
    for name, call in sides.items() if warm_up else ():
        once = seconds(lambda name=name, call=call: results.update({name: call()}))
        if check is None:
            results.clear()
        if not hasattr(call, "keeps_its_own"):
            repeats[name] = max(1, min(MOST_REPEATS, round(SAMPLE / once)))
    if check is not None:
        check(results)
    results.clear()
    times = Times({name: [] for name in sides})
    collecting = gc.isenabled()
    gc.collect()
    if not collect:
        gc.disable()
    begun, order = time.perf_counter(), list(sides)
    try:
        for done in range(effort.rounds):
            spent = time.perf_counter() - begun
            if done >= effort.least and spent + spent / done > effort.seconds:
                break
            for name in order if done % 2 == 0 else reversed(order):
                count, call = repeats[name], sides[name]
                times[name].append(seconds(_repeat, call, count) / count)
    finally:
        if collecting:
            gc.enable()
    return times


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def check_parity(what: str, made: Tensors, expected: Tensors, limit: float = PARITY) -> None:
    """End the run, before anything is timed, unless every tensor is the expected one to ``limit``.

    Args:
        limit: largest |made - expected| / |expected| (where expected is 0: largest |made|).
    """
    if len(made) != len(expected):
        sys.exit(f"bench: {what}: expected {len(expected)} tensors to compare, got {len(made)}; nothing timed")
    for mine, other in zip(made, expected, strict=True):
        scale = other.double().norm().item() or 1.0
        error = (mine.double() - other.double()).norm().item() / scale
        if not error < limit:
            sys.exit(f"bench: {what}: expected parity below {limit:g}, got {error:g}; nothing timed")


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, from order statistics: it assumes no distribution."""
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    below = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)
    return ordered[below], ordered[n - 1 - below]
