"""Span alignment in C++ and in NumPy against the rule written out, over random ragged batches."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mta_fast import SpanBatch, _extension
from mta_fast.errors import BackendUnavailableError, InputError
from mta_fast.spans import align

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(bool(_extension.why_missing()), reason="no C++"))]
needs_cpp = pytest.mark.skipif(bool(_extension.why_missing()), reason=str(_extension.why_missing()))
ops = torch.ops.mta_fast_cpp

Pairs = list[tuple[int, int]]


@dataclass
class Case:
    """Ragged rows in one layout, and what ``SpanBatch.from_char_spans`` takes."""

    layout: str
    tokens: list[Pairs]  # the real tokens' offsets of each row
    spans: list[Pairs]
    texts: list[str] | None
    drop_truncated: bool

    def arguments(self) -> dict[str, Any]:
        lengths = [len(row) for row in self.tokens]
        size = max(lengths, default=0) + 2
        flat = np.array([pair for row in self.tokens for pair in row], np.int64).reshape(-1, 2)
        if self.layout == "packed":
            return {"offset_mapping": flat, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
        offsets = torch.full((len(lengths), size, 2), -7)  # padding must not be read
        mask = torch.zeros(len(lengths), size)
        for b, row in enumerate(self.tokens):
            real = slice(size - len(row), size) if self.layout == "left" else slice(0, len(row))
            offsets[b, real], mask[b, real] = torch.tensor(row).reshape(-1, 2), 1
        return {"offset_mapping": offsets, "attention_mask": mask}

    def first_tokens(self) -> list[int]:
        """The flat position of each row's first real token."""
        lengths = [len(row) for row in self.tokens]
        if self.layout == "packed":
            return [sum(lengths[:b]) for b in range(len(lengths))]
        size = max(lengths, default=0) + 2
        return [b * size + (size - n if self.layout == "left" else 0) for b, n in enumerate(lengths)]

    def members(self, b: int, span: tuple[int, int]) -> list[int]:
        """The tokens of row ``b`` that belong to the span, by the rule."""
        text = None if self.texts is None else self.texts[b]
        return [
            j
            for j, (s, t) in enumerate(self.tokens[b])
            if t > s and s + (text is None or text[s : s + 1].isspace()) >= span[0] and t <= span[1]
        ]

    def expected(self) -> dict[str, list]:
        """The spans that are kept, and the spans of each token."""
        kept, lists = [], {}
        for b, (spans, first) in enumerate(zip(self.spans, self.first_tokens(), strict=True)):
            last = max((t for s, t in self.tokens[b] if t > s), default=0)
            for span in spans:
                members = self.members(b, span)
                if members and not (self.drop_truncated and span[1] > last):
                    for j in members:
                        lists.setdefault(first + j, []).append(len(kept))
                    kept.append((b, first + members[0], first + members[-1] + 1))
        counts = [end - start for _, start, end in kept]
        before = [sum(row < b for row, _, _ in kept) for b in range(len(self.tokens) + 1)]
        return {
            "ranges": [[start, end] for _, start, end in kept],
            "span_rows": [row for row, _, _ in kept],
            "span_splits": before,
            "host": [[n, sum(counts[:n])] for n in before],
            "lists": sorted(lists.items()),
        }


