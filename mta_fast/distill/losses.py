"""Base distillation losses of the KL family: token means over the positions whose label counts.

p is the teacher's distribution, q the student's; both from logits, in float32 (float64 for float64).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mta_fast.errors import InputError
from mta_fast.reference import compute_dtype
from mta_fast.spans.collate import IGNORED_LABEL


def skewed_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float = 0.1) -> Tensor:
    """SRKL: mean over counted positions of KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898).

    The gradient goes through the mixture. The mixture is taken in log space.

    Args:
        student_logits, teacher_logits: [B, S, V], any floating dtype; logits at position j predict label j + 1.
        labels: [B, S], -100 where a token does not count (prompt, padding).
        alpha: share of the student in the mixture, 0 < alpha < 1.

    Returns:
        A scalar; 0 with a graph when no position counts.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha: expected a number between 0 and 1, got {alpha}")
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"teacher_logits: expected {tuple(student_logits.shape)} as the student's, got "
            f"{tuple(teacher_logits.shape)}; models of different vocabularies share no distribution"
        )
    if tuple(labels.shape) != tuple(student_logits.shape[:2]):
        raise InputError(f"labels: expected {tuple(student_logits.shape[:2])}, got {tuple(labels.shape)}")
    counted = labels[:, 1:] != IGNORED_LABEL
    dtype = compute_dtype(student_logits, teacher_logits)
    log_q = F.log_softmax(student_logits[:, :-1][counted].to(dtype), -1)
    log_p = F.log_softmax(teacher_logits[:, :-1][counted].detach().to(dtype), -1)
    log_mixture = torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
    divergence = (log_q.exp() * (log_q - log_mixture)).sum(-1)
    return divergence.sum() / max(divergence.numel(), 1)
