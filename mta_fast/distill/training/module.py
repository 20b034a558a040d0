"""Student and MTALoss as one module: what DDP, FSDP and DeepSpeed wrap and the optimiser trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mta_fast.distill.heads import HeadStates, LMHead, deferring
from mta_fast.distill.methods.base import BaseMethod, NoBaseLoss
from mta_fast.distill.teacher.live import TeacherOutput
from mta_fast.distill.training.stopwatch import Stopwatch
from mta_fast.inputs import model_inputs
from mta_fast.layers import capture_layers, evaluating
from mta_fast.loss import MTALoss


@dataclass(eq=False)
class StudentOutput:
    """What the base method reads of the student.

    Attributes:
        logits: [B, S, V] over the common vocabulary; made when they are first read, where ``head`` is there.
        hidden_states: {layer: [B, S, d_S]} of the layers that MTA and the base method read.
        head: what the head was to read.
    """

    made: Tensor | None
    hidden_states: Mapping[int, Tensor]
    head: HeadStates | None = None

    @property
    def logits(self) -> Tensor:
        """The model's own, or made of what its head was to read."""
        if self.made is None:
            assert self.head is not None
            self.made = self.head.logits()
        return self.made


@dataclass(eq=False)
class StepTotals:
    """What a loss is divided by, over all micro-batches and ranks of an optimisation step.

    A plain object, so that no wrapper casts it on its way into the module.

    Attributes:
        base: [K] counts of the base method; empty without one.
        reduce: sums a tensor over the ranks.
        mta: [L, 2] denominators, or None: the micro-batch's own, after ``reduce``.
        mta_scale: factor of DSA and Hid; 1 / micro-batches where each is normalised by itself.
        scale: factor of the loss; the number of ranks where gradients are averaged over them.
    """

    base: Tensor
    reduce: Callable[[Tensor], Tensor]
    mta: Tensor | None = None
    mta_scale: float = 1.0
    scale: float = 1.0


class DistillationOutput(NamedTuple):
    """The micro-batch's share of the step's losses.

    ``loss`` is what to call backward on: scale * (base + lambda_dsa * dsa + lambda_hid * hid); ``base``, ``dsa``
    and ``hid`` are unscaled and unweighted. Over all micro-batches and ranks each sums to the step's value.
    ``base_terms``: [2, K] the base method's sums and counts of this micro-batch, detached. ``per_layer``: [4, L] as in
    LayerPairTerms, detached; None without MTA. ``validation``: [2, K] sums and counts of the loss that the base method
    follows in place of its own, in evaluation alone.
    """

    loss: Tensor
    base: Tensor
    dsa: Tensor
    hid: Tensor
    base_terms: Tensor
    per_layer: Tensor | None
    validation: Tensor | None = None


def teacher_side(batch: Mapping[str, Any], teacher: TeacherOutput) -> dict[str, Any]:
    """What ``MTALoss.denominators`` reads of a batch and its teacher, and ``MTALoss.forward`` beside the student."""
    return {
        "teacher_hidden": teacher.hidden_states,
        "spans": batch["spans"],
        "teacher_spans": batch.get("teacher_spans"),
        "entropy_weights": teacher.entropy_weights,
        "teacher_importance": teacher.importance,
    }