@st.composite
def rows_of_tokens(draw: st.DrawFn) -> Pairs:
    """Offsets that never decrease: ordinary, special (zero width), repeated, overlapping, or apart."""
    start, end, row = 0, 0, []
    for kind, width in draw(st.lists(st.tuples(st.sampled_from("onrag"), st.integers(1, 4)), max_size=9)):
        if kind == "n":
            row.append(draw(st.sampled_from([(0, 0), (end, end)])))
            continue
        start = {"o": end, "r": start, "a": end + 1, "g": end + 2}[kind]
        end = max(end, start + width)
        row.append((start, end))
    return row


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.lists(rows_of_tokens(), max_size=4))
    reach = [max((t for _, t in row), default=0) for row in tokens]
    with_texts = draw(st.booleans())
    # shorter ones too: a token may begin beyond its text
    texts = [draw(st.text("ab \n\u3000_𝒳", min_size=max(n - 3, 1), max_size=n + 5)) for n in reach]
    spans = []
    for b, n in enumerate(reach):
        last = len(texts[b]) if with_texts else n + 4
        pair = st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted).filter(lambda p: p[0] < p[1])
        row = draw(st.lists(pair.map(tuple), max_size=8))
        spans.append(row + row[:2])  # repeated ones too
    layout = draw(st.sampled_from(["right", "left", "packed"]))
    return Case(layout, tokens, spans, texts if with_texts else None, draw(st.booleans()))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_against_the_rule(backend: str, case: Case) -> None:
    made = SpanBatch.from_char_spans(
        case.spans, **case.arguments(), texts=case.texts, drop_truncated=case.drop_truncated, backend=backend
    )
    expected = case.expected()
    for name in ("ranges", "span_rows", "span_splits", "host"):
        assert getattr(made, name).tolist() == expected[name], name
    check_covers(made, expected["lists"], case.first_tokens())


def check_covers(made: SpanBatch, lists: list[tuple[int, list[int]]], first_tokens: list[int]) -> None:
    """The cover lists hold these spans of these tokens, in all three forms."""
    assert made.covered.tolist() == [token for token, _ in lists]
    splits, spans = made.cover_splits.tolist(), made.cover_spans.tolist()
    assert [spans[a:b] for a, b in pairwise(splits)] == [of for _, of in lists]
    by_token, found = made.token_splits.tolist(), dict(lists)
    size = int(np.prod(made.shape))
    assert [spans[by_token[j] : by_token[j + 1]] for j in range(size)] == [found.get(j, []) for j in range(size)]
    lengths = made.rows.host[:, 1].tolist()
    rows = [
        next(b for b, start in enumerate(first_tokens) if start <= token < start + lengths[b]) for token, _ in lists
    ]
    assert made.covered_rows.tolist() == rows
    assert made.covered_splits.tolist() == [sum(row < b for row in rows) for b in range(len(lengths) + 1)]
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in made.index_tensors())


