"""``mta-fast ablate``: the paper's rows, every one trained with every seed, into one table and one picture.

A run is ``mta-fast train`` in a process of its own, so that one that is killed takes no other with it. A run that has
its results.json is done; one that has not goes on from its last checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mta_fast import _yaml
from mta_fast.config import MTAConfig, default_granularity, nearest
from mta_fast.distill.methods.registry import method_type
from mta_fast.distill.models import model_depth
from mta_fast.distill.training.resuming import RUN_FILE
from mta_fast.distill.training.run import STUDENT_FOLDER, read_results
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import INTERRUPTED, TERMINATED, InputError, MissingPackageError
from mta_fast.files import RESULTS_FILE, Kind, atomic_file, check_target, save_figure, write_whole
from mta_fast.interrupt import Terminated, exit_code
from mta_fast.layers import LayerMap
from mta_fast.locks import LOCK_VARIABLE, lock_folder

BASE, FULL, MATCHED = "base", "full", "base, time of full"
LAYER_COUNTS = (1, 2, 3, 4, 5)
LOG_FILE, EVAL_FOLDER, REPORT, REPORT_ENDINGS = "run.log", "eval", "ablation", ("md", "csv", "png")


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
SHOWN_LINES = 12  # of the log of a run that failed
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """A row with a seed."""

    row: str
    seed: int
    folder: Path
    settings: TrainSettings


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


# --- rows --------------------------------------------------------------------------------------------------------


MTASettings = dict[str, Any] | bool  # the ``mta`` part of TrainSettings


def ablation_rows(settings: TrainSettings, student_layers: int, teacher_layers: int) -> dict[str, MTASettings]:
    """The paper's ablations (section 7 of the maths): the ``mta`` part of the settings of every row.

    base, +Hid, +DSA, full; words only and phrases only; no weights; and 1 to 5 layer pairs, spread evenly over the
    student's upper half, words at the first of several, mapped proportionally. Rows that a shallow student has no
    layers for are left out. FDD keeps the layers of the full method in all of them (``ablate``).

    Raises:
        InputError: settings without MTA.
    """
    config = settings.mta_config(student_layers, teacher_layers)
    if config is None:
        raise InputError("mta: expected the settings of the full method, got false; its rows are made from them")
    full = config.to_dict()
    rows: dict[str, MTASettings] = {
        BASE: False,
        "+Hid": full | {"lambda_dsa": 0.0},
        "+DSA": full | {"lambda_hid": 0.0},
        FULL: full,
        "words only": full | {"granularity": ["word"]},
        "phrases only": full | {"granularity": ["phrase"]},
        "no weights": full | {"weighting": "uniform"},
    }
    for count in LAYER_COUNTS:
        pairs = _upper_layers(student_layers, teacher_layers, count)
        if pairs is not None:
            kinds = default_granularity(count, words=int(count > 1))
            made = full | {"layer_pairs": pairs, "granularity": kinds}
            rows[f"{count} layer" + "s" * (count > 1)] = MTAConfig.from_dict(made).to_dict()
    return rows


def _upper_layers(student_layers: int, teacher_layers: int, count: int) -> list[list[int]] | None:
    half = student_layers / 2
    steps = [half + half * i / (count - 1) for i in range(count)] if count > 1 else [float(student_layers)]
    layers = sorted({math.floor(step + 0.5) for step in steps})
    if len(layers) < count:
        return None
    return [list(pair) for pair in LayerMap.proportional(student_layers, teacher_layers, layers)]


# --- the command -------------------------------------------------------------------------------------------------


def ablate(
    settings: TrainSettings,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] = (42,),
    match_time: bool = False,
    eval_data: Sequence[str] = (),
    eval_options: Sequence[str] = (),
) -> int:
    """Train every row with every seed, evaluate the students, and write ablation.md, .csv, .json and .png.

    Args:
        settings: of the full method; its output_dir holds a folder for each row and seed.
        rows: names of ``ablation_rows``; None: all.
        seeds: of training; each run's student starts from the same weights, its projections and data order do not.
        match_time: also train the base row as long as the full one took, seed by seed.
        eval_data: data sets for ROUGE-L, as ``mta-fast eval`` takes them; none: the losses only.
        eval_options: further options of ``mta-fast eval``, as on its command line.

    Returns:
        The exit code: 0; 1 where a run failed (the others went on; its log says why); 130 after
        Ctrl-C, 143 after SIGTERM.

    Raises:
        InputError: settings that don't fit, an unknown row, or a folder with a run of other settings.
    """
    if settings.teacher is None:
        raise InputError("teacher: expected a model, as the rows compare two, got none")
    depths = [model_depth(side.path, **side.options) for side in (settings.student, settings.teacher)]
    known = ablation_rows(settings, *depths)
    chosen = list(known) if rows is None else list(dict.fromkeys(rows))
    for row in chosen:
        if row not in known:
            raise InputError(f"rows: expected some of {', '.join(known)}, got {row!r}{nearest(row, known)}")
    if match_time and not {BASE, FULL} <= set(chosen):
        raise InputError(f"match_time: expected the rows {BASE} and {FULL} among those that are run, got {chosen}")
    settings = _with_own_layers(settings, *depths)
    out = Path(settings.output_dir)
    runs = [_run(settings, out, row, known[row], seed) for seed in seeds for row in chosen]
    matched = [_run(settings, out, MATCHED, False, seed) for seed in seeds] if match_time else []
    with lock_folder(out):
        _check_reports(out)
        for run in (*runs, *matched):
            _claim(run)
        return _train_all(
            out, [*runs, *matched], [*chosen, *([MATCHED] if matched else [])], seeds, eval_data, eval_options
        )


def _train_all(
    out: Path,
    runs: Sequence[Run],
    rows: Sequence[str],
    seeds: Sequence[int],
    eval_data: Sequence[str],
    eval_options: Sequence[str],
) -> int:
    failed: list[Run] = []
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.row}, seed {run.seed}: ", end="", flush=True)
        partner = _folder(out, FULL, run.seed) if run.row == MATCHED else None
        code = _train(run, partner) or _evaluate(run, eval_data, eval_options)
        if code in (INTERRUPTED, TERMINATED):
            print("stopped; the same command goes on")
            return code
        if code:
            failed.append(run)
        print(_outcome(run, code), flush=True)
        report(out, rows, seeds)
    for run in failed:
        print(f"{run.row}, seed {run.seed} failed; the end of {run.folder / LOG_FILE}:", file=sys.stderr)
        print(_tail(run.folder / LOG_FILE), file=sys.stderr)
    print(f"table in {out / REPORT}.md, picture in {out / REPORT}.png")
    return 1 if failed else 0


def _check_reports(out: Path) -> None:
    """See that the reports replace none but earlier ones; they are written together, the JSON file tells whose."""
    json_file = out / f"{REPORT}.json"
    check_target(json_file, REPORT_DATA)
    if not json_file.exists():
        for ending in REPORT_ENDINGS:
            check_target(out / f"{REPORT}.{ending}", NO_REPORT)


def _with_own_layers(settings: TrainSettings, student_layers: int, teacher_layers: int) -> TrainSettings:
    """The base method's layers written down, where it takes MTA's: a row changes one thing, the base row has no MTA."""
    base = settings.base
    if not method_type(base.loss).takes_layer_pairs or "layer_pairs" in base.options:
        return settings
    config = settings.mta_config(student_layers, teacher_layers)
    assert config is not None
    options = {**base.options, "layer_pairs": config.to_dict()["layer_pairs"]}
    return replace(settings, base=replace(base, options=options))


def _folder(out: Path, row: str, seed: int) -> Path:
    return out / row.replace(", ", "-").replace(" ", "-").replace("+", "plus-") / f"seed-{seed}"


def _run(settings: TrainSettings, out: Path, row: str, mta: MTASettings, seed: int) -> Run:
    folder = _folder(out, row, seed)
    training = {"save_total_limit": 1, **settings.training, "seed": seed}
    return Run(row, seed, folder, replace(settings, output_dir=str(folder), mta=mta, training=training))


def _claim(run: Run) -> None:
    """Write the run's settings into its folder, or see that those there are the same."""
    file = run.folder / f"ablation-{RUN_FILE}"
    text = _yaml.dumps(run.settings.to_dict())
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{run.folder}: expected a run of these settings, it holds one of others (see {file.name}); move it away, "
            f"or give another output_dir"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def _train(run: Run, partner: Path | None) -> int:
    if (run.folder / RESULTS_FILE).is_file():
        return 0
    command = ["train", str(run.folder / f"ablation-{RUN_FILE}"), "--resume"]
    if partner is not None:
        command += ["--match-time", str(partner)]
    return _call(command, run.folder / LOG_FILE)


