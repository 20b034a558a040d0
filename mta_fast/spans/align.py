"""Character spans to token ranges, and token ranges to index tensors, for a whole batch.

This NumPy code is the definition and backend "reference"; ``align_cpp`` holds the same three functions in C++. Both
read ragged rows: flat tokens and (start, length) of each row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mta_fast import _extension
from mta_fast.choices import check_choice
from mta_fast.errors import BackendUnavailableError, InputError
from mta_fast.layout import Spans

BACKENDS = ("cpp", "reference")  # in order of preference
Integers = npt.NDArray[np.int64]
CharSpans = Sequence[Sequence[Sequence[int]]]  # per row, (start, end) characters


def choose(backend: str = "auto") -> str:
    """What aligns where ``backend`` is asked for: "cpp" or "reference"; "auto" takes C++ where it is built.

    Raises:
        InputError: no backend of alignment has that name.
        BackendUnavailableError: "cpp" was asked for and is not built; the message says why.
    """
    check_choice("span alignment", backend, ("auto", *BACKENDS))
    if backend == "reference":
        return backend
    reason = _extension.why_missing()
    if reason and backend == "cpp":
        raise BackendUnavailableError(
            f"span alignment: expected backend 'cpp', got a refusal: {reason}; or use backend='auto'"
        )
    return "reference" if reason else "cpp"


class FlatSpans(NamedTuple):
    """The character spans of a batch, row after row."""

    row: Integers  # [N], ascending
    bounds: Integers  # [N, 2] half-open character range within the row's text


class TokenRanges(NamedTuple):
    """What each character span covers, before spans are dropped."""

    ranges: Integers  # [N, 2] first token and one past the last, flat; (0, 0) where no token belongs to the span
    cut: npt.NDArray[np.bool_]  # [N] the span ends beyond the last kept character


def flatten_spans(
    char_spans: CharSpans,
    texts: Sequence[str] | None = None,
    read_row: Callable[[int, Sequence[Sequence[int]]], Integers] | None = None,
) -> FlatSpans:
    """Check and flatten per-row lists of (start, end).

    Args:
        read_row: (row number, its spans) -> [n, 2]; None: ``read_pairs``.

    Raises:
        InputError: start < 0, start >= end, or end beyond the text, with row and span.
    """
    parts = [(read_row or read_pairs)(b, row) for b, row in enumerate(char_spans)]
    rows = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    bounds = np.concatenate([*parts, np.zeros((0, 2), np.int64)])
    start, end = bounds.T
    limit = np.iinfo(np.int64).max if texts is None else np.fromiter(map(len, texts), np.int64, len(texts))[rows]
    wrong = (start < 0) | (start >= end) | (end > limit)
    if wrong.any():
        i = int(wrong.argmax())
        size = "" if texts is None else f" <= {len(texts[rows[i]])} (the length of the text)"
        raise InputError(
            f"character span ({start[i]}, {end[i]}) of row {rows[i]}: expected 0 <= start < end{size}; "
            f"were the spans extracted from another text?"
        )
    return FlatSpans(rows, bounds)


def read_pairs(b: int, row: Sequence[Sequence[int]]) -> Integers:
    """The spans of row ``b`` as [n, 2]."""
    try:
        pairs = np.asarray(row, np.int64)
        if pairs.size == 0 or (pairs.ndim == 2 and pairs.shape[1] == 2):
            return pairs.reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"character spans of row {b}: expected (start, end) pairs of integers, got {row!r:.80}")


def token_ranges(
    spans: FlatSpans, offsets: Integers, rows: Integers, texts: Sequence[str] | None = None
) -> TokenRanges:
    """Token j with offsets [s, t) belongs to the span [c, e) when s + 1 >= c and t <= e.

    One leading character is forgiven, because byte-level BPE keeps the space in the token; with ``texts`` only
    white space is. A token of zero width (special tokens) belongs to no span.

    Args:
        offsets: [T, 2] character offsets of the flat tokens.
        rows: [B, 2] (start, length) of each row's real tokens, ascending.

    Raises:
        InputError: offsets of a row decrease or are negative.
    """
    token, token_row = _tokens_with_width(offsets, rows)
    start, end = offsets[token].T
    _check_offsets(token_row, start, end)
    forgiven: Integers = start + (1 if texts is None else _starts_with_space(texts, token_row, start))
    # one ascending key over the batch, so that a single binary search serves all rows
    reach = int(end.max(initial=0)) + 2
    bounds = np.minimum(spans.bounds, reach - 1)  # beyond every token
    first = np.searchsorted(token_row * reach + forgiven, spans.row * reach + bounds[:, 0], side="left")
    last = np.searchsorted(token_row * reach + end, spans.row * reach + bounds[:, 1], side="right")
    splits = np.searchsorted(token_row, np.arange(len(rows) + 1))
    kept = np.where(np.diff(splits) > 0, np.append(end, 0)[splits[1:] - 1], 0)
    cut = spans.bounds[:, 1] > kept[spans.row] if len(kept) else np.zeros(0, np.bool_)
    filled, token = last > first, np.append(token, 0)
    begin = np.where(filled, token[np.where(filled, first, 0)], 0)
    stop = np.where(filled, token[np.where(filled, last - 1, 0)] + 1, 0)
    return TokenRanges(np.stack([begin, stop], 1), cut)


def _tokens_with_width(offsets: Integers, rows: Integers) -> tuple[Integers, Integers]:
    """The real tokens that can belong to a span, ascending, and the row of each."""
    start, length = rows.T
    row = np.repeat(np.arange(len(rows)), length)
    token = np.arange(len(row)) + np.repeat(start - np.cumsum(length) + length, length)
    keep = offsets[token, 1] > offsets[token, 0]
    return token[keep], row[keep]


def code_points(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], Integers]:
    """The characters of all texts, one after the other, and where each text begins [B + 1]."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return characters, np.concatenate([[0], np.cumsum(lengths)])


