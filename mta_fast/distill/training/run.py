"""``mta-fast train``: settings -> rows -> cached spans -> models -> MTATrainer -> exported student and picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mta_fast import _yaml
from mta_fast.choices import nearest
from mta_fast.distill.data import LoadedRows, cut_texts, data_places, describe_rows, drop_long_rows, span_column
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.models import load_config, load_model, load_tokenizer, model_places
from mta_fast.distill.teacher.store import CACHE
from mta_fast.distill.training import ranks, resuming
from mta_fast.distill.training.checkpoints import EXPORT, last_checkpoint
from mta_fast.distill.training.fit import check_evaluation, check_layers, check_room, check_values, rehearse, unsharded
from mta_fast.distill.training.interrupt import FinishStep
from mta_fast.distill.training.resuming import RUN_FILE
from mta_fast.distill.training.settings import LoraSettings, ModelSettings, TrainSettings
from mta_fast.errors import TERMINATED, InputError
from mta_fast.files import (
    MARKER,
    RESULTS_FILE,
    Kind,
    check_target,
    export_kind,
    mark_export,
    marked,
    save_figure,
    user_path,
    write_whole,
)
from mta_fast.files import PICTURE as EARLIER_PICTURE
from mta_fast.interrupt import Terminated, exit_code
from mta_fast.layers import depth_of
from mta_fast.locks import lock_folder
from mta_fast.packages import require
from mta_fast.pictures import BLUE, DPI, ORANGE, frame, legend_below, new_figure
from mta_fast.spans.cache import SpanCache
from mta_fast.spans.extract import SpanExtractor

if TYPE_CHECKING:
    from mta_fast.distill.training.arguments import MTATrainingArguments
    from mta_fast.distill.training.caching import TeacherCache
    from mta_fast.distill.training.trainer import MTATrainer

STUDENT_FOLDER, PICTURE = "student", "training.png"
MATCHED_EPOCHS = 1000  # time ends a run that is matched to another's, long before


def train(
    settings: TrainSettings, *, resume: bool = False, match_time: Path | None = None, allow_changes: bool = False
) -> int:
    """Run the settings; on one process, or on each rank of torchrun or accelerate launch.

    Leaves in ``output_dir``: config.yaml, checkpoints, the exported student, training.png, and last, so that it tells a
    finished run, results.json (steps, seconds of training, the losses on the evaluation set).

    Args:
        settings: from ``TrainSettings.from_yaml``.
        resume: go on from the last checkpoint in ``output_dir``; without one, start.
        match_time: output_dir of a finished run; this one trains as long as that one did, however many steps it takes.
        allow_changes: go on with other settings, data or models than those that the checkpoint was made with.

    Returns:
        The exit code: 0, or 130 after Ctrl-C and 143 after SIGTERM (the step is finished and a checkpoint saved first).

    Raises:
        InputError: settings, rows or models that don't fit, an ``output_dir`` with checkpoints and no ``resume``,
            with files that are not of a run, or in which another process is at work, or a checkpoint that is damaged
            or of other settings.
        CheckpointError: no room to write. MissingPackageError: a package is missing.
    """
    with ExitStack() as stack:
        if ranks.is_first():  # alone at work in the folder; the ranks of one run share it
            stack.enter_context(lock_folder(Path(settings.output_dir)))
        finish = stack.enter_context(FinishStep())
        try:
            return _train(settings, resume, match_time, allow_changes, finish)
        except Terminated:  # while there was nothing to save
            return TERMINATED


def _train(
    settings: TrainSettings, resume: bool, match_time: Path | None, allow_changes: bool, finish: FinishStep
) -> int:
    """What ``train`` does once output_dir is its own."""
    out = Path(settings.output_dir)
    if match_time is not None:
        settings = _matched(settings, read_results(user_path(match_time))["train_seconds"])
    checkpoint = last_checkpoint(out)
    if checkpoint is not None and not resume:
        raise InputError(
            f"{out}: expected a new output_dir, it holds {checkpoint.name}; go on with --resume, or move it"
        )
    check_run(settings, resume=resume, going_on=checkpoint is not None)
    if checkpoint is not None:
        resuming.check(checkpoint, out, settings, allow_changes=allow_changes)
    trainer = build_trainer(settings)
    trainer.run_settings, trainer.verified = settings.to_dict(), checkpoint
    if trainer.is_world_process_zero():
        resuming.record(out, settings)
    finish.watch(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, allow_changes=allow_changes)
    if trainer.stopped:
        _say(trainer, f"stopped after step {trainer.state.global_step}; go on with --resume")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        return exit_code(finish.signal)
    finish.unwatch()
    _finish(trainer, out)
    return 0


def _finish(trainer: MTATrainer, out: Path) -> None:
    """Export the student, measure and draw what it has become."""
    if trainer.is_world_process_zero():
        _adopt_student(out)
    trainer.accelerator.wait_for_everyone()
    trainer.export_student(out / STUDENT_FOLDER, overwrite=True)
    losses = trainer.final_losses()
    if trainer.is_world_process_zero():
        draw_training(trainer.state.log_history, out / PICTURE)
        results = {"steps": trainer.state.global_step, "train_seconds": trainer.train_seconds, **losses}
        write_whole(out / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    _say(trainer, f"student in {out / STUDENT_FOLDER}, curves in {out / PICTURE}")
    trainer.accelerator.wait_for_everyone()  # no rank leaves while another still talks
    trainer.accelerator.end_training()


def check_run(settings: TrainSettings, *, resume: bool, going_on: bool) -> None:
    """See that a run replaces only what an earlier run left in its output_dir, before anything is loaded.

    Args:
        resume: as in ``train``; going_on: there is a checkpoint to go on from.

    Raises:
        InputError: a file or folder that a run writes is there and of another origin; a model or a data set lies where
            a run writes; or a finished run that there is no checkpoint to go on from.
    """
    out = Path(settings.output_dir)
    sides = [side for side in (settings.student, settings.teacher) if side is not None]
    names = {name for side in sides for name in (side.path, side.tokenizer) if name is not None}
    texts = [name for name in (settings.data.train, settings.data.eval) if name is not None]
    sources = [*(place for name in sorted(names) for place in model_places(name)), *data_places(texts)]
    for source in sources:
        inside = source.resolve()
        if out.resolve() in inside.parents and inside.relative_to(out.resolve()).parts[0].startswith("checkpoint-"):
            raise InputError(f"{out}: expected a model or data apart from the run's own checkpoints, got {source}")
    for name, kind in ((RUN_FILE, SETTINGS), (PICTURE, EARLIER_PICTURE), (RESULTS_FILE, RESULTS)):
        if not (name == PICTURE and _holds_run(out)):  # pictures of earlier versions bear no mark
            check_target(out / name, kind, sources=sources)
    student = out / STUDENT_FOLDER
    check_target(student, _STUDENT_OF_RUN, sources=sources)
    if going_on:
        return
    if (out / RESULTS_FILE).is_file() or (not resume and (student / MARKER).is_file()):
        raise InputError(
            f"{out}: expected a new output_dir, it holds a finished run without a checkpoint to go on from; move it, "
            f"or give another"
        )


def _is_settings(file: Path) -> bool:
    """Whether a file is what a run writes: all parts of the settings, and no comment, which would be lost."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = set(_yaml.read(file))
    except InputError:
        return False
    return {f.name for f in fields(TrainSettings)} <= found and not re.search("^#", text, re.MULTILINE)


