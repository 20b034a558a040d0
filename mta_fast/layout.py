"""What ops and backends hand each other: rows, spans and gradients as tensors, and in which dtype they are.

One layout of every op: flat tokens [T, d] plus (start, length) of each row. Right padding, left padding and packed
sequences are three ways to make the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast.errors import InputError


def as_tensor(name: str, values: Any, expected: str) -> Tensor:
    """``values`` (a tensor, an array or nested lists) as a tensor."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected {expected}, got {type(values).__name__} ({error})") from None


@dataclass(frozen=True, eq=False)
class Rows:
    """Where each row's real tokens lie in the flat token axis.

    Attributes:
        table: [B, 2] int32, (start, length) of each row, on the device of the hidden states.
        host: the same table on the CPU, so that grids and loops need no synchronisation; with capacities [B, 3], how
            long a row may be in the third column.
        shape: (B, S) of a padded batch or (T,) of a packed one; ``hidden.shape[:-1]`` must equal it.
    """

    table: Tensor
    host: Tensor
    shape: tuple[int, ...]

    @classmethod
    def from_mask(cls, attention_mask: Any) -> Rows:
        """Rows of a padded batch.

        Args:
            attention_mask: [B, S], non-zero at real tokens; a tensor of any dtype or nested lists. Each row's real
                tokens are contiguous (left or right padding); a mask on a GPU costs one synchronisation.

        Raises:
            InputError: the mask is not [B, S] or a row has a hole.
        """
        attention_mask = as_tensor("attention_mask", attention_mask, "[B, S]")
        if attention_mask.ndim != 2:
            raise InputError(f"attention_mask: expected [B, S], got shape {tuple(attention_mask.shape)}")
        _check_size(attention_mask.numel())
        mask = attention_mask.detach().cpu() != 0
        length = mask.sum(1)
        start = mask.int().argmax(1) if mask.shape[1] else torch.zeros_like(length)
        position = torch.arange(mask.shape[1])
        end = (start + length)[:, None]
        holes = (mask != ((position >= start[:, None]) & (position < end))).any(1)
        if holes.any():
            row = int(holes.nonzero()[0, 0])
            raise InputError(
                f"attention_mask: expected the real tokens of a row to be contiguous (left or right padding), "
                f"row {row} has a hole; give packed sequences as cu_seqlens instead"
            )
        start = start + torch.arange(mask.shape[0]) * mask.shape[1]
        host = torch.stack([start, length], 1).int()
        return cls(host.to(attention_mask.device), host, tuple(mask.shape))

    @classmethod
    def full(cls, batch: int, length: int) -> Rows:
        """Rows of a [batch, length] batch without padding, on the CPU."""
        _check_size(batch * length)
        start = torch.arange(batch, dtype=torch.int32) * length
        host = torch.stack([start, torch.full_like(start, length)], 1)
        return cls(host, host, (batch, length))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any, num_tokens: int) -> Rows:
        """Rows of packed sequences.

        Args:
            cu_seqlens: [B + 1] integers, 0 first, never decreasing; a GPU tensor costs one synchronisation.
            num_tokens: T, the length of the flat token axis.
        """
        cu_seqlens = as_tensor("cu_seqlens", cu_seqlens, "[B + 1] integers")
        if cu_seqlens.ndim != 1 or not cu_seqlens.numel() or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"cu_seqlens: expected [B + 1] of int32 or int64, got shape {tuple(cu_seqlens.shape)} "
                f"of {cu_seqlens.dtype}"
            )
        _check_size(num_tokens)
        bounds = cu_seqlens.detach().cpu()
        length = bounds.diff()
        if int(bounds[0]) != 0 or bool((length < 0).any()) or int(bounds[-1]) > num_tokens:
            raise InputError(
                f"cu_seqlens: expected 0 first, no decrease and at most T = {num_tokens} last, got {bounds.tolist()}"
            )
        host = torch.stack([bounds[:-1], length], 1).int()
        return cls(host.to(cu_seqlens.device), host, (num_tokens,))

    def with_capacity(self, longest: int) -> Rows:
        """The same rows, for kernels whose launches must fit any rows of up to ``longest`` tokens.

        Raises:
            InputError: a row is longer.
        """
        lengths = self.host[:, 1]
        if bool((lengths > longest).any()):
            raise InputError(f"capacities: expected rows of at most {longest} tokens, got {int(lengths.max())}")
        return replace(self, host=torch.cat([self.host[:, :2], torch.full_like(lengths, longest)[:, None]], 1))

    def same_tokens(self, other: Rows) -> bool:
        """Whether both hold the same real tokens; compared on the host."""
        same = self.host[:, :2] == other.host[:, :2]
        empty = (self.host[:, 1] == 0) & (other.host[:, 1] == 0)  # where an empty row starts means nothing
        return self.shape == other.shape and bool((same.all(1) | empty).all())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows with ``table`` on ``device``."""
        return replace(self, table=self.table.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """The same rows with ``table`` in pinned memory."""
        return replace(self, table=self.table.pin_memory())


def _check_size(tokens: int) -> None:
    if tokens >= 2**31:
        raise InputError(f"rows: expected fewer than 2^31 tokens (indices are int32), got {tokens}; split the batch")


class Spans(NamedTuple):
    """The index tensors of N spans over T flat tokens in B rows; int32, made by ``SpanBatch``."""

    ranges: Tensor  # [N, 2] first token and one past the last, flat
    span_rows: Tensor  # [N] row of each span
    span_splits: Tensor  # [B + 1] spans of row b: span_splits[b] to span_splits[b + 1]
    covered: Tensor  # [C] distinct covered tokens, ascending
    covered_rows: Tensor  # [C] row of each covered token
    covered_splits: Tensor  # [B + 1] covered tokens of row b: covered_splits[b] to covered_splits[b + 1]
    cover_splits: Tensor  # [C + 1] spans of covered token c: cover_spans[cover_splits[c] : cover_splits[c + 1]]
    cover_spans: Tensor  # [I] span of each incidence
    token_splits: Tensor  # [T + 1] the same lists by token: cover_spans[token_splits[j] : token_splits[j + 1]]
    host: Tensor  # [B + 1, 2] on the CPU: span_splits, and how many range tokens the spans before them hold; with
    # capacities [B + 1, 3]: the most that span_splits may be


class AlignmentGradient(NamedTuple):
    """Gradients of the Hid numerator, weight and bias in the compute dtype."""

    student: Tensor  # [C, d_S], one row per listed token, in ``kept_dtype``
    weight: Tensor  # [d_T, d_S]
    bias: Tensor  # [d_T]; [0] without a bias


class DivergenceGradient(NamedTuple):
    """Gradients of the weighted sum of divergences, in the compute dtype."""

    student: Tensor  # [M, d_S], in ``kept_dtype``
    weight: Tensor  # [V_S, d_S]
    bias: Tensor  # [V_S]; [0] without a bias


class Head(NamedTuple):
    """What an LM head does beside its product: logits = softcap(scale (W h + bias)) / temperature."""

    scale: float = 1.0
    softcap: float = 0.0  # c tanh(z / c); 0: none
    temperature: float = 1.0


def has_capacities(host: Tensor) -> bool:
    """Whether a table on the CPU, of rows or of spans, says how large a batch may be."""
    return host.ndim == 2 and host.shape[1] == 3


def refuse_capacities(host: Tensor) -> None:
    """For what reads the lengths of a batch on the host, where a captured step has those of another one.

    Raises:
        InputError: the table has capacities.
    """
    if has_capacities(host):
        raise InputError(
            "spans: expected a batch without capacities, got one with them, which only MTALoss and the ops of the "
            "backend 'triton' keep to; give capacities to steps that are captured on a GPU alone"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def kept_dtype(student: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """What the listed tokens' gradients wait for the backward in: bfloat16 has float32's exponents, float16 not."""
    return torch.bfloat16 if student == torch.bfloat16 else compute
