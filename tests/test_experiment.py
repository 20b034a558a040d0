"""bench/experiment: which runs there are, what is kept of them, and what their differences say."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from bench.experiment import plan, report
from bench.experiment.arms import (
    ARMS,
    BASE,
    FULL,
    LONG_BASE,
    LONG_FULL,
    LONGER,
    PLACEBO,
    SWEPT,
    TENTH,
    Arm,
    RunSettings,
    arms,
    remedies,
)
from bench.experiment.differences import detectable, difference
from bench.experiment.plan import (
    COMPARISON,
    REMEDIES,
    ROWS,
    Results,
    at_once,
    attempted,
    best_rates,
    carry_out,
    comparison,
    rows,
    slower,
    sweep,
)
from bench.experiment.setups import CUT, FRESH, QUICK
from bench.experiment.similarity import ascending, linear_cka
from mta_fast import MTAConfig
from mta_fast.distill.reproduction import ABLATION, AVERAGE
from mta_fast.errors import InputError

KNOWN = arms(MTAConfig(((2, 6), (4, 12)), ("word", "phrase")))
RATE_OF_FULL = 2e-3


def made_up(planned: plan.Planned) -> dict[str, Any]:
    """A run whose figures follow from its arm, rate and seed."""
    settings = planned.settings
    value = {BASE: 2.0, FULL: 1.2, PLACEBO: 1.5}.get(planned.arm.name, 1.8) + 0.01 * settings.seed
    value += 0.1 * (settings.learning_rate != (RATE_OF_FULL if planned.arm.mta is not None else 1e-3))
    figures = {"kl": value, "srkl": value / 2, "nll": value + 1}
    seconds = 10 if planned.arm.mta is None else 12
    points = [{"step": step, "held": figures, "outside": {**figures, "kl": value + 1 - step / 4}} for step in range(5)]
    points[-1]["select"] = figures
    start = f"start of {settings.seed}"
    return {"points": points, "train_seconds": seconds, "start": start, "batches": f"{settings.seed}"}


def all_done(results: Results) -> None:
    for make in (sweep, comparison):
        planned = list(make(results, KNOWN) if make is comparison else make(QUICK, KNOWN))
        assert carry_out(results, planned, at_once(made_up), None, {})


def test_the_runs_of_a_set_up(tmp_path):
    planned = list(sweep(FRESH, KNOWN))
    assert len(planned) == len(FRESH.learning_rates) * len(FRESH.sweep_seeds) * len(SWEPT)
    assert not set(FRESH.sweep_seeds) & set(FRESH.seeds)
    assert not set(CUT.sweep_seeds) & set(CUT.seeds)
    names = [each.name for each in planned]
    assert len(set(names)) == len(names)


def test_each_arm_takes_its_own_learning_rate_and_the_longer_base_more_steps(tmp_path):
    results = Results(tmp_path, QUICK)
    assert carry_out(results, list(sweep(QUICK, KNOWN)), at_once(made_up), None, {})
    assert best_rates(results, KNOWN) == {BASE: 1e-3, FULL: RATE_OF_FULL, PLACEBO: RATE_OF_FULL}
    assert slower(results, KNOWN) == pytest.approx(1.2)
    planned = list(comparison(results, KNOWN))
    by_arm = {each.arm.name: each.settings for each in planned if each.settings.seed == 1}
    assert tuple(by_arm) == ARMS
    assert by_arm[LONGER] == RunSettings(1, 1e-3, round(1.2 * QUICK.steps))
    assert by_arm[FULL] == RunSettings(1, RATE_OF_FULL, QUICK.steps)
    extra = {"+DSA": Arm("+DSA", replace(KNOWN[FULL].mta, lambda_hid=0.0))}
    assert [each.settings.learning_rate for each in rows(results, KNOWN, extra)] == [RATE_OF_FULL]


def test_a_comparison_waits_for_the_whole_sweep(tmp_path):
    results = Results(tmp_path, QUICK)
    carry_out(results, list(sweep(QUICK, KNOWN))[:-1], at_once(made_up), None, {})
    with pytest.raises(InputError, match="finished sweep"):
        list(comparison(results, KNOWN))


def test_runs_are_made_once_and_a_failed_one_stays_a_row(tmp_path):
    results, made = Results(tmp_path, QUICK), []
    planned = list(sweep(QUICK, KNOWN))

    def run(each: plan.Planned) -> dict[str, Any]:
        made.append(each.name)
        if each is planned[1]:
            raise RuntimeError("broken")
        return made_up(each)

    assert carry_out(results, planned, at_once(run), None, {"code": "abc"})
    assert carry_out(results, planned, at_once(run), None, {"code": "abc"})
    assert made == [each.name for each in planned]
    failed = results.read(planned[1])
    assert failed["error"] == "RuntimeError: broken"
    assert "Traceback" in failed["traceback"]
    assert failed["about"] == {"code": "abc"}
    assert planned[1].arm.name == FULL
    assert best_rates(results, KNOWN)[FULL] == RATE_OF_FULL
    text = report.make(results, KNOWN, {}, {}, "bench").markdown()
    assert "inf" in text


def test_a_failed_run_of_the_comparison_is_listed(tmp_path):
    results = Results(tmp_path, QUICK)
    carry_out(results, list(sweep(QUICK, KNOWN)), at_once(made_up), None, {})

    def fail(each: plan.Planned) -> dict[str, Any]:
        raise RuntimeError("no room")

    planned = list(comparison(results, KNOWN))
    carry_out(results, planned[:1], at_once(fail), None, {})
    carry_out(results, planned, at_once(made_up), None, {})
    text = report.make(results, KNOWN, {COMPARISON: planned}, {}, "bench").markdown()
    assert f"{planned[0].name}: RuntimeError: no room" in text


def test_a_run_of_other_settings_is_not_taken(tmp_path):
    results = Results(tmp_path, QUICK)
    planned = list(sweep(QUICK, KNOWN))
    carry_out(results, planned[:1], at_once(made_up), None, {})
    other = Results(tmp_path, replace(QUICK, tokens=8))
    with pytest.raises(InputError, match="one of others"):
        other.read(planned[0])
    assert Results(tmp_path, replace(QUICK, seeds=(1, 2, 3))).read(planned[0]) is not None


def test_runs_go_side_by_side(tmp_path):
    results = Results(tmp_path, QUICK)
    planned = list(sweep(QUICK, KNOWN))
    meeting = threading.Barrier(2)  # of the first two: neither ends before the other has begun

    def run(each: plan.Planned) -> dict[str, Any]:
        if each in planned[:2]:
            meeting.wait()
        return made_up(each)

    with ThreadPoolExecutor(2) as pool:
        assert carry_out(results, planned, partial(pool.submit, attempted, run), None, {"code": "abc"}, jobs=2)
    assert all(results.read(each)["about"] == {"code": "abc"} for each in planned)
    assert all(results.read(each)["seconds"] >= 0 for each in planned)


def test_nothing_begins_after_the_deadline(tmp_path):
    planned = list(sweep(QUICK, KNOWN))
    assert not carry_out(Results(tmp_path, QUICK), planned, at_once(made_up), -math.inf, {})
    assert not (tmp_path / "runs").exists()


def test_differences_are_paired_by_seed():
    found = {"a": {1: 1.0, 2: 2.0, 3: 4.0, 9: 0.0}, "b": {1: 1.5, 2: 2.4, 3: 4.6}}
    made = difference("a", "b", found)
    assert made.values == pytest.approx([-0.5, -0.4, -0.6])
    assert made.margin == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)  # t(0.975, 2)
    assert made.verdict == "a is lower"
    assert difference("b", "a", found).verdict == "a is lower"
    assert difference("a", "b", {"a": {1: 1.0, 2: 0.0}, "b": {1: 0.0, 2: 1.0}}).verdict == "undecided"
    assert difference("a", "c", found) is None


def test_the_smallest_difference_that_is_found_most_of_the_time():
    deviation, seeds = 0.1, 8
    limit = detectable([[0.5 - deviation / math.sqrt(2), 0.5 + deviation / math.sqrt(2)]], seeds)
    draws = np.random.default_rng(0).normal(limit, deviation, (20_000, seeds))
    margin = 2.3646 * draws.std(1, ddof=1) / math.sqrt(seeds)  # t(0.975, 7)
    assert (draws.mean(1) > margin).mean() == pytest.approx(0.8, abs=0.02)
    assert detectable([[1.0]], seeds) is None


def test_the_report_says_what_was_found(tmp_path):
    results = Results(tmp_path, QUICK)
    all_done(results)
    planned = list(comparison(results, KNOWN))
    extra = {"+DSA": Arm("+DSA", KNOWN[FULL].mta), "+Hid": Arm("+Hid", KNOWN[FULL].mta)}
    of_rows = list(rows(results, KNOWN, extra))
    carry_out(results, of_rows, at_once(made_up), None, {})
    tried = list(rows(results, KNOWN, remedies(KNOWN[FULL].mta), REMEDIES))
    assert {each.arm.name: each.settings.steps for each in tried} == {
        TENTH: QUICK.steps, LONG_FULL: 3 * QUICK.steps, LONG_BASE: 3 * QUICK.steps,
    }  # fmt: skip
    carry_out(results, tried, at_once(made_up), None, {"processor": "a card", "code": "abc"})
    made = report.make(results, KNOWN, {COMPARISON: planned, ROWS: of_rows, REMEDIES: tried}, {}, "bench")
    text = made.markdown()
    assert f"| forward KL, out of domain | {LONG_FULL} vs {LONG_BASE} | 1 | " in text
    assert "| remedies | a card | - | abc | 3 | " in text
    assert (
        "| forward KL, out of domain | base + MTA vs base | 2 | -0.8000 [-0.8000, -0.8000] | base + MTA is lower |"
        in text
    )
    assert "| DSA more than Hid | +DSA vs +Hid | +0.37 | 1 | +0.0000 | undecided |" in text
    table = text.split("## Arms")[1].split("## ")[0]
    arms_of = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| base")}
    assert arms_of[FULL].endswith("| 20% |")  # 2.2 - step / 4 falls to base's 2.0 at 0.8 of four steps
    assert arms_of[BASE].endswith("| 100% |")
    paper = ABLATION["full"][AVERAGE] - ABLATION["no weights"][AVERAGE]
    assert f"| weights matter | base + MTA vs no weights | {paper:+.2f} | 0 | - | not run |" in text
    assert "can't be compared" not in text
    for ending, draw in made.figures.items():
        draw(tmp_path / f"{ending}.png")
        assert (tmp_path / f"{ending}.png").stat().st_size > 1000


def test_rows_without_a_comparison(tmp_path):
    results = Results(tmp_path, QUICK)
    carry_out(results, list(sweep(QUICK, KNOWN)), at_once(made_up), None, {})
    of_rows = list(rows(results, KNOWN, {"+DSA": Arm("+DSA", KNOWN[FULL].mta), "+Hid": Arm("+Hid", KNOWN[FULL].mta)}))
    carry_out(results, of_rows, at_once(made_up), None, {})
    text = report.make(results, KNOWN, {ROWS: of_rows}, {}, "bench").markdown()
    assert "| DSA more than Hid | +DSA vs +Hid | +0.37 | 1 | +0.0000 | undecided |" in text
    assert "| DSA helps | +DSA vs base | " in text


def test_a_run_that_diverged_is_one_that_failed(tmp_path):
    results, planned = Results(tmp_path, QUICK), list(sweep(QUICK, KNOWN))

    def diverge(each: plan.Planned) -> dict[str, Any]:
        found = made_up(each)
        found["points"][2]["held"] = {**found["points"][2]["held"], "nll": math.nan}
        return found

    carry_out(results, planned[:1], at_once(diverge), None, {})
    assert "step 2: expected finite figures" in results.read(planned[0])["error"]


def test_nothing_is_decided_by_what_is_no_number():
    assert difference("a", "b", {"a": {1: math.nan, 2: 1.0}, "b": {1: 1.0, 2: 2.0}}).verdict == "undecided"


def test_a_curve_that_rises_again_has_not_reached_its_goal():
    def runs(*values: float) -> list[dict[str, Any]]:
        return [{"points": [{"step": step, "outside": {"kl": value}} for step, value in enumerate(values)]}]

    assert report._reached(runs(6, 4, 7, 5), 5) == pytest.approx(1)
    assert report._reached(runs(6, 4, 3, 3), 5) == pytest.approx(0.5 / 3)
    assert report._reached(runs(6, 4, 7, 6), 5) is None


def test_arms_of_other_batches_are_pointed_out(tmp_path):
    results = Results(tmp_path, QUICK)
    carry_out(results, list(sweep(QUICK, KNOWN)), at_once(made_up), None, {})
    planned = list(comparison(results, KNOWN))

    def other(each: plan.Planned) -> dict[str, Any]:
        return made_up(each) | ({"batches": "others"} if each.name == "comparison-base-MTA-seed-2" else {})

    carry_out(results, planned, at_once(other), None, {})
    text = report.make(results, KNOWN, {COMPARISON: planned}, {}, "bench").markdown()
    assert "seed 2: the arms have different batches" in text
    assert "seed 1" not in text


def test_similar_states_whatever_their_rotation_and_scale():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 6, generator=generator)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert linear_cka(states, 3 * states @ turned + 5) == pytest.approx(1)
    assert linear_cka(states, torch.randn(200, 6, generator=generator)) < 0.2


def test_the_best_ascending_layers_are_those_of_all_choices():
    table = torch.rand(3, 7, generator=torch.Generator().manual_seed(3))
    table[0, 6] = 2  # the most similar of the first is of no use
    choices = itertools.combinations(range(7), 3)
    best = max(choices, key=lambda places: sum(float(table[i, place]) for i, place in enumerate(places)))
    assert ascending(table) == list(best)
