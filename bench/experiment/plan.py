"""Which runs an experiment consists of, in their order, and which of them are done.

A run is a file of its settings and results; it is made once, whole or not at all. Learning rates come from the sweep:
each arm's is the one whose students are nearest to the teacher on rows that nothing else is done with.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.experiment.arms import ARMS, BASE, FULL, SWEPT, Arm, RunSettings
from bench.experiment.setups import SELECT, Setup
from mta_fast.errors import InputError
from mta_fast.files import write_whole

SWEEP, COMPARISON, ROWS, REMEDIES = "sweep", "comparison", "rows", "remedies"
STAGES = (SWEEP, COMPARISON, ROWS, REMEDIES)


@dataclass(frozen=True)
class Planned:
    """A run of a stage."""

    stage: str
    arm: Arm
    settings: RunSettings

    @property
    def name(self) -> str:
        """Of its file."""
        words = self.arm.name.replace(" + ", "-").replace(", ", "-").replace("+", "plus-").replace(" ", "-")
        rate = f"-{self.settings.learning_rate:g}" if self.stage == SWEEP else ""
        return f"{self.stage}-{words}{rate}-seed-{self.settings.seed}"


class Results:
    """The runs of a set-up in a folder; ``digest``: of the rows that they are made with."""

    def __init__(self, folder: Path, setup: Setup, digest: str = "") -> None:
        self.folder, self.setup, self.digest = folder, setup, digest

    def file(self, planned: Planned) -> Path:
        """Where a run is."""
        return self.folder / "runs" / f"{planned.name}.json"

    def read(self, planned: Planned) -> dict[str, Any] | None:
        """What a run has found; None where it is not made.

        Raises:
            InputError: a run of other settings is in its place.
        """
        file = self.file(planned)
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != self.settings(planned):
            raise InputError(
                f"{file}: expected a run of these settings, it holds one of others; move it away, or give another --out"
            )
        return found

    def settings(self, planned: Planned) -> dict[str, Any]:
        """What decides a run, as its file has it."""
        arm, setup = planned.arm, asdict(self.setup)
        of_runs = {
            name: setup[name] for name in setup if "seeds" not in name and name not in ("learning_rates", "title")
        }
        mta = None if arm.mta is None else arm.mta.to_dict()
        own = {"arm": arm.name, "mta": mta, "placebo": arm.placebo, "start": arm.start, **asdict(planned.settings)}
        made: dict[str, Any] = json.loads(json.dumps({"setup": of_runs, "rows": self.digest, **own}))
        return made

    def write(self, planned: Planned, found: Mapping[str, Any]) -> None:
        """Keep a run."""
        self.file(planned).parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings(planned), **found}
        write_whole(self.file(planned), json.dumps(content, indent=1) + "\n")


# --- the sweep ---------------------------------------------------------------------------------------------------


def sweep(setup: Setup, arms: Mapping[str, Arm]) -> Iterator[Planned]:
    """Every arm at every learning rate, with seeds of its own."""
    for seed in setup.sweep_seeds:
        for rate in setup.learning_rates:
            for name in SWEPT:
                yield Planned(SWEEP, arms[name], RunSettings(seed, rate, setup.steps))


def swept(results: Results, arms: Mapping[str, Arm]) -> dict[str, dict[float, list[float]]]:
    """{arm: {learning rate: forward KL on the rows of the sweep, each seed}}; a run that failed is infinitely bad."""
    found: dict[str, dict[float, list[float]]] = {}
    for planned in sweep(results.setup, arms):
        run = results.read(planned)
        if run is not None:
            value = math.inf if run["error"] else final(run, SELECT, "kl")
            found.setdefault(planned.arm.name, {}).setdefault(planned.settings.learning_rate, []).append(value)
    return found


def best_rates(results: Results, arms: Mapping[str, Arm]) -> dict[str, float]:
    """Each arm's learning rate.

    Raises:
        InputError: the sweep is not done.
    """
    table, seeds = swept(results, arms), len(results.setup.sweep_seeds)
    whole = len(results.setup.learning_rates)
    for name in SWEPT:
        if sum(len(values) == seeds for values in table.get(name, {}).values()) < whole:
            raise InputError(
                f"{results.folder}: expected a finished sweep, {name} lacks runs; --stage sweep makes them"
            )
    return {name: min(rates, key=lambda rate: statistics.fmean(rates[rate])) for name, rates in table.items()}


def slower(results: Results, arms: Mapping[str, Arm]) -> float:
    """How much longer training takes with MTA: the median over pairs of runs of the sweep.

    Raises:
        InputError: no pair of runs did not fail.
    """
    times: dict[str, dict[tuple[int, float], float]] = {BASE: {}, FULL: {}}
    for planned in sweep(results.setup, arms):
        run = results.read(planned)
        if planned.arm.name in times and run is not None and not run["error"]:
            key = (planned.settings.seed, planned.settings.learning_rate)
            times[planned.arm.name][key] = run["train_seconds"]
    ratios = [times[FULL][key] / times[BASE][key] for key in times[BASE] if key in times[FULL]]
    if not ratios:
        raise InputError(f"{results.folder}: expected runs of {BASE} and {FULL} at one learning rate, all failed")
    return max(1.0, statistics.median(ratios))


# --- what is compared --------------------------------------------------------------------------------------------


def comparison(results: Results, arms: Mapping[str, Arm]) -> Iterator[Planned]:
    """Every arm with every seed, at its own learning rate."""
    rates, factor, setup = best_rates(results, arms), slower(results, arms), results.setup
    for seed in setup.seeds:
        for name in ARMS:
            arm = arms[name]
            steps = round(setup.steps * factor) if arm.longer else setup.steps
            yield Planned(COMPARISON, arm, RunSettings(seed, rates[arm.rate_of], steps))


def rows(results: Results, arms: Mapping[str, Arm], extra: Mapping[str, Arm], stage: str = ROWS) -> Iterator[Planned]:
    """The paper's rows and our own; or remedies."""
    rates, setup = best_rates(results, arms), results.setup
    for seed in setup.row_seeds:
        for arm in extra.values():
            yield Planned(stage, arm, RunSettings(seed, rates[arm.rate_of], arm.times * setup.steps))