def _evaluate(run: Run, data: Sequence[str], options: Sequence[str]) -> int:
    if not data:
        return 0
    sets = [word for each in data for word in ("--data", each)]
    command = ["eval", str(run.folder / STUDENT_FOLDER), *sets, "--out", str(run.folder / EVAL_FOLDER)]
    return _call([*command, *options], run.folder / LOG_FILE)


def _call(command: Sequence[str], log: Path) -> int:
    """Run a command of mta-fast, its output appended to the log. Ctrl-C and SIGTERM are passed on: it saves, and ends.

    Raises:
        InputError: a process of an earlier command that was killed is still at work in the folder.
    """
    with log.open("ab") as file, lock_folder(log.parent) as lock:
        process = subprocess.Popen(
            [sys.executable, "-m", "mta_fast", *command],
            stdout=file,
            stderr=file,
            pass_fds=(lock,),  # held until this process has ended too
            env={**os.environ, LOCK_VARIABLE: str(lock)},
            start_new_session=True,  # the terminal's Ctrl-C reaches it through us alone
        )
        passed_on: signal.Signals | None = None
        while True:
            try:
                code = process.wait()
                return code if passed_on is None else exit_code(passed_on)
            except KeyboardInterrupt as error:
                passed_on = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
                process.send_signal(passed_on)