def _holds_run(out: Path) -> bool:
    """Whether there are settings of a run, and something it has made."""
    made = (out / RESULTS_FILE).is_file() or any(out.glob("checkpoint-*"))
    return made and (out / RUN_FILE).is_file() and _is_settings(out / RUN_FILE)


def _is_student_of_run(folder: Path) -> bool:
    """An exported student, or one that a run of an earlier version left, which bears no mark."""
    return export_kind(EXPORT).earlier(folder) or (not (folder / MARKER).exists() and _holds_run(folder.parent))


def _adopt_student(out: Path) -> None:
    """Mark the student that an earlier version exported, so that the run may replace it."""
    student = out / STUDENT_FOLDER
    if student.is_dir() and not (student / MARKER).exists() and _is_student_of_run(student):
        mark_export(student, EXPORT)


SETTINGS = Kind("the settings of an earlier run", _is_settings)
RESULTS = Kind("the results of an earlier run", marked(b'"train_seconds"'))
_STUDENT_OF_RUN = Kind("the student of an earlier run", _is_student_of_run, folder=True)


def read_results(run: Path) -> dict[str, float]:
    """results.json of a finished run.

    Raises:
        InputError: the folder holds none.
    """
    file = run / RESULTS_FILE
    if not file.is_file():
        raise InputError(f"{run}: expected the output_dir of a finished run, it holds no {RESULTS_FILE}")
    results: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    if "train_seconds" not in results:
        raise InputError(f"{run}: expected the output_dir of a training, {RESULTS_FILE} there names no train_seconds")
    return results


