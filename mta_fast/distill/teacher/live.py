"""The teacher's pass: what is kept of it for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from mta_fast.distill.heads import HeadStates, LMHead, deferring, head_rows
from mta_fast.distill.teacher.rows import side_of
from mta_fast.inputs import model_inputs
from mta_fast.layers import capture_layers
from mta_fast.ops.entropy import entropy_weights

ENTROPY_LOGITS = 1 << 24  # at a time: 64 MB of float32


@dataclass(eq=False)
class TeacherOutput:
    """What the teacher says about a batch, detached.

    Attributes:
        logits: [B, S, V] over the common vocabulary; None where the base loss reads none. Made when they are first
            read, where ``head`` is there.
        hidden_states: {layer: [B, S, d_T]} of the layers that MTA and the base method read.
        entropy_weights: [B, S], or None where the config does not ask for them.
        head: what the head was to read.
        importance: {layer: [B, S]} of MTA's layers where it is known without their states, else None.
    """

    made: Tensor | None
    hidden_states: Mapping[int, Tensor]
    entropy_weights: Tensor | None = None
    head: HeadStates | None = None
    importance: Mapping[int, Tensor] | None = None

    @property
    def logits(self) -> Tensor | None:
        """The model's own, or made of what its head was to read, under no gradient."""
        if self.made is None and self.head is not None:
            with torch.no_grad():
                self.made = self.head.logits()
        return self.made


@dataclass(frozen=True)
class TeacherReads:
    """What a run reads of a teacher.

    Attributes:
        layers: hidden states, those that MTA and the base method read.
        logits: whether the base method reads its distribution.
        entropy: whether MTA weighs by its entropy.
        vocabulary: how many first ids of its logits are read; None: all.
        ids: [V] the ids that are read, in this order, where they are not the first ones; entropy is over all.
    """

    layers: Sequence[int]
    logits: bool
    entropy: bool
    vocabulary: int | None = None
    ids: Tensor | None = None


class LiveTeacher:
    """A teacher that runs.

    Args:
        model: a causal language model, frozen.
        reads: what is kept.
        device: where that goes; own_device: where the model's inputs go.
        autocast: the precision that it runs in.
        head: its LM head, where logits are not made unless a base method reads them; None: always.
    """

    def __init__(
        self,
        model: nn.Module,
        reads: TeacherReads,
        *,
        device: torch.device,
        own_device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        head: LMHead | None = None,
    ) -> None:
        self.model, self.reads, self.head = model, reads, head
        self.device, self._own_device, self._autocast = device, own_device, autocast
        self._chosen = None  # of the head: the rows that are read
        if head is not None and reads.ids is not None and reads.logits:
            self._chosen = head_rows(head, reads.ids)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherOutput:
        """The pass over a batch of SpanCollator; no graph, and only what is read is kept."""
        reads = self.reads
        if not (reads.layers or reads.logits or reads.entropy):
            return TeacherOutput(None, {})
        states, read, logits = self.run(batch, reads.layers, self.head)
        if read is not None:
            weights = self.entropy_of(read) if reads.entropy else None
            if self._chosen is not None:
                read.head = self._chosen
            return TeacherOutput(None, states, weights, read)
        logits = logits[..., : reads.vocabulary]
        if reads.ids is not None:
            weights = entropy_weights(logits).to(self.device) if reads.entropy else None
            chosen = logits[..., reads.ids.to(logits.device)].to(self.device) if reads.logits else None
            return TeacherOutput(chosen, states, weights)
        if reads.logits or reads.entropy:
            logits = logits.to(self.device)
        weights = entropy_weights(logits) if reads.entropy else None
        return TeacherOutput(logits if reads.logits else None, states, weights)

    @torch.no_grad()
    def run(
        self, batch: Mapping[str, Any], layers: Sequence[int], head: LMHead | None
    ) -> tuple[dict[int, Tensor], HeadStates | None, Tensor]:
        """{layer: [B, S, d]} on the device of training, what ``head`` was to read, and the model's logits."""
        inputs = send_to_device(model_inputs(self.model, batch, side_of(batch)), self._own_device)
        with self._autocast():
            with capture_layers(self.model, layers) as hidden, deferring(head, self.reads.vocabulary) as read:
                logits = self.model(**inputs, use_cache=False).logits
        return {layer: state.to(self.device) for layer, state in hidden.items()}, read, logits

    @torch.no_grad()
    def entropy_of(self, read: HeadStates) -> Tensor:
        """[B, S] entropy weights of what its head was to read, some tokens' logits at a time."""
        tokens = read.states.flatten(0, 1).split(max(1, ENTROPY_LOGITS // read.head.linear.out_features))
        with self._autocast():
            made = [entropy_weights(read.head.logits(some)[..., : read.vocabulary]) for some in tokens]
        return torch.cat(made).view(read.states.shape[:-1])
