"""FDD: the distribution of every mapped layer, through the LM head, and how it changes from layer to layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mta_fast.config import LayerPairs, checked_layer_pairs
from mta_fast.distill.methods.base import BaseMethod, Batch, ModelOutput, head_of
from mta_fast.distill.methods.losses import skewed_method
from mta_fast.errors import InputError
from mta_fast.inputs import attended
from mta_fast.layers import num_layers, unwrap
from mta_fast.layout import compute_dtype

Head = Callable[[int, Tensor], Tensor]  # (layer, its hidden state [n, d]) -> logits [n, V]
LOGIT_BUDGET = 1 << 24  # logits of all mapped layers, both sides, that are in memory at once: 64 MB of float32


class FDD(BaseMethod):
    """L_FDD = traj + der, added to a token loss (feature dynamics distillation).

    With u_l = LMhead(h_l) of mapped layer l:

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
        self._heads: tuple[Head, Head] | None = None

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
        self._heads = lm_head(student), lm_head(teacher)
        return self

    def counts(self, batch: Batch) -> Tensor:
        """[2] counted positions, attended positions."""
        return torch.cat([self._token.counts(batch), attended(batch).sum()[None]])

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[2] the token loss and traj + der, each summed over its positions."""
        if self._heads is None:
            raise InputError("FDD: expected the models' heads, got none; call attach(student, teacher) first")
        own = head_of(student)
        tokens = attended(batch).flatten().nonzero()[:, 0]
        student_head, teacher_head = self._heads
        dynamics = feature_dynamics(
            [student.hidden_states[layer].flatten(0, 1)[tokens] for layer in self.student_layers],
            [teacher.hidden_states[layer].flatten(0, 1)[tokens].detach() for layer in self.teacher_layers],
            [functools.partial(student_head, layer) for layer in self.student_layers],
            [functools.partial(teacher_head, layer) for layer in self.teacher_layers],
            tau=self.tau,
            vocabulary=student.logits.shape[-1] if own is None else own.ids,
        )
        token = self._token.sums(student, teacher, batch)
        return torch.cat([token, dynamics[None].to(token.dtype)])


def feature_dynamics(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    student_heads: Sequence[Callable[[Tensor], Tensor]],
    teacher_heads: Sequence[Callable[[Tensor], Tensor]],
    *,
    tau: float,
    vocabulary: int,
) -> Tensor:
    """traj + der of FDD, summed over the tokens.

    The tokens go piece by piece, and the backward makes each piece's logits anew: never more than LOGIT_BUDGET of
    [layers, tokens, V] are kept, whatever the batch.

    Args:
        student_states, teacher_states: of each mapped layer, [n, d]; the teacher's without a graph.
        student_heads, teacher_heads: from a layer's states to logits [n, >= vocabulary].
        tau: temperature of the trajectory. vocabulary: how many ids are compared.
    """
    layers, tokens = len(student_states), len(student_states[0])
    size = max(1, LOGIT_BUDGET // (2 * layers * vocabulary))

    def piece(*states: Tensor) -> Tensor:
        student = _logits(student_heads, states[:layers], vocabulary)
        with torch.no_grad():
            teacher = _logits(teacher_heads, states[layers:], vocabulary)
        return _dynamics(student, teacher, tau)

    total = sum((state[:0].sum() for state in student_states), torch.zeros((), device=student_states[0].device))
    for first in range(0, tokens, size):
        part = [state[first : first + size] for state in (*student_states, *teacher_states)]
        total = total + checkpoint(piece, *part, use_reentrant=False)
    return total


def _logits(heads: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor], vocabulary: int) -> list[Tensor]:
    return [head(state)[..., :vocabulary].to(compute_dtype(state)) for head, state in zip(heads, states, strict=True)]


def _dynamics(student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float) -> Tensor:
    """traj + der of all layers' logits [n, V], summed over the n tokens."""
    trajectory, derivative = [], []
    before: tuple[Tensor, Tensor] | None = None
    for u_s, u_t in zip(student, teacher, strict=True):
        log_p, log_q = F.log_softmax(u_t / tau, -1), F.log_softmax(u_s / tau, -1)
        trajectory.append((log_p.exp() * (log_p - log_q)).sum())
        now = F.log_softmax(u_t, -1), F.log_softmax(u_s, -1)
        if before is not None:
            derivative.append((1 - F.cosine_similarity(now[0] - before[0], now[1] - before[1], dim=-1)).sum())
        before = now
    total = torch.stack(trajectory).mean()
    return total + torch.stack(derivative).mean() if derivative else total


def lm_head(model: nn.Module) -> Head:
    """A model's head for the hidden state of any layer.

    Raises:
        InputError: a model without output embeddings.
    """
    inner: Any = unwrap(model)
    output = inner.get_output_embeddings()
    if output is None:
        raise InputError(f"FDD: expected a model with an LM head, {type(inner).__name__} has none")
    depth = num_layers(inner)
    narrow = getattr(getattr(inner.base_model, "decoder", None), "project_out", None)  # OPT's: the last state passed it

    def head(layer: int, state: Tensor) -> Tensor:
        logits: Tensor = output(state if narrow is None or layer == depth else narrow(state))
        return logits

    return head