def _matched(settings: TrainSettings, seconds: float) -> TrainSettings:
    """The settings of a run that ends after so many seconds of training."""
    training = {**settings.training, "max_seconds": seconds, "num_train_epochs": MATCHED_EPOCHS}
    training.pop("max_steps", None)
    return replace(settings, training=training)


def build_trainer(settings: TrainSettings) -> MTATrainer:
    """The trainer of these settings, with its data and models loaded."""
    from accelerate.utils import broadcast_object_list
    from transformers import set_seed

    from mta_fast.distill.training.caching import needs_teacher
    from mta_fast.distill.training.joining import span_collator, trimmed_ids, with_teacher_ids
    from mta_fast.distill.training.trainer import MTATrainer

    arguments = training_arguments(settings)
    method = base_method(settings.base.loss, **settings.base.options)
    sides: dict[str, ModelSettings] = {"student": settings.student}
    sides |= {} if settings.teacher is None else {"teacher": settings.teacher}
    configs = {side: load_config(model.path, **model.options) for side, model in sides.items()}
    tokenizers = {side: load_tokenizer(model.tokenizer or model.path) for side, model in sides.items()}
    depths = {side: depth_of(config) for side, config in configs.items()}
    config = settings.mta_config(depths["student"], depths.get("teacher"))
    if config is not None:
        check_layers(config, depths)
    tokenizer = tokenizers["student"]
    other, ids = trimmed_ids(tokenizer, tokenizers.get("teacher"))
    for side in sides:
        read = tokenizers[side] if other is not None or ids is not None else tokenizer
        check_room(side, configs[side], read, arguments.max_length)
    kinds = sorted(set(config.granularity)) if config is not None else []
    extractor = None
    if kinds:
        spans = settings.spans
        extractor = SpanExtractor(
            spans.model, granularity=kinds, n_process=spans.n_process, skip_unparsable=spans.skip_unparsable
        )
    sources = {"train": (settings.data.train, settings.data.train_split)}
    if settings.data.eval is not None:
        sources["eval"] = settings.data.eval, settings.data.eval_split
    with arguments.main_process_first(desc="reading"):
        read = {name: _read(settings, method, *source, tokenizer, arguments) for name, source in sources.items()}
    cache = teacher_cache(settings)
    if cache is not None:
        collator = method.collator(with_teacher_ids(span_collator(tokenizer, other, None, arguments), ids))
        needed = needs_teacher(cache, [each.rows for each in read.values()], collator, method)
        if not broadcast_object_list([needed])[0]:  # another process may fill it meanwhile
            sides.pop("teacher")
    with unsharded(arguments):
        models = {side: load_model(sides[side].path, dtype=sides[side].dtype, **sides[side].options) for side in sides}
    student: Any = models["student"]
    if cache is not None and cache.source is None:  # files that a hub has brought only now
        cache = teacher_cache(settings)
    with arguments.main_process_first(desc="span extraction"):  # the other ranks then find the spans in the cache
        cut = None
        if settings.spans.truncate:
            own = [tokenizer] if other is None else list(tokenizers.values())
            cut = partial(cut_texts, tokenizers=own, max_length=arguments.max_length)
        rows = {name: _with_spans(settings, method, loaded, extractor, cut) for name, loaded in read.items()}
    if settings.student.lora is not None:
        set_seed(arguments.seed)
        student = _with_lora(student, settings.student.lora)
    if settings.student.compile:
        student.compile()
    return MTATrainer(
        student,
        models.get("teacher"),
        config,
        arguments,
        processing_class=tokenizer,
        teacher_tokenizer=tokenizers.get("teacher"),
        base_loss=method,
        teacher_cache=cache,
        span_extractor=extractor,
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
    )


def teacher_cache(settings: TrainSettings) -> TeacherCache | None:
    """Where the teacher's states are kept; None without a cache.

    Raises:
        InputError: the folder holds other files, or what is read.
    """
    from mta_fast.distill.training.caching import TeacherCache
    from mta_fast.distill.training.identity import source_of

    teacher = settings.teacher
    if teacher is None or teacher.cache is None:
        return None
    sources = (*model_places(teacher.path), *model_places(settings.student.path))
    check_target(teacher.cache, CACHE, sources=sources)
    source = source_of(teacher.path, teacher.dtype, teacher.options)
    return TeacherCache(teacher.cache, teacher.cache_dtype, source, sources)