def _outcome(run: Run, code: int) -> str:
    if code:
        return f"failed (exit code {code})"
    results = read_results(run.folder)
    return f"{results['steps']:.0f} steps, {results['train_seconds']:.0f} s"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-SHOWN_LINES:])


# --- the report --------------------------------------------------------------------------------------------------


def report(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the table, its data and the picture of the runs that are done, those of earlier commands too."""
    rows, seeds = _with_earlier(out / f"{REPORT}.json", rows, seeds)
    found = {row: {seed: _figures(_folder(out, row, seed)) for seed in seeds} for row in rows}
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
    try:
        from scipy.stats import t
    except ImportError:
        raise MissingPackageError(
            "ablate: expected the package scipy, it is not installed; pip install '.[train]' in the checkout"
        ) from None
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    rows = list(table)
    canvas = Canvas(figsize=(2.5 + 4 * len(names), 1.5 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(canvas)
    for i, (axes, name) in enumerate(
        zip(canvas.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True)
    ):
        for y, row in enumerate(rows):
            figure = table[row][name]
            if figure is not None:
                values = list(figure.values.values())
                axes.plot(values, [y] * len(values), "o", color="#0072b2", alpha=0.5, markersize=5)
                axes.plot([figure.mean] * 2, [y - 0.3, y + 0.3], color="#0072b2", linewidth=2)
        base = table.get(BASE, {}).get(name)
        if base is not None:
            axes.axvline(base.mean, color="#888888", linestyle="--", linewidth=1)
        better = "lower" if name == "eval_base" else "higher"
        axes.set(xlabel=f"{_title(name)[0]} ({better} is better)")
        axes.grid(axis="x", alpha=0.3)
        if i == 0:
            axes.set_yticks(range(len(rows)), rows)
            axes.invert_yaxis()
    canvas.suptitle("Every seed a dot, the mean a line; dashed: base")
    save_figure(canvas, path, dpi=120)