@functools.cache
def space_table() -> npt.NDArray[np.bool_]:
    """isspace of every code point up to the last one that is white space (U+3000), and False for all others."""
    return np.array([chr(code).isspace() for code in range(0x3001)] + [False])


def _starts_with_space(texts: Sequence[str], row: Integers, start: Integers) -> npt.NDArray[np.bool_]:
    """[K] whether the character ``start`` of the row's text is white space (``str.isspace``)."""
    characters, splits = code_points(texts)
    position = splits[row] + start
    characters, table = np.append(characters, 0), space_table()
    character = characters[np.where(position < splits[row + 1], position, -1)]
    return table[np.minimum(character, len(table) - 1)]


def _check_offsets(row: Integers, start: Integers, end: Integers) -> None:
    falls = (row[1:] == row[:-1]) & ((start[1:] < start[:-1]) | (end[1:] < end[:-1]))
    for wrong, what in ((row[1:][falls], "to decrease, they do"), (row[start < 0], "to be negative, they are")):
        if len(wrong):
            raise InputError(
                f"offset_mapping: expected the offsets of a row never {what} in row {wrong[0]}; "
                f"tokenise prompt and response as one text"
            )


def span_index(row: Integers, ranges: Integers, offsets: Integers, rows: Integers) -> Spans:
    """The index tensors of a SpanBatch (see there).

    Args:
        row: [N] ascending, ranges: [N, 2] flat, as ``token_ranges`` finds them, without the spans that are dropped.
        offsets, rows: as in ``token_ranges``.
    """
    start, end = ranges.T
    lengths = end - start
    span = np.repeat(np.arange(len(row)), lengths)
    token = np.arange(len(span)) - np.repeat(np.cumsum(lengths) - lengths - start, lengths)
    keep = offsets[token, 1] > offsets[token, 0]
    span, token = span[keep], token[keep]
    order = np.argsort(token, kind="stable")
    counts = np.bincount(token, minlength=len(offsets))
    covered = np.flatnonzero(counts)
    splits = np.searchsorted(row, np.arange(len(rows) + 1))
    covered_rows = np.searchsorted(rows[:, 0], covered, side="right") - 1
    return Spans(
        ranges=_int32(ranges),
        span_rows=_int32(row),
        span_splits=_int32(splits),
        covered=_int32(covered),
        covered_rows=_int32(covered_rows),
        covered_splits=_int32(np.searchsorted(covered_rows, np.arange(len(rows) + 1))),
        cover_splits=_int32(np.concatenate([[0], np.cumsum(counts[covered])])),
        cover_spans=_int32(span[order]),
        token_splits=_int32(np.concatenate([[0], np.cumsum(counts)])),
        host=_int32(np.stack([splits, np.concatenate([[0], np.cumsum(lengths)])[splits]], 1)),
    )


def _int32(values: npt.NDArray) -> Tensor:
    # through empty: an empty array has strides of its own, for which torch.compile would make another graph
    return torch.empty(values.shape, dtype=torch.int32).copy_(torch.from_numpy(np.ascontiguousarray(values)))
