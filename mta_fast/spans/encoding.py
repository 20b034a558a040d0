"""What goes into span extraction and comes out: checked texts, and spans as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mta_fast.errors import InputError
from mta_fast.spans.rules import CharSpan

Encoded = list[bytes]  # of a text: ``encode_spans`` per granularity
Columns = dict[str, list[list[list[int]]]]  # "word_spans": per text [[start, end], ...]


def checked_texts(texts: Iterable[Any]) -> list[str]:
    """The texts as a list; InputError names the row of one that is no Unicode string."""
    if isinstance(texts, str):
        raise InputError("texts: expected a list of strings, got one string; put it into a list")
    rows = list(texts)
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            raise InputError(f"text of row {row}: expected a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text of row {row}: expected Unicode text, got a lone surrogate ({error})") from None
    return list(map(str, rows))  # NumPy's strings are str, but not to spaCy


def encode_spans(spans: Iterable[CharSpan]) -> bytes:
    """(start, end) pairs as little-endian int32, 8 bytes a span: how workers send them and the cache keeps them.

    Raises:
        InputError: no pairs of integers, or one beyond 2^31 - 1.
    """
    pairs = list(spans)
    try:
        table = np.asarray(pairs, "<i4").reshape(len(pairs), 2)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"spans: expected (start, end) pairs of 32-bit integers, got {pairs!r:.80}") from None
    return table.tobytes()


def decode_spans(data: bytes) -> list[list[int]]:
    """[[start, end], ...] of ``encode_spans``."""
    return np.frombuffer(data, "<i4").reshape(-1, 2).tolist()


def decode_columns(rows: Iterable[Encoded | None], granularity: Sequence[str]) -> Columns:
    """The columns of these rows; None is a text that was left without spans."""
    columns: Columns = {f"{kind}_spans": [] for kind in granularity}
    for row in rows:
        for i, column in enumerate(columns.values()):
            column.append([] if row is None else decode_spans(row[i]))
    return columns