def final(run: Mapping[str, Any], part: str, figure: str) -> float:
    """A figure of a run at its end."""
    return float(run["points"][-1][part][figure])


def check_finite(points: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a run that diverged.

    Raises:
        InputError: a figure that is NaN or infinite.
    """
    for point in points:
        for part, figures in point.items():
            values = figures.values() if isinstance(figures, Mapping) else [figures]
            if not all(map(math.isfinite, values)):
                raise InputError(f"step {point['step']}: expected finite figures, got {figures} of {part}: it diverged")


Submit = Callable[[Planned], "Future[dict[str, Any]]"]

# --- doing them --------------------------------------------------------------------------------------------------


def attempted(run: Callable[[Planned], dict[str, Any]], planned: Planned) -> dict[str, Any]:
    """What a run finds and how long it took; one that fails or diverges is kept as one that failed."""
    begun = time.monotonic()
    try:
        found = {"error": None, **run(planned)}
        check_finite(found["points"])
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return found | {"seconds": time.monotonic() - begun}


def at_once(run: Callable[[Planned], dict[str, Any]]) -> Submit:
    """Runs one after the other, in this process."""

    def submit(planned: Planned) -> Future[dict[str, Any]]:
        made: Future[dict[str, Any]] = Future()
        made.set_result(attempted(run, planned))
        return made

    return submit


def carry_out(
    results: Results,
    planned: Sequence[Planned],
    submit: Submit,
    deadline: float | None,
    about: Mapping[str, Any],
    jobs: int = 1,
) -> bool:
    """Make the runs that are missing, ``jobs`` at a time.

    Args:
        submit: begins a run, whose result is that of ``attempted``.
        deadline: of ``time.monotonic``; no run begins after it, or that would not end before it. None: none.
        about: code and machine, written into each run.

    Returns:
        Whether all are done.
    """
    found_before = [found for each in planned if (found := results.read(each)) is not None]
    longest = max((found["seconds"] for found in found_before), default=0.0)
    missing = [(number, each) for number, each in enumerate(planned, start=1) if results.read(each) is None]
    going: dict[Future[dict[str, Any]], tuple[int, Planned]] = {}
    while missing or going:
        while missing and len(going) < jobs and (deadline is None or time.monotonic() + longest <= deadline):
            number, each = missing.pop(0)
            print(f"[{number}/{len(planned)}] {each.name} begins", flush=True)
            going[submit(each)] = number, each
        if not going:
            return False
        for done in wait(going, return_when=FIRST_COMPLETED).done:
            number, each = going.pop(done)
            found = done.result()
            longest = max(longest, found["seconds"])
            results.write(each, found | {"about": dict(about)})
            outcome = found["error"] or f"KL outside {final(found, 'outside', 'kl'):.4f}"
            print(f"[{number}/{len(planned)}] {each.name}: {outcome} ({found['seconds']:.0f} s)", flush=True)
    return True
