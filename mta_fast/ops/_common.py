"""What the ops share: input checks; they run on the host from shapes and dtypes: none synchronises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mta_fast.backends import AUTOCAST_DEVICES
from mta_fast.contract import FLOATS
from mta_fast.errors import InputError
from mta_fast.layout import Rows, as_tensor, compute_dtype
from mta_fast.reference import power_of_two
from mta_fast.reference import quotient as quotient
from mta_fast.spans.batch import SpanBatch

REDUCTIONS = ("mean", "sample", "none")


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What W h is multiplied in: autocast's dtype where it is on, as in a Linear; else the wider of the two."""
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if promoted != torch.float64 and device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return promoted


def check_float(name: str, tensor: Tensor, ndim: Sequence[int]) -> None:
    """``tensor`` is floating point and has one of these numbers of dimensions."""
    if tensor.dtype not in FLOATS:
        raise InputError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.ndim not in ndim:
        expected = " or ".join(map(str, ndim))
        raise InputError(f"{name}: expected {expected} dimensions, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], why: str) -> None:
    """``tensor`` has exactly this shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise InputError(f"{name}: expected shape {tuple(expected)} ({why}), got {tuple(tensor.shape)}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """All tensors are on ``device``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name}: expected on {device}, got {tensor.device}; move it with .to({str(device)!r})")


def check_spans(spans: SpanBatch, leading: Sequence[int], device: torch.device, name: str = "hidden") -> None:
    """The spans were made for hidden states with this leading shape, and are on their device."""
    if tuple(spans.shape) != tuple(leading):
        raise InputError(
            f"spans: made for tokens of shape {tuple(spans.shape)}, but {name} has {tuple(leading)}; make the "
            f"SpanBatch from the same padded batch (two tokenizers: SpanBatch.pair and teacher_spans=)"
        )
    if spans.device != device:
        raise InputError(f"spans: expected on {device}, got {spans.device}; move them with spans.to({str(device)!r})")


def make_rows(hidden: Tensor, attention_mask: Any, cu_seqlens: Any, rows: Rows | None = None) -> Rows:
    """The rows of ``hidden`` [B, S, d] or [T, d] from at most one description of them, on its device."""
    given = [x is not None for x in (attention_mask, cu_seqlens, rows)]
    if sum(given) > 1:
        raise InputError("rows: expected at most one of attention_mask, cu_seqlens and rows, got several")
    leading = tuple(hidden.shape[:-1])
    if attention_mask is not None:
        attention_mask = as_tensor("attention_mask", attention_mask, "[B, S]")
        check_shape("attention_mask", attention_mask, leading, "hidden.shape[:-1]")
        rows = Rows.from_mask(attention_mask)
    elif cu_seqlens is not None:
        if hidden.ndim != 2:
            raise InputError(f"hidden: expected [T, d] with cu_seqlens, got shape {tuple(hidden.shape)}")
        rows = Rows.from_cu_seqlens(cu_seqlens, hidden.shape[0])
    elif rows is None:
        if hidden.ndim != 3:
            raise InputError("rows: expected cu_seqlens or rows with packed hidden states [T, d], got neither")
        rows = Rows.full(hidden.shape[0], hidden.shape[1])
    if tuple(rows.shape) != leading:
        raise InputError(f"rows: made for tokens of shape {tuple(rows.shape)}, but hidden has {leading}")
    return rows.to(hidden.device)


def flat(tensor: Tensor) -> Tensor:
    """[B, S, d] or [T, d] as [T, d]."""
    return tensor.flatten(0, -2)


def without_scale(name: str, weights: Tensor) -> Tensor:
    """Weights times the power of two that brings their largest near 1: no product or sum of them leaves its range."""
    check_float(name, weights, (1, 2))
    weights = weights.detach().to(compute_dtype(weights))
    return weights * power_of_two(F.pad(weights.abs().flatten(), (0, 1)).amax())
