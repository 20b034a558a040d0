"""What a run trains with: the arms of the comparison, and the rows of the paper's ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mta_fast.config import MTAConfig

BASE, FULL, PLACEBO, LONGER = "base", "base + MTA", "base + placebo", "base, time of MTA"
ARMS = (BASE, FULL, PLACEBO, LONGER)
SWEPT = (BASE, FULL, PLACEBO)  # the longer base takes the base's learning rate
RIDGE, BY_SIMILARITY = "ridge start", "layers by CKA"
TENTH, LONG_FULL, LONG_BASE = "MTA at a tenth", "base + MTA, 3 x steps", "base, 3 x steps"

POINTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)  # of a run, where it is measured on the held-out sets
ENDS = (0.9, 1.0)  # likewise, where no curve is drawn
END = (1.0,)  # likewise, of the paper's rows


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables.
        mta: what MTA computes; None: the base loss alone.
        placebo: whether the teacher's token states are permuted within each row before MTA reads them.
        longer: whether it trains as long as the full arm takes, in steps of its own.
        times: the set-up's steps, so many times.
        rate_of: the arm whose learning rate it takes.
        start: of the projections, as ``projection_init``.
    """

    name: str
    mta: MTAConfig | None
    placebo: bool = False
    longer: bool = False
    times: int = 1
    rate_of: str = FULL
    start: str = "default"


@dataclass(frozen=True)
class RunSettings:
    """What a run is told beside its arm."""

    seed: int
    learning_rate: float
    steps: int

    def after(self, points: Sequence[float]) -> list[int]:
        """The steps at these shares of the run."""
        return sorted({round(point * self.steps) for point in points})


def arms(full: MTAConfig) -> dict[str, Arm]:
    """The arms of the comparison."""
    return {
        BASE: Arm(BASE, None, rate_of=BASE),
        FULL: Arm(FULL, full),
        PLACEBO: Arm(PLACEBO, full, placebo=True, rate_of=PLACEBO),
        LONGER: Arm(LONGER, None, longer=True, rate_of=BASE),
    }


def remedies(full: MTAConfig) -> dict[str, Arm]:
    """What might help MTA where it does not; thought of after the comparison, so that they prove nothing."""
    tenth = replace(full, lambda_dsa=full.lambda_dsa / 10, lambda_hid=full.lambda_hid / 10)
    return {
        TENTH: Arm(TENTH, tenth),
        LONG_FULL: Arm(LONG_FULL, full, times=3),
        LONG_BASE: Arm(LONG_BASE, None, times=3, rate_of=BASE),
    }


def ablations(rows: dict[str, Any], full: MTAConfig) -> dict[str, Arm]:
    """The paper's rows, as ``ablation_rows`` makes them, bar those that are arms already, under whatever name."""
    made = {name: MTAConfig.from_dict(mta) for name, mta in rows.items() if mta}
    return {name: Arm(name, config) for name, config in made.items() if config != full}
