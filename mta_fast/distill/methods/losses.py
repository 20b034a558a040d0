"""Base distillation losses: token sums or means over the positions whose label counts, and the method of one.

p is the teacher's distribution, q the student's; both from logits, in float32 (float64 for float64). Logits at
position j predict label j + 1. Every loss here is called as ``loss(student_logits, teacher_logits, labels)``.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mta_fast.choices import check_choice, nearest
from mta_fast.distill.heads import HeadStates
from mta_fast.distill.methods.base import BaseMethod, Batch, ModelOutput, head_of
from mta_fast.errors import InputError
from mta_fast.layout import compute_dtype
from mta_fast.ops.linear_divergence import check_detached, divergence, linear_divergence_loss
from mta_fast.spans.collate import IGNORED_LABEL

Reduction = Literal["mean", "sum"]


class BaseLoss(Protocol):
    """What a base loss is called with."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """A scalar; 0 with a graph and a warning when no position counts. A sequence-level loss reads no teacher."""
        ...


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """KL(p || q) at the counted positions (Hinton et al., arXiv 1503.02531, temperature 1).

    Args:
        student_logits, teacher_logits: [B, S, V], any floating dtype; logits at position j predict label j + 1.
        labels: [B, S], -100 where a token does not count (prompt, padding).
        reduction: "mean" over the counted positions, or "sum".

    Returns:
        A scalar; 0 with a graph, and a warning, when no position counts.

    Raises:
        InputError: shapes that don't match, an unknown reduction.
    """
    log = log_probabilities(student_logits, teacher_logits, labels)
    return _reduced(divergence(log.p, log.q, "forward_kl"), reduction)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """KL(q || p) at the counted positions (MiniLLM, arXiv 2306.08543). Arguments as in ``forward_kl``."""
    log = log_probabilities(student_logits, teacher_logits, labels)
    return _reduced(divergence(log.p, log.q, "reverse_kl"), reduction)


def skewed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """SKL: KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898).

    Args:
        student_logits, teacher_logits, labels, reduction: as in ``forward_kl``.
        alpha: share of the other side in the mixture (here the teacher's), 0 < alpha < 1.
        detach_mixture: no gradient through the student's part of the mixture (SKL then has none at all).
    """
    check_share("alpha", alpha)
    log = log_probabilities(student_logits, teacher_logits, labels)
    return _reduced(divergence(log.p, log.q, "skl", alpha, detach=detach_mixture), reduction)


def skewed_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """SRKL: KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898).

    Args:
        student_logits, teacher_logits, labels, reduction: as in ``forward_kl``.
        alpha: share of the student in the mixture, 0 < alpha < 1. The mixture is taken in log space.
        detach_mixture: no gradient through the student's part of the mixture.
    """
    check_share("alpha", alpha)
    log = log_probabilities(student_logits, teacher_logits, labels)
    return _reduced(divergence(log.p, log.q, "srkl", alpha, detach=detach_mixture), reduction)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalised JS: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    Args:
        student_logits, teacher_logits, labels, reduction: as in ``forward_kl``.
        beta: share of the teacher, 0 < beta < 1.
    """
    check_share("beta", beta)
    log = log_probabilities(student_logits, teacher_logits, labels)
    return _reduced(divergence(log.p, log.q, "jsd", beta=beta), reduction)


def cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """-log q(label) at the counted positions; reads no teacher, so the two may have different vocabularies.

    On responses that the teacher wrote this is sequence-level distillation (Kim and Rush, arXiv 1606.07947).
    Arguments as in ``forward_kl``.
    """
    _check_labels(student_logits, labels)
    counted = counted_positions(labels)
    log_q = F.log_softmax(student_logits[:, :-1][counted].to(compute_dtype(student_logits)), -1)
    warn_where_nothing_counts(log_q)
    return _reduced(-log_q.gather(-1, labels[:, 1:][counted][:, None]).squeeze(-1), reduction)


BASE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skl": skewed_kl,
    "srkl": skewed_reverse_kl,
    "jsd": jensen_shannon,
    "cross_entropy": cross_entropy,
}
# the teacher's logits are not read: what two tokenizers can use
SEQUENCE_LEVEL_LOSSES = frozenset({"cross_entropy"})


