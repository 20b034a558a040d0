"""``mta-fast ablate``: the paper's rows, every one trained with every seed, into one table and one picture.

A run is ``mta-fast train`` in a process of its own, so that one that is killed takes no other with it. A run that has
its results.json is done; one that has not goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mta_fast import _yaml
from mta_fast.choices import nearest
from mta_fast.config import MTAConfig, default_granularity
from mta_fast.distill.ablation_report import BASE, EVAL_FOLDER, REPORT, check_reports, report, run_folder
from mta_fast.distill.methods.registry import method_type
from mta_fast.distill.models import model_depth
from mta_fast.distill.training.resuming import RUN_FILE
from mta_fast.distill.training.run import STUDENT_FOLDER, read_results
from mta_fast.distill.training.settings import TrainSettings, same_settings
from mta_fast.errors import INTERRUPTED, TERMINATED, InputError
from mta_fast.files import RESULTS_FILE, write_whole
from mta_fast.interrupt import Terminated, exit_code
from mta_fast.layers import LayerMap
from mta_fast.locks import LOCK_VARIABLE, lock_folder

FULL, MATCHED = "full", "base, time of full"
LAYER_COUNTS = (1, 2, 3, 4, 5)
LOG_FILE = "run.log"


SHOWN_LINES = 12  # of the log of a run that failed


@dataclass(frozen=True)
class Run:
    """A row with a seed."""

    row: str
    seed: int
    folder: Path
    settings: TrainSettings


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


OWN_KEYS = ("mta", "training")  # what a row of one's own may change: the base loss is what all are compared by
_NEXT_OVERRIDE = re.compile(r",\s*(?=[A-Za-z_]\w*(?:\.\w+)*=)")


def own_row(text: str, full: TrainSettings) -> tuple[str, TrainSettings]:
    """A row of one's own: "NAME=override[,override]", such as "more Hid=mta.lambda_hid=1", and its settings.

    Args:
        text: overrides of keys under ``mta`` and ``training``, as those of ``mta-fast train``.
        full: the settings of the full row, which the overrides change.

    Raises:
        InputError: another form, another key, the seed (each row has all), or a value that doesn't fit.
    """
    name, equals, changes = text.partition("=")
    name, overrides = name.strip(), [change for change in _NEXT_OVERRIDE.split(changes.strip()) if change]
    if not equals or not overrides or not re.fullmatch(r"\w[\w ,.+-]*", name):
        raise InputError(
            f"row: expected NAME=override, the name of letters, digits, spaces, commas, dots, + and -, such as "
            f"'more Hid=mta.lambda_hid=1', got {text!r}"
        )
    for override in overrides:
        key = override.partition("=")[0]
        if key.split(".")[0] not in OWN_KEYS or key in ("training", "training.seed"):
            raise InputError(
                f"row {name!r}: expected overrides of {', '.join(f'{each}.*' for each in OWN_KEYS)} other than the "
                f"seed, got {override!r}; what all rows share stands in the YAML"
            )
    return name, full.overridden(overrides)


def _check_name(name: str, others: Iterable[str]) -> None:
    """Refuse a row whose runs would lie in another's folders."""
    for other in others:
        if run_folder(Path(), name, 0) == run_folder(Path(), other, 0):
            raise InputError(f"row {name!r}: expected another name, that of {other!r} is taken")


# --- the command -------------------------------------------------------------------------------------------------


def ablate(
    settings: TrainSettings,
    *,
    rows: Sequence[str] | None = None,
    own_rows: Sequence[str] = (),
    seeds: Sequence[int] = (42,),
    match_time: bool = False,
    eval_data: Sequence[str] = (),
    eval_options: Sequence[str] = (),
) -> int:
    """Train every row with every seed, evaluate the students, and write ablation.md, .csv, .json and .png.

    Args:
        settings: of the full method; its output_dir holds a folder for each row and seed.
        rows: names of ``ablation_rows``; None: all.
        own_rows: further ones, as ``own_row`` reads them.
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
    for option, given in (("rows", rows), ("seeds", seeds)):
        if given is not None and not given:
            raise InputError(f"{option}: expected at least one, got none")
    depths = [model_depth(side.path, **side.options) for side in (settings.student, settings.teacher)]
    papers = ablation_rows(settings, *depths)
    settings = _with_own_layers(settings, *depths)
    known = {row: replace(settings, mta=mta) for row, mta in papers.items()}
    chosen = list(known) if rows is None else list(dict.fromkeys(rows))
    for row in chosen:
        if row not in known:
            raise InputError(f"rows: expected some of {', '.join(known)}, got {row!r}{nearest(row, known)}")
    if match_time and not {BASE, FULL} <= set(chosen):
        raise InputError(f"match_time: expected the rows {BASE} and {FULL} among those that are run, got {chosen}")
    out = Path(settings.output_dir)
    for text in own_rows:
        name, made = own_row(text, known[FULL])
        _check_name(name, (*known, MATCHED))
        made.mta_config(*depths)
        known[name] = made
        chosen.append(name)
    runs = [_run(known[row], out, row, seed) for seed in seeds for row in chosen]
    matched = [_run(known[BASE], out, MATCHED, seed) for seed in seeds] if match_time else []
    with lock_folder(out):
        check_reports(out)
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
        partner = run_folder(out, FULL, run.seed) if run.row == MATCHED else None
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


def _with_own_layers(settings: TrainSettings, student_layers: int, teacher_layers: int) -> TrainSettings:
    """The base method's layers written down, where it takes MTA's: a row changes one thing, the base row has no MTA."""
    base = settings.base
    if not method_type(base.loss).takes_layer_pairs or "layer_pairs" in base.options:
        return settings
    config = settings.mta_config(student_layers, teacher_layers)
    assert config is not None
    options = {**base.options, "layer_pairs": config.to_dict()["layer_pairs"]}
    return replace(settings, base=replace(base, options=options))


def _run(settings: TrainSettings, out: Path, row: str, seed: int) -> Run:
    folder = run_folder(out, row, seed)
    training = {"save_total_limit": 1, **settings.training, "seed": seed}
    teacher = settings.teacher
    if teacher is not None and teacher.cache is not None:  # rows read other layers, seeds the same
        teacher = replace(teacher, cache=str(run_folder(Path(teacher.cache), row, seed).parent))
    made = replace(settings, output_dir=str(folder), training=training, teacher=teacher)
    return Run(row, seed, folder, made)


def _claim(run: Run) -> None:
    """Write the run's settings into its folder, or see that those there are the same."""
    file = run.folder / f"ablation-{RUN_FILE}"
    if file.is_file():
        if same_settings(file, run.settings):
            return
        raise InputError(
            f"{run.folder}: expected a run of these settings, it holds one of others (see {file.name}); move it away, "
            f"or give another output_dir"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, _yaml.dumps(run.settings.to_dict()))


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
