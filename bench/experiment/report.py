"""The tables and pictures of an experiment, from the runs that are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.experiment import pictures
from bench.experiment.arms import (
    ARMS,
    BASE,
    BY_SIMILARITY,
    FULL,
    LONG_BASE,
    LONG_FULL,
    LONGER,
    PLACEBO,
    RIDGE,
    SWEPT,
    TENTH,
    Arm,
)
from bench.experiment.differences import Difference, against, detectable, difference
from bench.experiment.plan import (
    COMPARISON,
    REMEDIES,
    ROWS,
    SWEEP,
    Planned,
    Results,
    best_rates,
    final,
    sweep,
    swept,
)
from bench.experiment.setups import HELD_OUT, OUTSIDE, SELECT
from bench.report import Report, Section, entry, markdown_table
from mta_fast.distill.reproduction import ABLATION, AVERAGE

PRIMARY = (OUTSIDE, "kl")
SECONDARY = ((HELD_OUT, "kl"), (HELD_OUT, "srkl"), (HELD_OUT, "nll"), (OUTSIDE, "srkl"), (OUTSIDE, "nll"))
TITLES = {"kl": "forward KL", "srkl": "SRKL", "nll": "NLL", OUTSIDE: "out of domain", HELD_OUT: "in domain"}
JUDGED = ((FULL, BASE), (FULL, PLACEBO), (PLACEBO, BASE), (LONGER, BASE), (FULL, LONGER))
# what the paper finds: the first does better than the second; the rows' names are ``reproduction.ABLATION``'s
CLAIMS = (
    ("MTA helps", FULL, BASE),
    ("DSA helps", "+DSA", BASE),
    ("Hid helps", "+Hid", BASE),
    ("DSA more than Hid", "+DSA", "+Hid"),
    ("both more than DSA", FULL, "+DSA"),
    ("both more than Hid", FULL, "+Hid"),
    ("mixed more than words", FULL, "words only"),
    ("mixed more than phrases", FULL, "phrases only"),
    ("weights matter", FULL, "no weights"),
    *((f"three layers more than {count}", FULL, f"{count} layer" + "s" * (count > 1)) for count in (1, 2, 4, 5)),
)
OWN_ROWS = (("a ridge start helps", RIDGE, FULL), ("layers by CKA help", BY_SIMILARITY, FULL))
TRIED = ((TENTH, BASE), (TENTH, FULL), (LONG_FULL, LONG_BASE), (LONG_BASE, BASE))
Found = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> run


def collect(results: Results, planned: Iterable[Planned]) -> tuple[Found, list[str]]:
    """The runs that are there by arm and seed, and those that failed, in words."""
    found: Found = {}
    failed = []
    for each in planned:
        run = results.read(each)
        if run is None:
            continue
        if run["error"]:
            failed.append(f"{each.name}: {run['error']}")
        else:
            found.setdefault(each.arm.name, {})[each.settings.seed] = run
    return found, failed


def figure_of(found: Found, part: str, figure: str) -> dict[str, dict[int, float]]:
    """{arm: {seed: value at the end}}."""
    return {arm: {seed: final(run, part, figure) for seed, run in runs.items()} for arm, runs in found.items()}


def make(
    results: Results,
    arms: Mapping[str, Arm],
    planned: Mapping[str, Sequence[Planned]],
    about: Mapping[str, Any],
    command: str,
) -> Report:
    """What there is so far of the sweep and the stages that are planned."""
    sections = [_sweep(results, arms)]
    figures: dict[str, Any] = {}
    compared, failed = collect(results, planned.get(COMPARISON, ()))
    if compared:
        sections += _comparison(results, arms, compared)
        figures |= _pictures(results, compared)
    found_rows, failed_rows = collect(results, planned.get(ROWS, ()))
    if found_rows:
        sections += _rows(found_rows, compared)
    tried, failed_remedies = collect(results, planned.get(REMEDIES, ()))
    if tried:
        sections.append(_remedies(tried, compared))
    failed += [*failed_rows, *failed_remedies, *_unlike(compared)]
    sections.append(_made(results, {SWEEP: list(sweep(results.setup, arms)), **planned}))
    if failed:
        lines = markdown_table(["run"], [[each] for each in failed])
        sections.append(Section("Runs that failed or can't be compared", (), "", lines))
    return Report(command, about, sections, figures=figures)


def _made(results: Results, planned: Mapping[str, Sequence[Planned]]) -> Section:
    """Where the runs were made, of which code, and how long they took."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for stage, runs in planned.items():
        for run in filter(None, map(results.read, runs)):
            about = run.get("about", {})
            place = str(about.get("gpu", about.get("processor", "-")))
            key = stage, place, str(about.get("torch", "-")), str(about.get("code", "-"))
            groups.setdefault(key, []).append(run["seconds"])
    lines = [[*key, len(seconds), f"{sum(seconds) / 60:.0f}"] for key, seconds in groups.items()]
    heads = ["stage", "on", "torch", "code", "runs", "minutes, summed over runs"]
    text = "Runs go side by side: the minutes of a stage are fewer."
    return Section("Where the runs were made", (), text, markdown_table(heads, lines))


