"""The tables and pictures of an experiment, from the runs that are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.experiment import pictures
from bench.experiment.arms import ARMS, BASE, BY_SIMILARITY, FULL, LONGER, PLACEBO, RIDGE, SWEPT, Arm
from bench.experiment.differences import Difference, detectable, difference
from bench.experiment.plan import Planned, Results, final, sweep, swept
from bench.experiment.setups import HELD_OUT, OUTSIDE, SELECT
from bench.report import Report, Section, entry, markdown_table

PRIMARY = (OUTSIDE, "kl")
SECONDARY = ((HELD_OUT, "kl"), (HELD_OUT, "srkl"), (HELD_OUT, "nll"), (OUTSIDE, "srkl"), (OUTSIDE, "nll"))
TITLES = {"kl": "forward KL", "srkl": "SRKL", "nll": "NLL", OUTSIDE: "out of domain", HELD_OUT: "in domain"}
JUDGED = ((FULL, BASE), (FULL, PLACEBO), (PLACEBO, BASE), (LONGER, BASE), (FULL, LONGER))
# what the paper finds: the first does better than the second
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
    *((f"three layers more than {count}", "3 layers", f"{count} layer" + "s" * (count > 1)) for count in (1, 2, 4, 5)),
)
OWN_ROWS = (("a ridge start helps", RIDGE, FULL), ("layers by CKA help", BY_SIMILARITY, FULL))
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
    comparison: Sequence[Planned],
    row_plan: Sequence[Planned],
    about: Mapping[str, Any],
    command: str,
) -> Report:
    """What there is so far of the sweep, the comparison and the rows."""
    sections = [_sweep(results, arms)]
    figures: dict[str, Any] = {}
    compared, failed = collect(results, comparison)
    if compared:
        sections += _comparison(results, compared)
        figures |= _pictures(results, compared)
    found_rows, failed_rows = collect(results, row_plan)
    if found_rows:
        sections += _rows(found_rows, compared)
    failed += failed_rows
    if failed:
        sections.append(Section("Runs that failed", (), "", markdown_table(["run"], [[each] for each in failed])))
    return Report(command, about, sections, figures=figures)


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
    text = (
        f"Forward KL at the end on {SELECT} rows, which nothing else is done with, for each of the sweep's seeds; the "
        f"best of each arm in bold."
    )
    return Section("Learning rates", (), text, markdown_table(["arm", *(f"{rate:g}" for rate in rates)], lines))


def smallest_difference(results: Results, arms: Mapping[str, Arm]) -> float | None:
    """What so many seeds can find of full against base, by the sweep's runs."""
    values: dict[str, dict[float, dict[int, float]]] = {BASE: {}, FULL: {}}
    for planned in sweep(results.setup, arms):
        run = results.read(planned)
        if planned.arm.name in values and run is not None and not run["error"]:
            by_seed = values[planned.arm.name].setdefault(planned.settings.learning_rate, {})
            by_seed[planned.settings.seed] = final(run, *PRIMARY)
    groups = [
        [values[FULL][rate][seed] - base[seed] for seed in base if seed in values[FULL].get(rate, {})]
        for rate, base in values[BASE].items()
    ]
    return detectable(groups, len(results.setup.seeds))


