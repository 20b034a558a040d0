"""What a base method is: a loss beside MTA, and what it asks of the training around it.

A method's loss is a sum of ratios, ``sums(student, teacher, batch) / counts(batch)``. The counts need the batch alone,
so that the trainer knows those of a whole optimisation step before the first of its micro-batches is run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mta_fast.config import LayerPairs
from mta_fast.distill.data import LoadedRows, load_rows
from mta_fast.distill.heads import HeadStates
from mta_fast.spans.extract import SpanExtractor

Batch = Mapping[str, Any]
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
_NO_OPTIONS = ("progress", "_name")  # attributes of a method that it was not made with


class ModelOutput(Protocol):
    """What a method reads of a model: an output of transformers, or anything with these two.

    Attributes:
        logits: [B, S, V]; None for a teacher whose distribution is not read.
        hidden_states: by layer, [B, S, d] each: a tuple of all, or {layer: state}.

    An output of the trainer's also has ``head``: a HeadStates, where logits are not made unless a method reads them.
    """

    @property
    def logits(self) -> Any: ...

    @property
    def hidden_states(self) -> Any: ...


def head_of(output: ModelOutput | None) -> HeadStates | None:
    """What the head of a model was to read; None where its logits are at hand."""
    head: HeadStates | None = getattr(output, "head", None)
    return head


@dataclass(frozen=True)
class TrainingPlan:
    """A training before its first step, as a method may refuse it.

    Attributes:
        student: the model, not wrapped.
        granularity: what MTA aligns, such as ("phrase", "word"); empty without MTA.
        train_dataset, eval_dataset: the rows, as the trainer was given them.
        evaluates: whether the evaluation set is measured during the training.
        sharded: whether FSDP or DeepSpeed shard the student's weights.
    """

    student: nn.Module
    granularity: Sequence[str]
    train_dataset: Any
    eval_dataset: Any
    evaluates: bool
    sharded: bool


class StepBatches:
    """The batches that a step trains on: those of the data, as they come. A context manager around the training.

    A method whose batches come from elsewhere too returns one of its own from ``BaseMethod.batches``.
    """

    def __init__(self, method: BaseMethod) -> None:
        self._method = method

    def check(self, plan: TrainingPlan) -> None:
        """Refuse a training that would stop later on; InputError with the reason."""

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def batch(self, student: nn.Module, batch: dict[str, Any], seed: int, device: torch.device) -> dict[str, Any]:
        """The batch to train on in place of the data's ``batch``, which it may be itself.

        Args:
            student: the model, not wrapped.
            batch: from the method's collator.
            seed: of random numbers; another one for each micro-batch, step and rank, the same in a resumed run.
            device: where the batch goes.
        """
        return batch

    def logs(self) -> dict[str, float]:
        """What is logged of the batches since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The method's ``state_dict``, once nothing of it is still being made."""
        return self._method.state_dict()