def training_arguments(settings: TrainSettings) -> MTATrainingArguments:
    """The ``training`` part as MTATrainingArguments.

    Raises:
        InputError: an unknown field, or a value that transformers refuses.
    """
    from mta_fast.distill.training.arguments import FOR_SCRIPTS, MTATrainingArguments

    known = [f.name for f in fields(MTATrainingArguments) if f.init]
    for key in settings.training:
        if key == "output_dir":
            raise InputError(
                "training.output_dir: expected output_dir at the top level of the file, got it in training"
            )
        if key not in known:
            raise InputError(
                f"training.{key}: expected a field of MTATrainingArguments, there is no such one"
                f"{nearest(key, [name for name in known if name != 'output_dir'])}"
            )
        if key in FOR_SCRIPTS:
            raise InputError(f"training.{key}: expected nothing, as it has no effect here; leave it out")
    values: dict[str, Any] = {"report_to": "none", "logging_steps": 10} | settings.training
    evaluated = settings.data.eval is not None
    if evaluated:
        values.setdefault("eval_strategy", "epoch")
    check_values(values)
    try:
        arguments = MTATrainingArguments(output_dir=settings.output_dir, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {error}") from None
    check_evaluation(arguments, evaluated=evaluated)
    rehearse(arguments, evaluated=evaluated)
    return arguments


def _read(
    settings: TrainSettings,
    method: BaseMethod,
    source: str,
    split: str,
    tokenizer: Any,
    arguments: MTATrainingArguments,
) -> LoadedRows[Any]:
    """The rows of a source that fit, printed in a line."""
    data = settings.data
    loaded = method.load_rows(
        source,
        split=split,
        template=data.template,
        tokenizer=tokenizer,
        columns=data.columns,
        skip_bad_rows=data.skip_bad_rows,
        limit=data.max_rows,
    )
    loaded = drop_long_rows(
        loaded, tokenizer, max_length=arguments.max_length, max_prompt_length=data.max_prompt_length
    )
    if arguments.process_index == 0:
        print(f"{source}: {describe_rows(loaded)}")
    return loaded


def _with_spans(
    settings: TrainSettings,
    method: BaseMethod,
    loaded: LoadedRows[Any],
    extractor: SpanExtractor | None,
    cut: Callable[[Sequence[str]], list[str]] | None = None,
) -> Any:
    """A ``datasets.Dataset`` of prompts, responses and spans; the spans come from the cache where they are.

    Args:
        cut: of the texts, what is parsed; None: all.
    """
    import datasets

    names = ("prompt", *method.responses)
    columns: dict[str, Any] = {name: [row[name] for row in loaded.rows] for name in names}
    if extractor is not None:
        cache = SpanCache(extractor, settings.spans.cache)
        for response in method.responses:
            texts = [row["prompt"] + row[response] for row in loaded.rows]
            spans = cache(texts if cut is None else cut(texts), progress=True)
            columns |= {span_column(response, name): column for name, column in spans.items()}
    return datasets.Dataset.from_dict(columns)


def _with_lora(student: Any, settings: LoraSettings) -> Any:
    require("peft", "train", "student.lora")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise InputError(f"student.lora: {error}") from None


def _say(trainer: MTATrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        print(text)


def draw_training(history: list[dict[str, float]], path: Path) -> None:
    """The curves of a run: each term over the steps, in training and evaluation."""
    panels = {
        "base": "base loss (mean per token)",
        "dsa": "DSA: difference of span-pair cosines",
        "hid": "Hid: distance to the teacher's states",
        "mta_share_of_step": "share of MTA in the step's time",
    }
    names = [name for name in panels if any(name in entry or f"eval_{name}" in entry for entry in history)]
    rows, columns = -(-len(names) // 2) or 1, min(2, len(names)) or 1
    figure = new_figure((8, 0.6 + 2.9 * rows), "Terms of the loss over the steps")
    charts = figure.subplots(rows, columns, squeeze=False).flat
    for axes in charts[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(charts, names, strict=False):
        for key, label, colour, style in ((name, "training", BLUE, "-"), (f"eval_{name}", "evaluation", ORANGE, "o--")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        frame(axes, panels[name])
    legend_below(figure, columns=2)
    save_figure(figure, path, dpi=DPI)
