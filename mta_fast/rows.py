"""Ragged rows, the one layout of every op: flat tokens [T, d] plus (start, length) of each row.

Right padding, left padding and packed sequences are three ways to make the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mta_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class Rows:
    """Where each row's real tokens lie in the flat token axis.

    Attributes:
        table: [B, 2] int32, (start, length) of each row, on the device of the hidden states.
        host: the same table on the CPU, so that grids and loops need no synchronisation.
        shape: (B, S) of a padded batch or (T,) of a packed one; ``hidden.shape[:-1]`` must equal it.
    """

    table: Tensor
    host: Tensor
    shape: tuple[int, ...]

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> Rows:
        """Rows of a padded batch.

        Args:
            attention_mask: [B, S], non-zero at real tokens; any dtype. Each row's real tokens are
                contiguous (left or right padding); a mask on a GPU costs one synchronisation.

        Raises:
            InputError: the mask is not [B, S] or a row has a hole.
        """
        if attention_mask.ndim != 2:
            raise InputError(f"attention_mask: expected [B, S], got shape {tuple(attention_mask.shape)}")
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
        start = torch.arange(batch, dtype=torch.int32) * length
        host = torch.stack([start, torch.full_like(start, length)], 1)
        return cls(host, host, (batch, length))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_tokens: int) -> Rows:
        """Rows of packed sequences.

        Args:
            cu_seqlens: [B + 1] integers, 0 first, never decreasing; a GPU tensor costs one synchronisation.
            num_tokens: T, the length of the flat token axis.
        """
        if cu_seqlens.ndim != 1 or not cu_seqlens.numel() or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"cu_seqlens: expected [B + 1] of int32 or int64, got shape {tuple(cu_seqlens.shape)} "
                f"of {cu_seqlens.dtype}"
            )
        bounds = cu_seqlens.detach().cpu()
        length = bounds.diff()
        if int(bounds[0]) != 0 or bool((length < 0).any()) or int(bounds[-1]) > num_tokens:
            raise InputError(
                f"cu_seqlens: expected 0 first, no decrease and at most T = {num_tokens} last, got {bounds.tolist()}"
            )
        host = torch.stack([bounds[:-1], length], 1).int()
        return cls(host.to(cu_seqlens.device), host, (num_tokens,))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows with ``table`` on ``device``."""
        return replace(self, table=self.table.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """The same rows with ``table`` in pinned memory."""
        return replace(self, table=self.table.pin_memory())
