"""Small trainers for the tests: random models, the bundled rows with their spans."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import make_model, make_tokenizer

from mta_fast import LayerMap, MTAConfig, SpanExtractor
from mta_fast.distill import MTATrainer, MTATrainingArguments
from mta_fast.distill.data import load_sample

STUDENT_LAYERS, TEACHER_LAYERS = 4, 8
CONFIG = MTAConfig(LayerMap.proportional(STUDENT_LAYERS, TEACHER_LAYERS).pairs, ("word", "phrase", "phrase"))


@cache
def make_rows(count: int = 24) -> list[dict[str, Any]]:
    """Bundled rows with their spans."""
    rows = load_sample()[:count]
    spans = SpanExtractor()([row["prompt"] + row["output"] for row in rows])
    columns = zip(rows, spans["word_spans"], spans["phrase_spans"], strict=True)
    return [dict(row) | {"word_spans": words, "phrase_spans": phrases} for row, words, phrases in columns]


def uneven_rows() -> list[dict[str, Any]]:
    """Rows of which every other one has two spans of each kind, so that rows' denominators differ much."""
    few = {f"{kind}_spans": 2 for kind in ("word", "phrase")}
    return [
        row | {name: row[name][:n] for name, n in few.items()} if i % 2 else row for i, row in enumerate(make_rows())
    ]


def make_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of the rows' responses: the row's own is chosen, the next row's is rejected."""
    others = [*rows[1:], rows[0]]
    spans = SpanExtractor()([row["prompt"] + other["output"] for row, other in zip(rows, others, strict=True)])
    return [
        {"prompt": row["prompt"], "chosen": row["output"], "rejected": other["output"]}
        | {f"chosen_{kind}_spans": row[f"{kind}_spans"] for kind in ("word", "phrase")}
        | {f"rejected_{name}": column[i] for name, column in spans.items()}
        for i, (row, other) in enumerate(zip(rows, others, strict=True))
    ]


def make_trainer(
    out: Path,
    *,
    family: str = "gpt2",
    student: Any = None,
    teacher: Any = None,
    mta: MTAConfig | None = CONFIG,
    teacher_tokenizer: Any = None,
    base_loss: Any = "srkl",
    span_extractor: Any = None,
    rows: list[dict[str, Any]] | None = None,
    callbacks: Any = None,
    data_collator: Any = None,
    teacher_cache: Any = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> MTATrainer:
    """A trainer of four steps over four rows each; ``arguments`` change MTATrainingArguments."""
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    student = make_model(family, STUDENT_LAYERS, vocabulary=len(tokenizer)) if student is None else student
    if teacher is None and teacher_cache is None:
        teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(tokenizer))
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 64,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = make_rows() if rows is None else rows
    return MTATrainer(
        student,
        teacher,
        mta,
        MTATrainingArguments(output_dir=str(out), **settings | arguments),
        processing_class=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        base_loss=base_loss,
        teacher_cache=teacher_cache,
        span_extractor=span_extractor,
        train_dataset=rows[:16],
        eval_dataset=rows[16:],
        callbacks=callbacks,
        data_collator=data_collator,
    )


def weights(trainer: MTATrainer) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer: MTATrainer, name: str) -> list[float]:
    """A logged value over the steps."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