@needs_cpp
@settings(max_examples=150, deadline=None)
@given(own=cases(), others=st.lists(rows_of_tokens(), min_size=4, max_size=4))
def test_pairs_are_the_same(own: Case, others: list[Pairs]) -> None:
    teacher = Case("right", others[: len(own.tokens)], own.spans, None, True)
    student = Case("left", own.tokens, own.spans, None, True)
    sides = [tuple(side.arguments().values()) for side in (student, teacher)]
    by_backend = [SpanBatch.pair(own.spans, *sides, backend=name) for name in ("cpp", "reference")]
    for cpp, reference in zip(*by_backend, strict=True):
        for a, b in zip(cpp.index_tensors(), reference.index_tensors(), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()  # torch.compile makes one graph for each


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_of_other_types(backend: str) -> None:
    offsets = torch.tensor([[[0, 2], [2, 4]]])
    pairs = [(0, 2), (0, 4)]
    for row in (pairs, tuple(map(list, pairs)), np.array(pairs), torch.tensor(pairs), [np.array(p) for p in pairs]):
        assert SpanBatch.from_char_spans([row], offsets, backend=backend).ranges.tolist() == [[0, 1], [0, 2]]  # type: ignore[list-item]
    whole = [(0, 2**63 - 1)]  # beyond every token
    made = SpanBatch.from_char_spans([whole], offsets, drop_truncated=False, backend=backend)
    assert made.ranges.tolist() == [[0, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([(4, 4)], r"span \(4, 4\) of row 1: expected 0 <= start < end; were"),
        ([(-1, 4)], r"span \(-1, 4\) of row 1"),
        ([(0, 5, 1)], r"spans of row 1: expected \(start, end\) pairs of integers, got \[\(0, 5, 1\)\]"),
        ([(0, 2), 7], r"spans of row 1: expected \(start, end\) pairs"),
        ([(0, "x")], r"spans of row 1: expected \(start, end\) pairs"),
        ([(0, 2**63)], r"spans of row 1: expected \(start, end\) pairs"),
        (["ab"], r"spans of row 1: expected \(start, end\) pairs"),
        (7, r"spans of row 1: expected \(start, end\) pairs"),
    ],
)
def test_bad_spans(backend: str, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpanBatch.from_char_spans([[(0, 1)], row], torch.zeros(2, 3, 2), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([[4, 6], [0, 2]], "offsets of a row never to decrease, they do in row 1; tokenise"),
        ([[0, 6], [1, 5]], "never to decrease, they do in row 1"),
        ([[-2, 6], [1, 7]], "never to be negative, they are in row 1"),
    ],
)
def test_bad_offsets(backend: str, row: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpanBatch.from_char_spans([[], []], torch.tensor([[[0, 1], [1, 2]], row]), backend=backend)


def test_which_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_missing", lambda: "it is not built here")
    assert align.choose() == align.choose("reference") == "reference"
    with pytest.raises(
        BackendUnavailableError, match="expected backend 'cpp', got a refusal: it is not built here; or"
    ):
        SpanBatch.from_char_spans([[]], torch.zeros(1, 2, 2), backend="cpp")
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    assert align.choose() == align.choose("cpp") == "cpp"
    assert align.choose("reference") == "reference"
    with pytest.raises(InputError, match="expected one of auto, cpp, reference, got 'numpy'"):
        align.choose("numpy")


@needs_cpp
def test_the_chosen_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module in ("align", "align_cpp"):
        for name in ("flatten_spans", "token_ranges", "span_index"):
            monkeypatch.setattr(f"mta_fast.spans.{module}.{name}", _spy(module, name, called))
    for backend, module in (("auto", "align_cpp"), ("cpp", "align_cpp"), ("reference", "align")):
        called.clear()
        SpanBatch.from_char_spans([[(0, 2)]], torch.tensor([[[0, 2]]]), backend=backend)
        assert [found for found in called if found[1] != "flatten_spans"] == [
            (module, "token_ranges"),
            (module, "span_index"),
        ]


def _spy(module: str, name: str, called: list[tuple[str, str]]) -> Callable[..., Any]:
    original = getattr(sys.modules[f"mta_fast.spans.{module}"], name)

    def spy(*args: Any) -> Any:
        called.append((module, name))
        return original(*args)

    return spy


def _range_arguments(**changes: Tensor | None) -> list[Tensor | None]:
    """Two rows of three tokens and three spans as ``token_ranges`` takes them, with changes."""
    fine: dict[str, Tensor | None] = {
        "offsets": torch.tensor([[0, 1], [1, 2], [2, 3]] * 2),
        "rows": torch.tensor([[0, 3], [3, 3]]),
        "span_rows": torch.tensor([0, 0, 1]),
        "char_spans": torch.tensor([[0, 1], [1, 3], [0, 3]]),
        "characters": torch.zeros(6, dtype=torch.int32),
        "text_splits": torch.tensor([0, 3, 6]),
        "spaces": torch.zeros(4, dtype=torch.bool),
    }
    return list((fine | changes).values())


@needs_cpp
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": torch.zeros(6, 2)}, "offsets: expected Long, got Float"),
        ({"offsets": torch.zeros(6, 3).long()}, "offsets: expected 2 columns, got 3"),
        ({"offsets": torch.zeros(12).long()}, "offsets: expected 2 dimensions, got 1"),
        ({"offsets": torch.zeros(2, 6).long().T}, "offsets: expected a contiguous tensor"),
        (
            {"rows": torch.tensor([[0, 3], [3, 4]])},
            "rows: expected ascending rows within 6 tokens, got (3, 4) in row 1",
        ),
        ({"rows": torch.tensor([[0, 3], [2, 3]])}, "rows: expected ascending rows"),
        ({"rows": torch.tensor([[0, -1], [2, 3]])}, "rows: expected ascending rows"),
        ({"rows": torch.tensor([[0, 3], [3, 2**63 - 1]])}, "rows: expected ascending rows"),
        ({"span_rows": torch.tensor([0, 0, 2])}, "span_rows: expected ascending values from 0 to 1, got 2"),
        ({"span_rows": torch.tensor([0, 1, 0])}, "span_rows: expected ascending values from 0 to 1, got 0"),
        ({"span_rows": torch.tensor([-1, 0, 0])}, "span_rows: expected ascending values from 0 to 1, got -1"),
        ({"char_spans": torch.zeros(2, 2).long()}, "char_spans: expected 3 rows, got 2"),
        ({"characters": torch.zeros(6)}, "characters: expected Int, got Float"),
        ({"text_splits": torch.tensor([0, 3, 7])}, "text_splits: expected ascending values from 0 to 6, got 7"),
        ({"text_splits": torch.tensor([0, 6])}, "text_splits: expected 3 rows, got 2"),
        ({"spaces": None}, "texts: expected characters, their splits and a table of white space, got some of them"),
    ],
)
def test_token_ranges_checks_before_it_reads(changes: dict[str, Tensor | None], message: str) -> None:
    assert ops.token_ranges(*_range_arguments())[2] == -1
    with pytest.raises(RuntimeError) as error:
        ops.token_ranges(*_range_arguments(**changes))
    assert message in str(error.value)


