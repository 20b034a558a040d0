"""FDD: the distribution of every mapped layer, through the LM head, and how it changes from layer to layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mta_fast.config import LayerPairs, checked_layer_pairs
from mta_fast.distill.heads import HeadStates, LMHead, head_rows, scale_and_softcap
from mta_fast.distill.methods.base import BaseMethod, Batch, ModelOutput, head_of
from mta_fast.distill.methods.losses import skewed_method
from mta_fast.errors import InputError
from mta_fast.inputs import attended
from mta_fast.layers import num_layers, unwrap
from mta_fast.layout import compute_dtype
from mta_fast.ops.trajectory_divergence import trajectory, trajectory_divergence

LOGIT_BUDGET = 1 << 24  # logits of all mapped layers, both sides, that heads make at once: 64 MB of float32


class FDD(BaseMethod):
    """L_FDD = traj + der, added to a token loss (feature dynamics distillation).

    With u_l = LMhead(h_l) of mapped layer l, softcap and logit scale included:

        traj = mean_l KL(softmax(u^T_l / tau) || softmax(u^S_l / tau))
        der  = mean_{l >= 1} [1 - cos(D^T_l, D^S_l)],  D_l = logsoftmax(u_l) - logsoftmax(u_(l-1));  0 for one layer

    both averaged over the attended positions, the prompt's too. No final norm comes before the head; OPT's narrow
    models pass their project_out.

    Args:
        layer_pairs: mapped (student layer, teacher layer) hidden-state indices, in order; None: MTA's.
        tau: temperature of the trajectory; 2 beside MTA.
        loss, alpha, detach_mixture: the token loss, as in ``losses``.

    Raises:
        InputError: no layer pairs, or a temperature that isn't positive.
    """

    takes_layer_pairs = True
    reads_heads = True
    follows_progress = False

    def __init__(
        self,
        layer_pairs: LayerPairs | None = None,
        *,
        tau: float = 2.0,
        loss: str = "srkl",
        alpha: float = 0.1,
        detach_mixture: bool = False,
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise InputError(f"tau: expected a temperature > 0, got {tau}")
        self.tau = tau
        self._token = skewed_method(loss, alpha, detach_mixture)
        self._pairs = None if layer_pairs is None else checked_layer_pairs(layer_pairs)
        self._heads: tuple[LayerHead, LayerHead] | None = None

    @property
    def layer_pairs(self) -> LayerPairs:
        """The mapped layers."""
        if self._pairs is None:
            raise InputError("FDD: expected layer_pairs, got none; give FDD(layer_pairs=[(4, 16), (6, 24), (8, 32)])")
        return self._pairs

    @property
    def student_layers(self) -> tuple[int, ...]:  # type: ignore[override]  # a property here
        """The student's mapped layers."""
        return tuple(student for student, _ in self.layer_pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:  # type: ignore[override]  # a property here
        """The teacher's mapped layers."""
        return tuple(teacher for _, teacher in self.layer_pairs)

    def attach(self, student: nn.Module, teacher: nn.Module, layer_pairs: LayerPairs | None = None) -> FDD:
        """Read through the heads of these models."""
        if self._pairs is None and layer_pairs is not None:
            self._pairs = layer_pairs
        for side, model, layers in (
            ("student", student, self.student_layers),
            ("teacher", teacher, self.teacher_layers),
        ):
            if max(layers) > num_layers(model):
                raise InputError(f"FDD: expected {side} layers up to its depth {num_layers(model)}, got {layers}")
        self._heads = LayerHead(student), LayerHead(teacher, self.teacher_ids)
        return self

    def counts(self, batch: Batch) -> Tensor:
        """[2] counted positions, attended positions."""
        return torch.cat([self._token.counts(batch), attended(batch).sum()[None]])

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[2] the token loss and traj + der, each summed over its positions."""
        if self._heads is None:
            raise InputError("FDD: expected the models' heads, got none; call attach(student, teacher) first")
        tokens = attended(batch).flatten().nonzero()[:, 0]
        own, other = head_of(student), head_of(teacher)
        of_student, of_teacher = self._heads
        states = of_student.states(student, self.student_layers, tokens)
        teacher_states = of_teacher.states(teacher, self.teacher_layers, tokens).detach()
        if own is not None and other is not None:
            dynamics = _through_heads(states, teacher_states, own, other, self.tau)
        else:
            dynamics = feature_dynamics(
                states,
                teacher_states,
                of_student.logits,
                of_teacher.logits,
                tau=self.tau,
                vocabulary=student.logits.shape[-1],
            )
        token = self._token.sums(student, teacher, batch)
        return torch.cat([token, dynamics[None].to(token.dtype)])


def _through_heads(
    student_states: Tensor, teacher_states: Tensor, student: HeadStates, teacher: HeadStates, tau: float
) -> Tensor:
    """``trajectory_divergence`` of states [L, n, d] through the heads of two passes."""
    own, other = student.head, teacher.head
    teacher_weight, teacher_bias = other.weight_and_bias()

    def dynamics(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return trajectory_divergence(
            states,
            teacher_states,
            weight,
            teacher_weight,
            tau=tau,
            biases=(bias, teacher_bias),
            softcaps=(own.softcap, other.softcap),
            scales=(own.scale, other.scale),
            vocabulary=student.vocabulary,
        )

    return own.call(student_states, dynamics)


def feature_dynamics(
    student_states: Tensor,
    teacher_states: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    *,
    tau: float,
    vocabulary: int,
) -> Tensor:
    """traj + der of FDD, summed over the tokens, of heads that make logits in their own way.

    The tokens go piece by piece, and the backward makes each piece's logits anew: never more than LOGIT_BUDGET of
    [layers, tokens, V] are kept, whatever the batch.

    Args:
        student_states, teacher_states: [L, n, d]; the teacher's receive no gradient.
        student_head, teacher_head: from states to logits [..., >= vocabulary].
        tau: temperature of the trajectory. vocabulary: how many ids are compared.
    """
    layers, tokens, _ = student_states.shape
    size = max(1, LOGIT_BUDGET // (2 * layers * vocabulary))

    def logs(head: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        return head(states)[..., :vocabulary].to(compute_dtype(states)).log_softmax(-1)

    def piece(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = logs(teacher_head, other)
        return trajectory(log_p, logs(student_head, own), tau)[0].sum()

    total = student_states[:, :0].sum(dtype=compute_dtype(student_states))
    for first in range(0, tokens, size):
        part = (states[:, first : first + size] for states in (student_states, teacher_states))
        total = total + checkpoint(piece, *part, use_reentrant=False)
    return total


class LayerHead:
    """A model's head for the hidden states of any layers.

    Args:
        ids: [V] the rows of the head whose logits are made, in this order; None: all.

    Raises:
        InputError: a model without output embeddings, or ids of a head that isn't a Linear.
    """

    def __init__(self, model: nn.Module, ids: Tensor | None = None) -> None:
        inner: Any = unwrap(model)
        output = inner.get_output_embeddings()
        if output is None:
            raise InputError(f"FDD: expected a model with an LM head, {type(inner).__name__} has none")
        stored: LMHead | None = getattr(model, "stored_head", None)  # of a teacher whose states are on disk
        self._head = LMHead(output, *scale_and_softcap(inner)) if stored is None else stored
        self._ids = ids
        if ids is not None and type(self._head.linear) is not nn.Linear:
            raise InputError(
                f"FDD: expected a teacher whose LM head is a Linear beside a trimmed vocabulary, got "
                f"{type(self._head.linear).__name__}; load the teacher without quantisation"
            )
        self._depth = num_layers(inner)
        # OPT's, which the last state has passed
        self._narrow = getattr(getattr(inner.base_model, "decoder", None), "project_out", None)

    def states(self, output: ModelOutput, layers: tuple[int, ...], positions: Tensor) -> Tensor:
        """[L, n, d] what the head reads of hidden states, at positions [n] of the batch's tokens."""
        chosen = [output.hidden_states[layer].flatten(0, 1)[positions] for layer in layers]
        if self._narrow is not None:
            dtype = self._narrow.weight.dtype
            chosen = [
                h if layer == self._depth else self._narrow(h.to(dtype))
                for layer, h in zip(layers, chosen, strict=True)
            ]
        widest = functools.reduce(torch.promote_types, (h.dtype for h in chosen))
        return torch.stack([h.to(widest) for h in chosen])

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of states in any dtype."""
        states = states.to(self._head.linear.weight.dtype)
        return self._head.logits(states) if self._ids is None else head_rows(self._head, self._ids).logits(states)