class DistillationModel(nn.Module):
    """A student with the loss it is trained by. ``student`` is what is exported; ``mta`` holds the projections.

    Args:
        student: a causal language model of transformers, or one wrapped by PEFT.
        mta: its MTALoss; None trains on the base loss alone.
        base: its base method; None trains on MTA alone.
        vocabulary: how many ids of the student's logits the base method reads; None: all.

    Attributes:
        head: the student's LM head, where its logits are not made unless a base method reads them; None: always.

    The teacher is not a part of it: it is not trained, not sharded and not saved.
    """

    def __init__(
        self,
        student: nn.Module,
        mta: MTALoss | None = None,
        base: BaseMethod | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.mta = student, mta
        self.base, self.vocabulary = NoBaseLoss() if base is None else base, vocabulary
        self.stopwatch: Stopwatch | None = None
        self.head: LMHead | None = None

    def forward(self, batch: Mapping[str, Any], teacher: TeacherOutput, totals: StepTotals) -> DistillationOutput:
        """The losses of one micro-batch.

        Args:
            batch: from SpanCollator, on the student's device.
            teacher: the teacher's output on the same rows.
            totals: what to divide by.
        """
        with (
            capture_layers(self.student, self.layers("student")) as hidden,
            deferring(self.head, self.vocabulary) as head,
        ):
            logits = self.student(**model_inputs(self.student, batch), use_cache=False).logits
        made = logits[..., : self.vocabulary] if head is None else None
        student = StudentOutput(made, hidden, head)
        base, terms = self._base(batch, student, teacher, totals)
        followed = None if self.training else self.base.validation
        validation = None if followed is None else _terms(followed, followed.sums(student, teacher, batch), batch)
        if self.mta is None:
            zero = base.new_zeros(())
            return DistillationOutput(totals.scale * base, base, zero, zero, terms, None, validation)
        dsa, hid, per_layer = self._alignment(batch, hidden, teacher, totals)
        loss = base + self.mta.config.weighted(dsa, hid)
        return DistillationOutput(totals.scale * loss, base, dsa, hid, terms, per_layer, validation)

    def layers(self, side: str) -> list[int]:
        """The hidden states of "student" or "teacher" that MTA and the base method read."""
        own = [] if self.mta is None else getattr(self.mta.config, f"{side}_layers")
        return sorted({*own, *getattr(self.base, f"{side}_layers")})

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """[K] the base method's counts of a batch; empty without one."""
        return self.base.counts(batch)

    def _base(
        self, batch: Mapping[str, Any], student: StudentOutput, teacher: TeacherOutput, totals: StepTotals
    ) -> tuple[Tensor, Tensor]:
        """The base loss and its terms."""
        sums = self.base.sums(student, teacher, batch)
        return (sums / totals.base.clamp(min=1)).sum(), _terms(self.base, sums, batch)

    def _alignment(
        self, batch: Mapping[str, Any], hidden: Mapping[int, Tensor], teacher: TeacherOutput, totals: StepTotals
    ) -> tuple[Tensor, Tensor, Tensor]:
        """DSA, Hid and their terms per layer.

        Called after the base loss, so that its backward is one stretch that can be timed.
        """
        assert self.mta is not None
        watch = self.stopwatch
        if watch is not None:
            watch.start()
            hidden = {layer: watch.ends_backward(state) for layer, state in hidden.items()}
        per_layer = self.mta(hidden, **teacher_side(batch, teacher)).per_layer
        denominators = totals.mta
        if denominators is None:
            own = torch.stack([per_layer.dsa_denominator, per_layer.hid_denominator], 1)
            denominators = totals.reduce(own.detach())
        dsa, hid = (totals.mta_scale * term for term in per_layer.means(denominators))
        if watch is not None:
            watch.stop()
            dsa, hid = watch.begins_backward(dsa), watch.begins_backward(hid)
        return dsa, hid, torch.stack(per_layer).detach()

    @torch.no_grad()
    def student_states(self, batch: Mapping[str, Any]) -> Mapping[int, Tensor]:
        """{layer: [B, S, d_S]} that MTA reads of the student in eval mode, before it is wrapped."""
        with (
            evaluating(self.student),
            capture_layers(self.student, self.layers("student")) as hidden,
            deferring(self.head, self.vocabulary),
        ):
            self.student(**model_inputs(self.student, batch), use_cache=False)
        return hidden

    # what Trainer and accelerate ask of the model they wrap is the student's

    @property
    def config(self) -> Any:
        """The student's config."""
        return self.student.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.student, "_no_split_modules", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """True: the losses are already those of the whole optimisation step."""
        return True

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """transformers' newer name of ``gradient_checkpointing_enable``."""
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.student.activation_checkpointing_enable(  # type: ignore[operator]  # transformers' method
            activation_checkpointing_kwargs=kwargs, **options
        )
        self._give_inputs_a_graph()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the student's blocks in the backward; without reentry, which keeps no graph of hidden states."""
        kwargs = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]  # transformers' method
        self._give_inputs_a_graph()

    def _give_inputs_a_graph(self) -> None:
        if any(not p.requires_grad for p in self.student.parameters()):  # adapters: the embeddings have none
            self.student.enable_input_require_grads()  # type: ignore[operator]  # transformers' method

    def gradient_checkpointing_disable(self) -> None:
        """Undo ``gradient_checkpointing_enable``."""
        self.student.gradient_checkpointing_disable()  # type: ignore[operator]  # transformers' method

    def get_input_embeddings(self) -> Any:
        """The student's."""
        return self.student.get_input_embeddings()  # type: ignore[operator]  # transformers' method

    def get_output_embeddings(self) -> Any:
        """The student's."""
        return self.student.get_output_embeddings()  # type: ignore[operator]  # transformers' method

    def tie_weights(self) -> None:
        """Tie the student's embeddings again, after a wrapper replaced its parameters."""
        self.student.tie_weights()  # type: ignore[operator]  # transformers' method


def _terms(method: BaseMethod, sums: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[2, K] sums and counts, detached."""
    return torch.stack([sums.detach().double(), method.counts(batch).double()])
