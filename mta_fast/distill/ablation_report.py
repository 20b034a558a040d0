"""What ``mta-fast ablate`` reports: figures of every row over its seeds, as a table, a file of values and a picture."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mta_fast.distill.training.run import read_results
from mta_fast.files import RESULTS_FILE, Kind, atomic_file, check_target, save_figure, write_whole
from mta_fast.packages import require
from mta_fast.pictures import BLUE, DPI, SOFT, frame, new_figure

BASE = "base"  # the row that the others are compared with
EVAL_FOLDER, REPORT, REPORT_ENDINGS = "eval", "ablation", ("md", "csv", "png")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """One quantity of a row over its seeds.

    Attributes:
        values: of each seed that finished, by seed.
        mean, std: over the seeds; std with n - 1, None for one seed.
        gain: mean difference to the base row with the same seeds; None for the base row itself.
        margin: half the 95 % interval of that difference, Student's t; None for fewer than two seeds.
    """

    values: Mapping[int, float]
    mean: float
    std: float | None
    gain: float | None
    margin: float | None


def _is_report(file: Path) -> bool:
    """Whether a file is the data of a report: figures by seed by row, none where a run failed."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    rows = list(found.values()) if isinstance(found, dict) else []
    return bool(rows) and all(isinstance(row, dict) and all(isinstance(x, dict) for x in row.values()) for row in rows)


REPORT_DATA = Kind("an earlier ablation", _is_report)
NO_REPORT = Kind("an earlier ablation", lambda file: False)


def check_reports(out: Path) -> None:
    """See that the reports replace none but earlier ones; they are written together, the JSON file tells whose."""
    json_file = out / f"{REPORT}.json"
    check_target(json_file, REPORT_DATA)
    if not json_file.exists():
        for ending in REPORT_ENDINGS:
            check_target(out / f"{REPORT}.{ending}", NO_REPORT)


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Where the run of a row with a seed is."""
    return out / row.replace(", ", "-").replace(" ", "-").replace("+", "plus-") / f"seed-{seed}"


def report(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the table, its data and the picture of the runs that are done, those of earlier commands too."""
    rows, seeds = _with_earlier(out / f"{REPORT}.json", rows, seeds)
    found = {row: {seed: _figures(run_folder(out, row, seed)) for seed in seeds} for row in rows}
    names = list(dict.fromkeys(name for by_seed in found.values() for each in by_seed.values() for name in each))
    table = {row: {name: _figure(found, row, name) for name in names} for row in rows}
    write_whole(out / f"{REPORT}.json", json.dumps(found, indent=2) + "\n")  # first: it tells whose the others are
    write_whole(out / f"{REPORT}.md", _markdown(table, names, seeds))
    _write_csv(out / f"{REPORT}.csv", found)
    _draw(table, [name for name in names if name == "eval_base" or name.startswith("ROUGE-L")], out / f"{REPORT}.png")


