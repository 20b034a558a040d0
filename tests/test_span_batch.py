"""Character spans to token ranges."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from batches import make_batch
from torch.utils.data import DataLoader

from mta_fast import SpanBatch
from mta_fast.errors import InputError

OFFSETS = torch.tensor([[[0, 0], [0, 5], [5, 8], [8, 9], [9, 14], [0, 0]]])  # <s> Hello| to|,| you|</s>


def _ranges(char_spans: list[tuple[int, int]], **options: object) -> list[list[int]]:
    return SpanBatch.from_char_spans([char_spans], OFFSETS, **options).ranges.tolist()  # type: ignore[arg-type]


def test_by_hand() -> None:
    assert _ranges([(0, 5)]) == [[1, 2]]
    assert _ranges([(6, 8)]) == [[2, 3]]  # the token holds the space before the word
    assert _ranges([(0, 9), (9, 14), (6, 14)]) == [[1, 4], [3, 5], [2, 5]]  # the comma is forgiven before "you"
    assert _ranges([(1, 5)]) == [[1, 2]]  # and so is the H
    assert _ranges([(2, 5), (0, 4)]) == []  # no token is inside


def test_with_the_text_only_white_space_is_forgiven() -> None:
    text = "Hello to, you."
    assert text[5] == " "
    assert _ranges([(6, 8)], texts=[text]) == [[2, 3]]
    assert _ranges([(9, 14)], texts=[text]) == [[4, 5]]  # without the comma
    assert _ranges([(1, 5)], texts=[text]) == []


def test_white_space_of_any_alphabet() -> None:
    import sys

    spaces = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    for space in [*spaces, "_", "☕", "𝒳"]:  # a token that holds the character before a word
        made = SpanBatch.from_char_spans([[(1, 3)]], torch.tensor([[[0, 3]]]), texts=[f"{space}ab"])
        assert made.num_spans == space.isspace(), space


def test_truncation_drops_what_it_cuts() -> None:
    assert _ranges([(6, 20), (0, 5)]) == [[1, 2]]
    assert _ranges([(6, 20), (0, 5)], drop_truncated=False) == [[2, 5], [1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_against_the_rule_token_by_token(seed: int) -> None:
    rng = random.Random(seed)
    rows, offsets, mask = [], [], []
    for _ in range(4):
        position, row = 0, []
        for _ in range(9):
            width = rng.choice([0, 1, 1, 2, 5])  # a width of 0 is a special token
            row.append([position, position + width])
            position += width
        offsets.append(row)
        real = rng.randint(0, 9)
        mask.append([1] * real + [0] * (9 - real))
        starts = [rng.randint(0, position) for _ in range(6)]
        rows.append([(start, start + rng.randint(1, 8)) for start in starts])
    made = SpanBatch.from_char_spans(rows, torch.tensor(offsets), torch.tensor(mask))
    expected = []
    for b, spans in enumerate(rows):
        real = [j for j in range(9) if mask[b][j] and offsets[b][j][1] > offsets[b][j][0]]
        last = max((offsets[b][j][1] for j in real), default=0)
        for start, end in spans:
            members = [j for j in real if offsets[b][j][0] + 1 >= start and offsets[b][j][1] <= end]
            if members and end <= last:
                expected.append((b, [9 * b + j for j in members]))
    assert made.span_rows.tolist() == [b for b, _ in expected]
    tokens: list[list[int]] = [[] for _ in expected]
    for c, token in enumerate(made.covered.tolist()):
        for u in made.cover_spans[made.cover_splits[c] : made.cover_splits[c + 1]].tolist():
            tokens[u].append(token)
    assert tokens == [members for _, members in expected]
    assert made.ranges.tolist() == [[members[0], members[-1] + 1] for _, members in expected]


def test_order_and_repeats_are_kept() -> None:
    assert _ranges([(9, 14), (0, 5), (9, 14)]) == [[3, 5], [1, 2], [3, 5]]


def test_pair_keeps_the_same_spans_on_both_sides() -> None:
    student = torch.tensor([[[0, 2], [2, 4], [4, 6], [6, 8]]])
    teacher = torch.tensor([[[0, 3], [3, 6], [0, 0]]])  # truncated after character 6
    spans = [[(0, 4), (4, 8), (0, 6), (4, 6), (3, 6)]]
    own, other = SpanBatch.pair(spans, (student, None), (teacher, torch.tensor([[1, 1, 0]])))
    # (4, 8) is cut on the teacher's side; (0, 4) has no whole token [3, 6) but [0, 3); (4, 6) forgives the 3
    assert own.ranges.tolist() == [[0, 2], [0, 3], [2, 3], [1, 3]]
    assert other.ranges.tolist() == [[0, 1], [0, 2], [1, 2], [1, 2]]
    assert own.span_splits.tolist() == other.span_splits.tolist() == [0, 4]


def test_index_tensors() -> None:
    batch = make_batch("left", [(4, [(0, 2), (1, 4)]), (0, []), (2, [(1, 2)])]).spans
    assert batch.shape == (3, 6)
    assert batch.ranges.tolist() == [[2, 4], [3, 6], [17, 18]]
    assert batch.span_rows.tolist() == [0, 0, 2]
    assert batch.span_splits.tolist() == [0, 2, 2, 3]
    assert batch.covered.tolist() == [2, 3, 4, 5, 17]
    assert batch.covered_rows.tolist() == [0, 0, 0, 0, 2]
    assert batch.cover_splits.tolist() == [0, 1, 3, 4, 5, 6]
    assert batch.cover_spans.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.host.tolist() == [[0, 0], [2, 5], [2, 5], [3, 6]]
    assert batch.rows.host.tolist() == [[2, 4], [6, 0], [16, 2]]
    assert all(tensor.dtype == torch.int32 for tensor in batch.index_tensors())
    assert all(getattr(batch, name) is tensor for name, tensor in batch.index._asdict().items())


def test_moves_and_travels() -> None:
    batch = make_batch("right").spans
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    assert (moved.host.device.type, moved.rows.host.device.type) == ("cpu", "cpu")
    again = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(a, b) for a, b in zip(batch.index_tensors(), again.index_tensors(), strict=True))


def test_made_in_a_data_loader_worker() -> None:
    rows = [[(0, 5)], [(6, 8)]]
    loader = DataLoader(rows, batch_size=2, num_workers=1, collate_fn=_collate)  # type: ignore[arg-type]
    (batch,) = list(loader)
    assert batch.ranges.tolist() == [[1, 2], [8, 9]]


def _collate(rows: list[list[tuple[int, int]]]) -> SpanBatch:
    return SpanBatch.from_char_spans(rows, OFFSETS.expand(len(rows), -1, -1))


def test_errors_name_row_and_span() -> None:
    with pytest.raises(InputError, match=r"span \(4, 4\) of row 1: expected 0 <= start < end"):
        SpanBatch.from_char_spans([[(0, 1)], [(0, 2), (4, 4)]], OFFSETS.expand(2, -1, -1))
    with pytest.raises(InputError, match=r"span \(-1, 4\) of row 0"):
        _ranges([(-1, 4)])
    with pytest.raises(InputError, match=r"span \(0, 30\) of row 0: expected 0 <= start < end <= 14"):
        _ranges([(0, 30)], texts=["Hello to, you."])
    with pytest.raises(InputError, match="expected 1 rows, got 2"):
        SpanBatch.from_char_spans([[], []], OFFSETS)
    with pytest.raises(InputError, match="row 0 has a hole"):
        _ranges([(0, 5)], attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]]))
    with pytest.raises(InputError, match=r"offset_mapping: expected \[B, S, 2\], got shape \(6, 2\)"):
        SpanBatch.from_char_spans([[]], OFFSETS[0])
    with pytest.raises(InputError, match="never to decrease, they do in row 0"):
        SpanBatch.from_char_spans([[]], torch.tensor([[[4, 6], [0, 2]]]))
    with pytest.raises(InputError, match="attention_mask or cu_seqlens, got both"):
        SpanBatch.from_char_spans([[]], OFFSETS[0], torch.ones(1, 6), torch.tensor([0, 6]))
    with pytest.raises(InputError, match=r"spans of row 0: expected \(start, end\) pairs of integers"):
        _ranges([(0, 5, 1)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="texts: expected 1 rows, got 0"):
        _ranges([(0, 5)], texts=[])
