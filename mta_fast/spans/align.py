"""Character spans to token ranges, for a whole batch, by binary search over the offset mapping. CPU, NumPy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mta_fast.errors import InputError

Integers = npt.NDArray[np.int64]
CharSpans = Sequence[Sequence[Sequence[int]]]  # per row, (start, end) characters


class FlatSpans(NamedTuple):
    """The character spans of a batch, flat: row of each span and its half-open character range."""

    row: Integers  # [N]
    start: Integers  # [N]
    end: Integers  # [N]


class TokenRanges(NamedTuple):
    """What each character span covers, before spans are dropped."""

    start: Integers  # [N] first token within the row
    end: Integers  # [N] one past the last; start == end where no token belongs to the span
    cut: npt.NDArray[np.bool_]  # [N] the span ends beyond the last kept character


def flatten_spans(char_spans: CharSpans, texts: Sequence[str] | None = None) -> FlatSpans:
    """Check and flatten per-row lists of (start, end).

    Raises:
        InputError: start < 0, start >= end, or end beyond the text, with row and span.
    """
    parts = [_pairs(b, row) for b, row in enumerate(char_spans)]
    rows = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    table = np.concatenate([*parts, np.zeros((0, 2), np.int64)])
    start, end = table[:, 0], table[:, 1]
    limit = np.iinfo(np.int64).max if texts is None else np.fromiter(map(len, texts), np.int64, len(texts))[rows]
    wrong = (start < 0) | (start >= end) | (end > limit)
    if wrong.any():
        i = int(wrong.argmax())
        size = "" if texts is None else f" <= {len(texts[rows[i]])} (the length of the text)"
        raise InputError(
            f"character span ({start[i]}, {end[i]}) of row {rows[i]}: expected 0 <= start < end{size}; "
            f"were the spans extracted from another text?"
        )
    return FlatSpans(rows, start, end)


def _pairs(b: int, row: Sequence[Sequence[int]]) -> Integers:
    """One row's spans as [n, 2]."""
    try:
        pairs = np.asarray(row, np.int64)
        if pairs.size == 0 or (pairs.ndim == 2 and pairs.shape[1] == 2):
            return pairs.reshape(-1, 2)
    except (TypeError, ValueError):
        pass
    raise InputError(f"character spans of row {b}: expected (start, end) pairs of integers, got {row!r:.80}")


def belongs_to_spans(offsets: Integers, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[B, S] whether a token can belong to a span: real, and not of zero width (special tokens)."""
    return mask & (offsets[..., 1] > offsets[..., 0])


def token_ranges(
    spans: FlatSpans, offsets: Integers, usable: npt.NDArray[np.bool_], texts: Sequence[str] | None = None
) -> TokenRanges:
    """Token j with offsets [s, t) belongs to the span [c, e) when s + 1 >= c and t <= e.

    One leading character is forgiven, because byte-level BPE keeps the space in the token; with ``texts`` only
    white space is.

    Args:
        offsets: [B, S, 2] character offsets; usable: [B, S] from ``belongs_to_spans``.

    Raises:
        InputError: the offsets of a row's usable tokens decrease.
    """
    token_row, token = np.nonzero(usable)
    start, end = offsets[token_row, token].T
    _check_ascending(token_row, start, end)
    forgiven: Integers = start + (1 if texts is None else _starts_with_space(texts, token_row, start))
    # one ascending key over the batch, so that a single binary search serves all rows
    reach = int(max(end.max(initial=0), spans.end.max(initial=0))) + 2
    first = np.searchsorted(token_row * reach + forgiven, spans.row * reach + spans.start, side="left")
    last = np.searchsorted(token_row * reach + end, spans.row * reach + spans.end, side="right")
    bounds = np.searchsorted(token_row, np.arange(len(usable) + 1))
    kept = np.where(np.diff(bounds) > 0, np.append(end, 0)[bounds[1:] - 1], 0)
    cut = spans.end > kept[spans.row] if len(kept) else np.zeros(0, np.bool_)
    filled = last > first
    begin = np.where(filled, np.append(token, 0)[np.where(filled, first, 0)], 0)
    stop = np.where(filled, np.append(token, 0)[np.where(filled, last - 1, 0)] + 1, 0)
    return TokenRanges(begin, stop, cut)


def _starts_with_space(texts: Sequence[str], row: Integers, start: Integers) -> npt.NDArray[np.bool_]:
    """[K] whether the character ``start`` of the row's text is white space (``str.isspace``)."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    characters = np.frombuffer("".join([*texts, "\0"]).encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = start < lengths[row]
    character = characters[np.where(inside, (np.cumsum(lengths) - lengths)[row] + start, -1)]
    table = _space_table()
    return table[np.minimum(character, len(table) - 1)]


@functools.cache
def _space_table() -> npt.NDArray[np.bool_]:
    """isspace of every code point up to the last one that is white space (U+3000), and False for all others."""
    return np.array([chr(code).isspace() for code in range(0x3001)] + [False])


def _check_ascending(row: Integers, start: Integers, end: Integers) -> None:
    falls = (row[1:] == row[:-1]) & ((start[1:] < start[:-1]) | (end[1:] < end[:-1]))
    if falls.any():
        b = int(row[1:][falls][0])
        raise InputError(
            f"offset_mapping: expected the offsets of a row never to decrease, they do in row {b}; "
            f"tokenise prompt and response as one text"
        )


class CoverLists(NamedTuple):
    """Token to spans, the transpose of the ranges; see ``SpanBatch``."""

    covered: Integers
    splits: Integers
    spans: Integers


def cover_lists(start: Integers, end: Integers, usable: npt.NDArray[np.bool_]) -> CoverLists:
    """The distinct covered tokens, ascending, and the spans of each, ascending.

    Args:
        start, end: [N] flat token ranges; usable: [T] tokens that may belong to a span.
    """
    lengths = end - start
    span = np.repeat(np.arange(len(start)), lengths)
    token = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - start, lengths)
    keep = usable[token]
    span, token = span[keep], token[keep]
    order = np.argsort(token, kind="stable")
    counts = np.bincount(token, minlength=1)
    covered = np.flatnonzero(counts)
    return CoverLists(covered, np.concatenate([[0], np.cumsum(counts[covered])]), span[order])