def _sweep(results: Results, arms: Mapping[str, Arm]) -> Section:
    """Learning rates, and what a comparison of so many seeds can find."""
    table, rates = swept(results, arms), results.setup.learning_rates
    lines = []
    for name in SWEPT:
        row = table.get(name, {})
        means = {rate: statistics.fmean(values) for rate, values in row.items()}
        best = min(means, key=lambda rate: means[rate]) if means else None
        cells = []
        for rate in rates:
            text = " / ".join(f"{value:.3f}" for value in row.get(rate, [])) or "-"
            cells.append(f"**{text}**" if rate == best else text)
        lines.append([name, *cells])
        if best in (rates[0], rates[-1]):
            lines[-1][0] = f"{name} (best at the end of the grid)"
    text = (
        f"Forward KL at the end on {SELECT} rows, which nothing else is done with, for each of the sweep's seeds; the "
        f"best of each arm in bold."
    )
    return Section("Learning rates", (), text, markdown_table(["arm", *(f"{rate:g}" for rate in rates)], lines))


def smallest_difference(results: Results, arms: Mapping[str, Arm], left: str, right: str) -> float | None:
    """What so many seeds can find of one arm against another: by pairs of the sweep near either one's best rate."""
    values: dict[str, dict[float, dict[int, float]]] = {left: {}, right: {}}
    for planned in sweep(results.setup, arms):
        run = results.read(planned)
        if planned.arm.name in values and run is not None and not run["error"]:
            by_seed = values[planned.arm.name].setdefault(planned.settings.learning_rate, {})
            by_seed[planned.settings.seed] = final(run, *PRIMARY)
    rates, best = list(results.setup.learning_rates), best_rates(results, arms)
    near = {place + step for arm in (left, right) for place in (rates.index(best[arm]),) for step in (-1, 0, 1)}
    groups = [
        [value - values[right][rate][seed] for seed, value in by_seed.items() if seed in values[right].get(rate, {})]
        for rate, by_seed in values[left].items()
        if rates.index(rate) in near
    ]
    return detectable(groups, len(results.setup.seeds))