def _comparison(results: Results, found: Found) -> list[Section]:
    names = [name for name in ARMS if name in found]
    shown = (PRIMARY, *SECONDARY)
    heads = ["arm", "seeds", "learning rate", "steps", *(_title(*each) for each in shown), "last tenth", "s a step"]
    lines = []
    for name in names:
        runs = list(found[name].values())
        cells = [_mean([final(run, *each) for run in runs]) for each in shown]
        settings = runs[0]["settings"]
        slope = statistics.fmean(map(_last_tenth, runs))
        steps = statistics.median(run["step_seconds"] for run in runs)
        row = [name, len(runs), f"{settings['learning_rate']:g}", settings["steps"], *cells]
        lines.append([*row, f"{100 * slope:+.1f} %", f"{steps:.2f}"])
    text = (
        "Means ± deviations over the seeds at the end; last tenth: what the primary figure changes over the last tenth "
        "of the steps, of its value."
    )
    made = [Section("Arms", (), text, markdown_table(heads, lines))]
    for title, chosen in (("Primary", (PRIMARY,)), ("Secondary", SECONDARY)):
        differences = [(each, _differences(figure_of(found, *each))) for each in chosen]
        entries = [
            entry(f"{_title(*each)}: {d.left} - {d.right}", list(d.values), "") for each, of in differences for d in of
        ]
        table = [
            [_title(*each), f"{d.left} - {d.right}", len(d.values), d.cell, d.verdict]
            for each, of in differences
            for d in of
        ]
        heads = ["figure", "difference", "seeds", "mean [95 % interval]", "verdict"]
        text = "Paired by seed, Student's t. Lower is nearer to the teacher."
        made.append(Section(title, entries, text, markdown_table(heads, table)))
    sooner = _sooner(found)
    if sooner is not None:
        text = (
            f"The mean curve of {FULL} reaches the final {_title(*PRIMARY)} of {BASE} after {sooner:.0%} of its steps."
        )
        made.append(Section("Steps", [entry("steps for the base's final loss", [sooner])], text, [text]))
    return made


def _differences(values: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    made = (difference(left, right, values) for left, right in JUDGED)
    return [each for each in made if each is not None]


def _rows(rows: Found, compared: Found) -> list[Section]:
    values = figure_of(rows, *PRIMARY)
    seeds = {seed for by_seed in values.values() for seed in by_seed}
    for name in (BASE, FULL):
        of_arm = figure_of(compared, *PRIMARY).get(name, {})
        values[name] = {seed: value for seed, value in of_arm.items() if seed in seeds}
    lines = []
    for name, by_seed in values.items():
        against = [difference(name, other, values) for other in (BASE, FULL)]
        cells = ["-" if each is None or each.left == each.right else each.cell for each in against]
        lines.append([name, len(by_seed), _mean(list(by_seed.values())), *cells])
    heads = ["row", "seeds", _title(*PRIMARY), f"- {BASE}", f"- {FULL}"]
    judged = []
    for claim, better, worse in (*CLAIMS, *OWN_ROWS):
        found = difference(better, worse, values)
        if found is not None:
            agrees = {f"{better} is lower": "agrees", "undecided": "undecided"}.get(found.verdict, "disagrees")
            judged.append([claim, f"{better} - {worse}", len(found.values), found.cell, agrees])
    claims = markdown_table(["claim", "difference", "seeds", "mean [95 % interval]", "here"], judged)
    entries = [entry(f"{name} - {FULL}", list(d.values), "") for name in rows if (d := difference(name, FULL, values))]
    return [
        Section("Rows", entries, "Each row at the full method's learning rate.", markdown_table(heads, lines)),
        Section("What the paper finds", (), "The last lines are rows of our own.", claims),
    ]


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
    label = f"{found.left} - {found.right}"
    low, high = found.mean - margin, found.mean + margin
    return pictures.Difference(label, found.mean, low, high, len(found.values), found.verdict)


def _sooner(found: Found) -> float | None:
    """The share of its steps after which the mean curve of full is where base's ends."""
    if BASE not in found or FULL not in found:
        return None
    goal = statistics.fmean(final(run, *PRIMARY) for run in found[BASE].values())
    runs = list(found[FULL].values())
    steps = [point["step"] for point in runs[0]["points"]]
    means = [statistics.fmean(run["points"][i][PRIMARY[0]][PRIMARY[1]] for run in runs) for i in range(len(steps))]
    for i in range(1, len(steps)):
        if means[i] <= goal < means[i - 1]:
            part = (means[i - 1] - goal) / (means[i - 1] - means[i])
            return (steps[i - 1] + part * (steps[i] - steps[i - 1])) / steps[-1]
    return None


def _last_tenth(run: Mapping[str, Any]) -> float:
    before, last = (point[PRIMARY[0]][PRIMARY[1]] for point in run["points"][-2:])
    return (last - before) / last


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def _title(part: str, figure: str) -> str:
    return f"{TITLES[figure]}, {TITLES[part]}"