@needs_cpp
@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 1], [1, 3], [2, 6]], "ranges: expected token ranges within their row, got (2, 6)"),
        ([[0, 1], [1, 4], [3, 6]], "got (1, 4)"),
        ([[0, 1], [-1, 3], [3, 6]], "got (-1, 3)"),
        ([[0, 1], [2, 1], [3, 6]], "got (2, 1)"),
        ([[0, 1], [1, 3]], "ranges: expected 3 rows, got 2"),
    ],
)
def test_span_index_checks_before_it_reads(ranges: list[list[int]], message: str) -> None:
    offsets, rows, span_rows = _range_arguments()[:3]
    assert len(ops.span_index(span_rows, torch.tensor([[0, 1], [1, 3], [3, 6]]), offsets, rows)) == 10
    with pytest.raises(RuntimeError) as error:
        ops.span_index(span_rows, torch.tensor(ranges), offsets, rows)
    assert message in str(error.value)


@needs_cpp
def test_the_gil_is_released() -> None:
    tokens = 1_000_000
    bounds = torch.arange(tokens)
    offsets = torch.stack([bounds, bounds + 1], 1)
    spans = torch.stack([bounds.flip(0), bounds.flip(0) + 1], 1)
    rows, row = torch.tensor([[0, tokens]]), torch.zeros(tokens, dtype=torch.long)
    assert not _turns_during(lambda: sum(range(5_000_000)))  # the interpreter's own loops hold it
    for op in (
        lambda: ops.token_ranges(offsets, rows, row, spans, None, None, None),
        lambda: ops.span_index(row, spans, offsets, rows),
    ):
        assert any(_turns_during(op) for _ in range(100))  # again where the system gave this thread no turn


def _turns_during(function: Callable[[], Any]) -> int:
    """How often this thread got its turn while another one was inside ``function``, which can only give it up."""
    events: list[str] = []

    def work() -> None:
        events.append("begin")
        function()
        events.append("end")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # the interpreter takes no thread's turn away
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            events.append("turn")
            time.sleep(0.0001)
    finally:
        sys.setswitchinterval(interval)
    return events[events.index("begin") : events.index("end")].count("turn")