class BaseMethod:
    """A base method, called as ``method(student_out, teacher_out, batch)``.

    A method of one's own writes ``counts`` and ``sums``; everything else says how the training around it differs.

    Attributes:
        reads_teacher: whether the teacher's logits are read; where not, the two may have different vocabularies.
        reads_rows: whether it reads the rows of a padded batch, labels [B, S]; where not, rows may be packed in [1, T].
        reads_heads: whether it reads ``head`` of an output where that is there, and no logits then.
        student_layers, teacher_layers: the hidden states that are read.
        responses: the columns of a row that hold a response; spans lie over prompt + response of each.
        takes_layer_pairs: whether its option layer_pairs, where it is not given, is MTA's.
        follows_progress: whether the loss depends on ``progress``, so that a run must keep its length.
        follows_evaluation: whether the training depends on ``observe_validation``.
        validation: a method whose loss on the evaluation set ``observe_validation`` is given; None: its own.
        counts_step: whether ``progress`` counts the step that runs, so that the last one is at 1.
        progress: how much of the training is done, 0 to 1, for methods with a schedule; the trainer sets it.
        reduce: sums a tensor over the ranks, for methods with a running average; the trainer sets it.
        teacher_ids: [V] the teacher's id of each of the student's, where its tokenizer is the teacher's with fewer
            tokens: the teacher's logits, and the head of its outputs, are then of these alone. The trainer sets it.
    """

    reads_teacher = True
    reads_heads = False
    reads_rows = False
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()
    responses: tuple[str, ...] = ("output",)
    takes_layer_pairs = False
    follows_progress = True
    follows_evaluation = False
    teacher_ids: Tensor | None = None
    validation: BaseMethod | None = None
    counts_step = False

    def __init__(self) -> None:
        self.progress = 0.0
        self.reduce: Callable[[Tensor], Tensor] = lambda own: own

    @property
    def name(self) -> str | None:
        """What it is called in an error; None where there is no base loss."""
        return type(self).__name__

    # --- data ----------------------------------------------------------------------------------------------------

    def load_rows(self, source: Any, **options: Any) -> LoadedRows[Any]:
        """Rows with "prompt" and the method's ``responses``; arguments as in ``data.load_rows``."""
        return load_rows(source, responses=self.responses, **options)

    def collator(self, collator: Collator) -> Collator:
        """What makes a batch of rows.

        Args:
            collator: the trainer's SpanCollator, or what the user gave as ``data_collator``.

        Raises:
            InputError: one that the method can't work with.
        """
        return collator

    def batches(self, collator: Collator, extractor: SpanExtractor | None) -> StepBatches:
        """Where the batches of a step come from.

        Args:
            collator: what ``collator`` returned.
            extractor: of spans in text that is made during the training; None without MTA.
        """
        return StepBatches(self)

    # --- the loss ------------------------------------------------------------------------------------------------

    def attach(self, student: nn.Module, teacher: nn.Module, layer_pairs: LayerPairs | None = None) -> BaseMethod:
        """Take what the method needs of the models; ``layer_pairs`` are MTA's, for a method that was given none."""
        return self

    def counts(self, batch: Batch) -> Tensor:
        """[K] what each sum is divided by."""
        raise NotImplementedError

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[K] sums over the batch, with a graph."""
        raise NotImplementedError

    def __call__(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """The loss of one batch.

        Args:
            student, teacher: their outputs on the batch's rows.
            batch: from the method's collator; "labels" [B, S] are -100 where a token does not count.

        Returns:
            A scalar; 0 with a graph where nothing counts.
        """
        return (self.sums(student, teacher, batch) / self.counts(batch).clamp(min=1)).sum()

    # --- evaluation and checkpoints ------------------------------------------------------------------------------

    @property
    def wants_validation(self) -> bool:
        """Whether the validation loss before the training is still to be measured."""
        return False

    def observe_validation(self, loss: float) -> None:
        """The evaluation set's loss, by ``validation``: before training where ``wants_validation``, then of each."""

    def settings(self) -> dict[str, Any]:
        """The plain values that it was made with, by name, and its own name under ""; a resumed run must have the same.

        Asked before the training, as attributes that are numbers or texts may change in it.
        """
        values: dict[str, Any] = {"": self.name}
        for key, value in vars(self).items():
            own = key.lstrip("_")
            if hasattr(value, "sums") and hasattr(value, "settings"):  # a method made of another one
                values |= {f"{own}.{name}".rstrip("."): each for name, each in value.settings().items()}
            elif isinstance(value, functools.partial):  # a loss with its options
                options = inspect.signature(value).parameters.values()
                values |= {f"{own}.{each.name}": each.default for each in options if each.default is not each.empty}
            elif isinstance(value, (bool, int, float, str, tuple, dict)) and key not in _NO_OPTIONS:
                values[own] = value
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of ``state_dict``."""


class NoBaseLoss(BaseMethod):
    """No base loss: MTA alone, or nothing but what the data is read for."""

    reads_teacher = False
    reads_heads = True
    follows_progress = False

    @property
    def name(self) -> None:
        """None."""
        return None

    def counts(self, batch: Batch) -> Tensor:
        """[0]."""
        return batch["labels"].new_zeros(0)

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[0], with a graph."""
        read = head_of(student)
        nothing = student.logits[:0] if read is None else read.head.module(read.states[:0])
        zero: Tensor = nothing.sum(dtype=torch.float32)
        return zero[None][:0]