def _comparison(results: Results, arms: Mapping[str, Arm], found: Found) -> list[Section]:
    names = [name for name in ARMS if name in found]
    shown = (PRIMARY, *SECONDARY)
    heads = ["arm", "seeds", "learning rate", "steps", *(_title(*each) for each in shown), "last tenth", "s a step"]
    goal = statistics.fmean(figure_of(found, *PRIMARY)[BASE].values()) if BASE in found else None
    heads.append(f"reaches {BASE}'s")
    lines = []
    for name in names:
        runs = list(found[name].values())
        cells = [_mean([final(run, *each) for run in runs]) for each in shown]
        settings = runs[0]["settings"]
        slope = statistics.fmean(map(_last_tenth, runs))
        steps = statistics.median(run["train_seconds"] / run["settings"]["steps"] for run in runs)
        reached = None if goal is None else _reached(runs, goal)
        row = [name, len(runs), f"{settings['learning_rate']:g}", settings["steps"], *cells]
        stays = "never" if reached is None else f"{reached:.0%}"
        lines.append([*row, f"{100 * slope:+.1f} %", f"{steps:.2f}", stays])
    text = (
        "Means ± deviations over the seeds at the end. Last tenth: what the primary figure changes over the last tenth "
        "of the steps, of its value; the learning rate falls to 0 there. Reaches: the share of its steps from which on "
        "the arm's mean curve stays at or below the final figure of the base."
    )
    made = [Section("Arms", (), text, markdown_table(heads, lines))]
    for title, chosen in (("Primary", (PRIMARY,)), ("Secondary", SECONDARY)):
        differences = [(each, _differences(figure_of(found, *each))) for each in chosen]
        entries = [
            entry(f"{_title(*each)}: {against(d.left, d.right)}", list(d.values), "")
            for each, of in differences
            for d in of
        ]
        made.append(Section(title, entries, PAIRED, _table(differences)))
    lines = [
        [against(left, right), "-" if limit is None else f"{limit:.4f}"]
        for left, right in JUDGED[:2]
        for limit in [smallest_difference(results, arms, left, right)]
    ]
    text = f"{_title(*PRIMARY)}: what {len(results.setup.seeds)} seeds find four times of five, by the sweep's runs."
    made.append(Section("Detectable", (), text, markdown_table(["difference", "from"], lines)))
    return made


def _differences(
    values: Mapping[str, Mapping[int, float]], arms: Sequence[tuple[str, str]] = JUDGED
) -> list[Difference]:
    made = (difference(left, right, values) for left, right in arms)
    return [each for each in made if each is not None]


PAIRED = "Paired by seed, Student's t. Lower is nearer to the teacher."


def _table(differences: Sequence[tuple[tuple[str, str], Sequence[Difference]]]) -> list[str]:
    """A line for each difference of each figure."""
    heads = ["figure", "difference", "seeds", "mean [95 % interval]", "verdict"]
    lines = [
        [_title(*each), against(d.left, d.right), len(d.values), d.cell, d.verdict]
        for each, of in differences
        for d in of
    ]
    return markdown_table(heads, lines)


def _rows(rows: Found, compared: Found) -> list[Section]:
    values = figure_of(rows, *PRIMARY)
    seeds = {seed for by_seed in values.values() for seed in by_seed}
    for name in (BASE, FULL):
        of_arm = figure_of(compared, *PRIMARY).get(name, {})
        shared = {seed: value for seed, value in of_arm.items() if seed in seeds}
        values |= {name: shared} if shared else {}
    lines = []
    for name, by_seed in values.items():
        to = [difference(name, other, values) for other in (BASE, FULL)]
        cells = ["-" if each is None or each.left == each.right else each.cell for each in to]
        lines.append([name, len(by_seed), _mean(list(by_seed.values())), *cells])
    heads = ["row", "seeds", _title(*PRIMARY), f"- {BASE}", f"- {FULL}"]
    heads_of_claims = ["claim", "difference", "paper, ROUGE-L", "seeds", "mean [95 % interval]", "here"]
    claims = markdown_table(heads_of_claims, [_judged(*claim, values) for claim in CLAIMS])
    own = markdown_table(heads_of_claims, [_judged(*claim, values) for claim in OWN_ROWS])
    entries = [entry(against(name, FULL), list(d.values), "") for name in rows if (d := difference(name, FULL, values))]
    return [
        Section("Rows", entries, "Each row at the full method's learning rate.", markdown_table(heads, lines)),
        Section("What the paper finds", (), CLAIMS_TEXT, claims),
        Section("Rows of our own", (), "", own),
    ]


