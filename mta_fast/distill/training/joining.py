"""Models, tokenizers and a base method joined for a training: what fits together, and what makes their batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.losses import SEQUENCE_LEVEL_LOSSES
from mta_fast.distill.models import common_vocabulary, same_vocabulary
from mta_fast.distill.students import vocabulary as vocabularies
from mta_fast.distill.training.arguments import MTATrainingArguments
from mta_fast.distill.training.module import DistillationModel
from mta_fast.errors import InputError
from mta_fast.inputs import check_left_padding
from mta_fast.loss import MTALoss
from mta_fast.spans.collate import SpanCollator, for_teacher


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


def trimmed_ids(tokenizer: Any, teacher_tokenizer: Any) -> tuple[Any, Tensor | None]:
    """What a teacher's tokenizer is to a student's.

    Returns:
        The teacher's where it gives other tokens, else None; and [V] the teacher's id of each of the student's, where
        the student's is the teacher's with fewer tokens.
    """
    if teacher_tokenizer is None or same_vocabulary(tokenizer, teacher_tokenizer):
        return None, None
    ids = vocabularies.teacher_ids(tokenizer, teacher_tokenizer)
    return (teacher_tokenizer if ids is None else None), ids


class ForTeacher:
    """A collator of one's own, with the teacher's side in its batches.

    Args:
        collator: of the student's tokens; teacher_ids: [V] the teacher's id of each.
    """

    def __init__(self, collator: Any, teacher_ids: Tensor) -> None:
        self.collator, self.teacher_ids = collator, teacher_ids

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The batch; one that has a teacher's side already as it is."""
        batch: dict[str, Any] = self.collator(rows)
        return batch if "teacher_input_ids" in batch else batch | for_teacher(batch, self.teacher_ids)


def with_teacher_ids(collator: Any, teacher_ids: Tensor | None) -> Any:
    """A user's collator, whose batches then have the teacher's ids; as it is without any."""
    if teacher_ids is None:
        return collator
    if not isinstance(collator, SpanCollator):
        return ForTeacher(collator, teacher_ids)
    made = copy.copy(collator)
    made.teacher_tokenizer, made.teacher_ids = None, teacher_ids
    return made


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
    teacher_ids: Tensor | None = None,
) -> DistillationModel:
    """Check that models, tokenizers and base method fit together, and join them.

    Args:
        teacher_tokenizer, teacher_ids: as ``trimmed_ids`` gives them.
    """
    base.teacher_ids = teacher_ids
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
        vocabulary = common_vocabulary(student, teacher, tokenizer, teacher_ids)
    return DistillationModel(student, mta, base, vocabulary)