def _with_earlier(file: Path, rows: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = sorted({*seeds, *(int(seed) for by_seed in earlier.values() for seed in by_seed)})
    return list(dict.fromkeys([*earlier, *rows])), known


def _figures(folder: Path) -> dict[str, float]:
    """What a finished run has: its results, and ROUGE-L by data set."""
    if not (folder / RESULTS_FILE).is_file():
        return {}
    figures = {name: value for name, value in read_results(folder).items() if name != "eval_loss"}
    evaluated = folder / EVAL_FOLDER / RESULTS_FILE
    if evaluated.is_file():
        for each in json.loads(evaluated.read_text(encoding="utf-8"))["data"]:
            if all(run["error"] is None for run in each["seeds"]):  # a mean of some seeds would pass for that of all
                figures[f"ROUGE-L {each['name']}"] = each["mean"]
    return figures


def _figure(found: Mapping[str, Mapping[int, Mapping[str, float]]], row: str, name: str) -> Figure | None:
    values = {seed: figures[name] for seed, figures in found[row].items() if name in figures}
    if not values:
        return None
    mean = statistics.fmean(values.values())
    std = statistics.stdev(values.values()) if len(values) > 1 else None
    base = {seed: figures[name] for seed, figures in found.get(BASE, {}).items() if name in figures}
    gains = [values[seed] - base[seed] for seed in values if seed in base]
    if row == BASE or not gains:
        return Figure(values, mean, std, None, None)
    return Figure(values, mean, std, statistics.fmean(gains), interval_margin(gains))


def interval_margin(values: Sequence[float]) -> float | None:
    """Half the 95 % confidence interval of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    require("scipy", "train", "ablate")
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


_TITLES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", lambda value: f"{value:.0f}"),
    "train_seconds": ("training, s", lambda value: f"{value:.0f}"),
    "eval_base": ("validation loss (base)", lambda value: f"{value:.4f}"),
    "eval_dsa": ("DSA", lambda value: f"{value:.5f}"),
    "eval_hid": ("Hid", lambda value: f"{value:.4f}"),
}
_JUDGED = ("eval_base", "ROUGE-L")


def _title(name: str) -> tuple[str, Callable[[float], str]]:
    return _TITLES.get(name, (name, lambda value: f"{value:.2f}"))


def _markdown(table: Mapping[str, Mapping[str, Figure | None]], names: Sequence[str], seeds: Sequence[int]) -> str:
    heads = ["row", "seeds"]
    for name in names:
        heads += [_title(name)[0], *(["against base"] if name.startswith(_JUDGED) else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row, figures in table.items():
        done = max((len(figure.values) for figure in figures.values() if figure is not None), default=0)
        cells = [row, f"{done} of {len(seeds)}"]
        for name in names:
            cells += _cells(figures[name], _title(name)[1], judged=name.startswith(_JUDGED))
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"Seeds {', '.join(map(str, seeds))}. Mean ± standard deviation over the seeds; against base: mean difference "
        f"with the same seed, and its 95 % interval (Student's t) in brackets."
    )
    return "\n".join(["## Ablation", "", note, "", *lines]) + "\n"


def _cells(figure: Figure | None, form: Callable[[float], str], *, judged: bool) -> list[str]:
    if figure is None:
        return ["-", "-"] if judged else ["-"]
    value = form(figure.mean) + (f" ± {form(figure.std)}" if figure.std is not None else "")
    if not judged:
        return [value]
    if figure.gain is None:
        return [value, "-"]
    sign = "+" if figure.gain >= 0 else "-"
    gain = sign + form(abs(figure.gain))
    if figure.margin is not None:
        gain += f" [{form(figure.gain - figure.margin)}, {form(figure.gain + figure.margin)}]"
    return [value, gain]


def _write_csv(path: Path, found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "figure", "value"])
        for row, by_seed in found.items():
            for seed, figures in by_seed.items():
                writer.writerows([row, seed, name, value] for name, value in figures.items())


def _draw(table: Mapping[str, Mapping[str, Figure | None]], names: Sequence[str], path: Path) -> None:
    """A panel for each figure: every seed a dot, the mean a line, the base row's mean across."""
    if not names:
        return
    rows = list(table)
    size = (max(8.0, 2.5 + 3 * len(names)), 1.6 + 0.4 * len(rows))
    canvas = new_figure(size, "Every seed a dot, the mean a line; dashed: base")
    for i, (axes, name) in enumerate(
        zip(canvas.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True)
    ):
        for y, row in enumerate(rows):
            figure = table[row][name]
            if figure is not None:
                values = list(figure.values.values())
                axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.5, markersize=5)
                axes.plot([figure.mean] * 2, [y - 0.3, y + 0.3], color=BLUE, linewidth=2)
        base = table.get(BASE, {}).get(name)
        if base is not None:
            axes.axvline(base.mean, color=SOFT, linestyle="--", linewidth=1)
        better = "lower" if name == "eval_base" else "higher"
        axes.set_xlabel(f"{_title(name)[0]}\n({better} is better)")
        frame(axes, "", "x")
        if i == 0:
            axes.set_yticks(range(len(rows)), rows)
            axes.invert_yaxis()
    save_figure(canvas, path, dpi=DPI)