def _remedies(tried: Found, compared: Found) -> Section:
    """What was thought of after the comparison, beside its arms."""
    differences = [
        (each, _differences(figure_of(compared, *each) | figure_of(tried, *each), TRIED))
        for each in (PRIMARY, *SECONDARY)
    ]
    text = f"Exploratory: thought of after the comparison was seen. {PAIRED}"
    return Section("Remedies", (), text, _table(differences))


CLAIMS_TEXT = (
    "Here lower is better, in the paper higher. Rows are at the full method's learning rate, the base at its own. Of "
    "other numbers of layers than three the paper's figures are not known."
)


def _judged(claim: str, better: str, worse: str, values: Mapping[str, Mapping[int, float]]) -> list[Any]:
    """A line of the claims: the paper's difference, ours, and whether they agree."""
    names = {FULL: "full", BASE: "base"}
    scores = [ABLATION.get(names.get(name, name), {}).get(AVERAGE) for name in (better, worse)]
    paper = "-" if None in scores else f"{scores[0] - scores[1]:+.2f}"  # type: ignore[operator]  # neither is None
    found = difference(better, worse, values)
    if found is None:
        return [claim, against(better, worse), paper, 0, "-", "not run"]
    agrees = {f"{better} is lower": "agrees", "undecided": "undecided"}.get(found.verdict, "disagrees")
    return [claim, against(better, worse), paper, len(found.values), found.cell, agrees]


def _pictures(results: Results, found: Found) -> dict[str, Any]:
    curves = {
        name: [[(point["step"], point[PRIMARY[0]][PRIMARY[1]]) for point in run["points"]] for run in runs.values()]
        for name, runs in found.items()
    }
    title = f"{results.setup.title}: {_title(*PRIMARY)}"
    groups = []
    for each in (PRIMARY, *SECONDARY):
        of = _differences(figure_of(found, *each))
        groups.append((_title(*each), [_shown(d) for d in of]))
    return {
        "": partial(_draw_curves, curves, title),
        "_forest": partial(_draw_forest, groups),
    }


def _draw_curves(curves: Mapping[str, Any], title: str, path: Path) -> None:
    pictures.learning_curves(path, curves, title=title, y_label=_title(*PRIMARY))


def _draw_forest(groups: Sequence[Any], path: Path) -> None:
    pictures.forest(path, groups)


def _shown(found: Difference) -> pictures.Difference:
    margin = found.margin or 0.0
    label = against(found.left, found.right)
    low, high = found.mean - margin, found.mean + margin
    return pictures.Difference(label, found.mean, low, high, len(found.values), found.verdict)


def _reached(runs: Sequence[Mapping[str, Any]], goal: float) -> float | None:
    """The share of the steps from which on the mean curve stays at or below a value; None: its end is above."""
    steps = [point["step"] for point in runs[0]["points"]]
    means = [statistics.fmean(run["points"][i][PRIMARY[0]][PRIMARY[1]] for run in runs) for i in range(len(steps))]
    above = [i for i, mean in enumerate(means) if mean > goal]
    if not above:
        return 0.0
    i = above[-1]
    if i == len(means) - 1:
        return None
    part = (means[i] - goal) / (means[i] - means[i + 1])
    return float((steps[i] + part * (steps[i + 1] - steps[i])) / steps[-1])


def _unlike(found: Found) -> list[str]:
    """Seeds whose arms did not start alike, or did not see the same batches in as many steps."""
    told = []
    for seed in sorted({seed for runs in found.values() for seed in runs}):
        runs = [found[arm][seed] for arm in (BASE, FULL, PLACEBO) if seed in found.get(arm, {})]
        for what in ("start", "batches"):
            if len({run[what] for run in runs}) > 1:
                told.append(f"seed {seed}: the arms have different {what}")
    return told


def _last_tenth(run: Mapping[str, Any]) -> float:
    before, last = (point[PRIMARY[0]][PRIMARY[1]] for point in run["points"][-2:])
    return (last - before) / last


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def _title(part: str, figure: str) -> str:
    return f"{TITLES[figure]}, {TITLES[part]}"