def base_loss(name: str, **options: float | bool) -> BaseLoss:
    """A base loss by its name in ``BASE_LOSSES``, with options such as ``alpha`` set.

    Raises:
        InputError: an unknown name, or an option that the loss does not have.
    """
    check_choice("base loss", name, BASE_LOSSES)
    parameters = inspect.signature(BASE_LOSSES[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "reduction"]
    for option in options:
        if option not in known:
            raise InputError(
                f"base loss {name}: expected options among {', '.join(known) or 'none'}, got {option!r}"
                f"{nearest(option, known)}"
            )
    return functools.partial(BASE_LOSSES[name], **options)


def counted_positions(labels: Tensor) -> Tensor:
    """[B, S - 1] whether position j predicts a label that counts."""
    return labels[:, 1:] != IGNORED_LABEL


def counted_tokens(labels: Tensor) -> Tensor:
    """[M] the counted positions among the flat tokens [B * S], row after row; position i predicts token i + 1.

    The one synchronisation of a base loss through heads.
    """
    return F.pad(counted_positions(labels), (0, 1)).flatten().nonzero()[:, 0]


class LogProbabilities(NamedTuple):
    """[M, V] log-probabilities at the counted positions; the teacher's without a graph."""

    p: Tensor
    q: Tensor


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LogProbabilities:
    """Both sides at the counted positions, row after row; arguments as in ``forward_kl``."""
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"teacher_logits: expected {tuple(student_logits.shape)} as the student's, got "
            f"{tuple(teacher_logits.shape)}; models of different vocabularies share no distribution"
        )
    _check_labels(student_logits, labels)
    counted = counted_positions(labels)
    dtype = compute_dtype(student_logits, teacher_logits)
    log_q = F.log_softmax(student_logits[:, :-1][counted].to(dtype), -1)
    warn_where_nothing_counts(log_q)
    log_p = F.log_softmax(teacher_logits[:, :-1][counted].detach().to(dtype), -1)
    return LogProbabilities(log_p, log_q)


def warn_where_nothing_counts(counted: Tensor) -> None:
    """In words, once a place: a loss of 0 looks like a good one. Choosing the positions has synchronised already."""
    if not torch.compiler.is_compiling() and not len(counted):
        warnings.warn(
            f"labels: expected one that counts in the batch, got {IGNORED_LABEL} everywhere (the first token's is not "
            f"predicted), so its base loss is 0; are the responses empty, or cut off by max_length?",
            stacklevel=4,
        )


def _check_labels(student_logits: Tensor, labels: Tensor) -> None:
    if tuple(labels.shape) != tuple(student_logits.shape[:2]):
        raise InputError(f"labels: expected {tuple(student_logits.shape[:2])}, got {tuple(labels.shape)}")


def check_share(name: str, share: float) -> None:
    """Refuse a share that isn't between 0 and 1."""
    if not 0 < share < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {share}")


def _reduced(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)


def through_heads(
    student: HeadStates, teacher: HeadStates | None, tokens: Tensor, divergence: str, **options: Any
) -> Tensor:
    """``linear_divergence_loss`` of two passes at flat tokens [M], as ``counted_tokens`` gives them."""
    options |= {"divergence": divergence, "vocabulary": student.vocabulary}
    options |= {"student_scale": student.head.scale, "student_softcap": student.head.softcap}
    if teacher is not None:
        weight, bias = teacher.head.weight_and_bias()
        options |= {"teacher_hidden": teacher.at(tokens), "teacher_weight": weight, "teacher_bias": bias}
        options |= {"teacher_scale": teacher.head.scale, "teacher_softcap": teacher.head.softcap}

    def loss(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_divergence_loss(states, weight, student_bias=bias, **options)

    return student.head.call(student.at(tokens), loss)


# --- as a base method --------------------------------------------------------------------------------------------

SKEWED_LOSSES = ("srkl", "skl")


class TokenMethod(BaseMethod):
    """A loss of ``BASE_LOSSES``: the mean over the counted positions."""

    reads_heads = True
    follows_progress = False

    def __init__(self, loss: str = "srkl", **options: float | bool) -> None:
        super().__init__()
        self._name, self._loss, self._options = loss, base_loss(loss, **options), options
        for option in ("alpha", "beta"):
            if option in options:
                check_share(option, float(options[option]))
        check_detached(loss, bool(options.get("detach_mixture")))
        self.reads_teacher = loss not in SEQUENCE_LEVEL_LOSSES

    @property
    def name(self) -> str:
        """That of the loss."""
        return self._name

    def counts(self, batch: Batch) -> Tensor:
        """[1] counted positions."""
        return counted_positions(batch["labels"]).sum()[None]

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[1] the loss, summed over the counted positions."""
        own, other = head_of(student), head_of(teacher)
        if own is None or (other is None and self.reads_teacher):
            return self._loss(student.logits, teacher.logits, batch["labels"], reduction="sum")[None]
        tokens = counted_tokens(batch["labels"])
        warn_where_nothing_counts(tokens)
        options = self._options if self.reads_teacher else {"labels": batch["labels"].flatten()[tokens + 1]}
        other = other if self.reads_teacher else None
        return through_heads(own, other, tokens, self._name, reduction="sum", **options)[None]


def skewed_method(loss: str, alpha: float, detach_mixture: bool) -> TokenMethod:
    """SRKL or SKL, as the token loss of another method.

    Raises:
        InputError: another loss, an alpha outside 0 to 1, or a detached SKL.
    """
    check_choice("loss", loss, SKEWED_LOSSES)
    return TokenMethod(loss, alpha=alpha, detach_mixture=detach_mixture)
