"""The baseline: the public scripts' algorithm, re-implemented from its description, dense and per batch.

It builds [B, S, S] attention maps of teacher and student, [B, spans of a row, S] memberships, and (spans of
the batch)^2 cosine matrices that are masked to pairs within a row afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLAMP = 1e-5


def public_loss(
    projections: nn.ModuleList | None,
    attention_mask: Tensor,
    student_hidden: dict[int, Tensor],
    teacher_hidden: dict[int, Tensor],
    offset_mapping: Tensor,
    char_spans: list[list[list[tuple[int, int]]]],
) -> Tensor:
    """(1 / L) sum over layer pairs of DSA + 0.1 Hid.

    Args:
        projections: None leaves Hid out.
        char_spans: per layer pair, per row, (start, end) characters.
    """
    losses = []
    for layer, spans in enumerate(char_spans):
        projection = None if projections is None else projections[layer]
        dsa, hid = layer_loss(
            projection, attention_mask, student_hidden[layer], teacher_hidden[layer], offset_mapping, spans
        )
        losses.append(dsa + 0.1 * hid)
    return torch.stack(losses).mean()


def layer_loss(
    projection: Any,  # of weight and bias, or None
    mask: Tensor,
    student: Tensor,
    teacher: Tensor,
    offsets: Tensor,
    char_spans: list[list[tuple[int, int]]],
) -> tuple[Tensor, Tensor]:
    """DSA and Hid of one layer pair; Hid is 0 without a projection."""
    importance_t, importance_s = _importance(teacher, mask), _importance(student.detach(), mask)
    membership = _membership(char_spans, offsets, mask)
    counts = membership.sum(1)
    weight_t = importance_t / (counts * importance_t).sum(1, keepdim=True).clamp(min=CLAMP)
    weight_s = importance_s / (counts * importance_s).sum(1, keepdim=True).clamp(min=CLAMP)
    filled = membership.any(2)
    span_rows = filled.nonzero()[:, 0]

    def pool(hidden: Tensor, weights: Tensor) -> Tensor:
        weighted = membership * weights[:, None, :]
        sums = weighted.to(hidden.dtype) @ hidden
        return (sums / weighted.sum(2, keepdim=True).clamp(min=CLAMP))[filled]

    unit_s = F.normalize(pool(student, weight_s), dim=-1)
    unit_t = F.normalize(pool(teacher, weight_t), dim=-1)
    salience = (membership * weight_t[:, None, :]).sum(2)[filled]
    pair_weights = salience[:, None] * salience
    pair_weights = pair_weights * (span_rows[:, None] == span_rows)
    pair_weights = pair_weights * ~torch.eye(len(span_rows), dtype=torch.bool, device=mask.device)
    dsa = (pair_weights * (unit_s @ unit_s.T - unit_t @ unit_t.T) ** 2).sum() / pair_weights.sum().clamp(min=CLAMP)
    if projection is None:
        return dsa, dsa.new_zeros(())

    cosine = F.cosine_similarity(F.linear(student, projection.weight, projection.bias), teacher, dim=-1, eps=CLAMP)
    token_weight = counts * weight_t
    hid = (token_weight * (1 - cosine)).sum() / token_weight.sum().clamp(min=CLAMP)
    return dsa, hid


def _importance(hidden: Tensor, mask: Tensor) -> Tensor:
    z = hidden / (hidden.std(-1, keepdim=True) + 1e-5)
    scores = z @ z.transpose(1, 2) / hidden.shape[-1] ** 0.5
    hidden_keys = torch.eye(hidden.shape[1], dtype=torch.bool, device=mask.device) | (mask == 0)[:, None, :]
    return scores.masked_fill(hidden_keys, -torch.inf).softmax(-1).mean(1) * mask


def _membership(char_spans: list[list[tuple[int, int]]], offsets: Tensor, mask: Tensor) -> Tensor:
    """[B, spans of the longest row, S], 1 where the token is in the span."""
    bounds = torch.full((len(char_spans), max(map(len, char_spans)), 2), -1)
    for row, spans in enumerate(char_spans):
        bounds[row, : len(spans)] = torch.tensor(spans).reshape(-1, 2)
    bounds = bounds.to(offsets.device)
    start, end = offsets[:, None, :, 0], offsets[:, None, :, 1]
    inside = (start + 1 >= bounds[..., :1]) & (end <= bounds[..., 1:]) & (mask != 0)[:, None, :]
    return inside.float()
