"""Models, tokenizers and a base method joined for a training: what fits together, and what makes their batches."""

from __future__ import annotations

from typing import Any

from torch import nn

from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.losses import SEQUENCE_LEVEL_LOSSES
from mta_fast.distill.models import common_vocabulary
from mta_fast.distill.training.arguments import MTATrainingArguments
from mta_fast.distill.training.module import DistillationModel
from mta_fast.errors import InputError
from mta_fast.inputs import check_left_padding
from mta_fast.loss import MTALoss
from mta_fast.spans.collate import SpanCollator


def span_collator(
    tokenizer: Any,
    teacher_tokenizer: Any,
    mta: MTALoss | None,
    args: MTATrainingArguments,
    *,
    num_embeddings: int | None = None,
) -> SpanCollator:
    """What makes a batch of rows where the user gives nothing else."""
    by_columns = mta is not None and mta.config.count_padding and not args.padding_free
    return SpanCollator(
        tokenizer,
        teacher_tokenizer,
        granularity=sorted(set(mta.config.granularity)) if mta is not None else (),
        max_length=args.max_length,
        pad_to=args.pad_to or ("max_length" if by_columns else "longest"),
        num_embeddings=num_embeddings,
        flatten=args.padding_free,
    )


def check_padding_side(student: nn.Module, teacher: nn.Module | None, tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse padding on the left for a model that would read it as text."""
    for name, model, own in (
        ("student", student, tokenizer),
        ("teacher", teacher, tokenizer if teacher_tokenizer is None else teacher_tokenizer),
    ):
        if model is not None and own.padding_side == "left":
            pad = own.eos_token_id if own.pad_token_id is None else own.pad_token_id
            check_left_padding(model, pad, name, "set padding_side = 'right' of its tokenizer")


def num_embeddings_of(*models: nn.Module | None) -> int | None:
    """The tokens that all of these models know; None where their embeddings don't say."""
    tables: list[Any] = [model.get_input_embeddings() for model in models if model is not None]  # type: ignore[operator]  # transformers' method
    return min((int(table.num_embeddings) for table in tables if hasattr(table, "num_embeddings")), default=None)


def distillation_model(
    student: nn.Module,
    teacher: nn.Module | None,
    mta: MTALoss | None,
    base: BaseMethod,
    tokenizer: Any,
    teacher_tokenizer: Any,
) -> DistillationModel:
    """Check that models, tokenizers and base method fit together, and join them."""
    if teacher is not None:
        base.attach(student, teacher, None if mta is None else mta.config.layer_pairs)
    if teacher_tokenizer is not None:
        if base.reads_teacher:
            raise InputError(
                f"base_loss: expected None or one of {', '.join(sorted(SEQUENCE_LEVEL_LOSSES))} with two tokenizers "
                f"(their tokens share no distribution), got {base.name!r}"
            )
        return DistillationModel(student, mta, base)
    vocabulary = None
    if teacher is not None and base.reads_teacher:
        vocabulary = common_vocabulary(student, teacher, tokenizer)
    return DistillationModel(student, mta, base, vocabulary)
