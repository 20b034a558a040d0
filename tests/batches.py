"""Ragged batches: the same rows of tokens, right padded, left padded or packed, with NaN in the padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mta_fast import SpanBatch

LAYOUTS = ("right", "left", "packed")
TokenSpans = list[tuple[int, int]]  # token ranges within a row, in any order

# Row lengths and spans of the edge grid. Each row has its reason:
EDGE_ROWS: list[tuple[int, TokenSpans]] = [
    (7, [(0, 2), (2, 3), (3, 7)]),  # an ordinary row, spans end to end
    (1, [(0, 1)]),  # one token: empty softmax; one span: no pair
    (0, []),  # all padding
    (5, []),  # tokens without spans
    (33, [(4, 9), (0, 33), (4, 9), (20, 21), (8, 21)]),  # unsorted, repeated, nested, overlapping; the longest row
    (2, [(0, 1), (1, 2)]),  # two tokens attend to each other only
]


@dataclass
class RaggedBatch:
    """The rows in one layout."""

    layout: str
    lengths: list[int]
    seq_len: int
    mask: Tensor | None
    cu_seqlens: Tensor | None
    spans: SpanBatch

    def lay(self, rows: list[Tensor], padding: float = torch.nan) -> Tensor:
        """Rows [n_b, ...] as [B, S, ...] with ``padding`` between them, or [T, ...]."""
        if self.layout == "packed":
            return torch.cat(rows)
        out = rows[0].new_full((len(rows), self.seq_len, *rows[0].shape[1:]), padding)
        for b, row in enumerate(rows):
            out[b, self._real(b)] = row
        return out

    def unlay(self, values: Tensor) -> Tensor:
        """The rows of [B, S, ...] or [T, ...], one after the other."""
        if self.layout == "packed":
            return values
        return torch.cat([values[b, self._real(b)] for b in range(len(self.lengths))])

    def _real(self, b: int) -> slice:
        n = self.lengths[b]
        return slice(self.seq_len - n, self.seq_len) if self.layout == "left" else slice(0, n)


def make_batch(layout: str, rows: list[tuple[int, TokenSpans]] = EDGE_ROWS) -> RaggedBatch:
    """A batch of these (length, token spans) rows; token j has the characters [3j, 3j + 1)."""
    lengths = [length for length, _ in rows]
    seq_len = max(lengths) + 2  # every row has padding
    char_spans = [[(3 * first, 3 * last - 2) for first, last in spans] for _, spans in rows]
    offset_rows = [torch.stack([3 * torch.arange(n), 3 * torch.arange(n) + 1], 1) for n in lengths]
    batch = RaggedBatch(layout, lengths, seq_len, None, None, None)  # type: ignore[arg-type]  # filled below
    if layout == "packed":
        batch.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        batch.spans = SpanBatch.from_char_spans(char_spans, torch.cat(offset_rows), cu_seqlens=batch.cu_seqlens)
    else:
        batch.mask = batch.lay([torch.ones(n) for n in lengths], padding=0).long()
        batch.spans = SpanBatch.from_char_spans(char_spans, batch.lay(offset_rows, padding=0), batch.mask)
    return batch


def random_rows(lengths: list[int], *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random rows [n_b, *shape]."""
    return [torch.randn(n, *shape, dtype=dtype) for n in lengths]
