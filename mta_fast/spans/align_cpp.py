"""The functions of ``align`` in C++: the same results and messages; all but ``flatten_spans``, which reads
lists, run without the GIL. ``align.choose`` has loaded the extension before they are called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mta_fast.layout import Spans
from mta_fast.spans import align
from mta_fast.spans.align import CharSpans, FlatSpans, Integers, TokenRanges

_ops = torch.ops.mta_fast_cpp


def flatten_spans(char_spans: CharSpans, texts: Sequence[str] | None = None) -> FlatSpans:
    """``align.flatten_spans``."""
    pairs = importlib.import_module("mta_fast._C").pairs

    def read_row(b: int, row: Sequence[Sequence[int]]) -> Integers:
        values = pairs(row)
        return align.read_pairs(b, row) if values is None else np.frombuffer(values, np.int64).reshape(-1, 2)

    return align.flatten_spans(char_spans, texts, read_row)


def token_ranges(
    spans: FlatSpans, offsets: Integers, rows: Integers, texts: Sequence[str] | None = None
) -> TokenRanges:
    """``align.token_ranges``."""
    characters = splits = spaces = None
    if texts is not None:
        points, starts = align.code_points(texts)
        characters, splits, spaces = _tensor(points.view(np.int32)), _tensor(starts), _tensor(align.space_table())
    arrays = (_tensor(array) for array in (offsets, rows, spans.row, spans.bounds))
    ranges, cut, bad_row = _ops.token_ranges(*arrays, characters, splits, spaces)
    if bad_row >= 0:
        align.token_ranges(spans, offsets, rows, texts)  # raises: the message stands there
        raise AssertionError(f"row {bad_row}: only the C++ kernels find these offsets wrong")
    return TokenRanges(ranges.numpy(), cut.numpy())


def span_index(row: Integers, ranges: Integers, offsets: Integers, rows: Integers) -> Spans:
    """``align.span_index``."""
    return Spans(*_ops.span_index(*(_tensor(array) for array in (row, ranges, offsets, rows))))


def _tensor(array: npt.NDArray) -> Tensor:
    contiguous = np.ascontiguousarray(array)
    # torch shares the memory; an array that can't be written to (a string's bytes) it would warn about
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
