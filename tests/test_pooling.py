"""Span pooling and the weights of tokens and spans."""

from __future__ import annotations

import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, make_batch, random_rows

from mta_fast import SpanBatch, normalize_weights, pool_spans, reference
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.ops.pooling import _pool_spans, _pool_spans_gradient, _span_weights

pytestmark = pytest.mark.usefixtures("cpu_backend")

LENGTHS = [length for length, _ in EDGE_ROWS]
NUM_SPANS = sum(len(spans) for _, spans in EDGE_ROWS)


def _one_row(spans: list[tuple[int, int]], length: int = 4) -> SpanBatch:
    return make_batch("packed", [(length, spans)]).spans


def test_weights_by_hand() -> None:
    spans = _one_row([(0, 2), (1, 3)])  # token 1 counts twice, token 3 not at all
    made = normalize_weights(torch.tensor([1.0, 2.0, 3.0, 100.0]).double(), spans)
    torch.testing.assert_close(made.token, torch.tensor([1.0, 2.0, 3.0, 0.0]).double() / 8)
    torch.testing.assert_close(made.span, torch.tensor([3.0, 5.0]).double() / 8)
    assert made.row_total.tolist() == [8]


def test_pooling_by_hand() -> None:
    spans = _one_row([(0, 2), (3, 4)])
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [5.0, 7.0]])
    pooled, weight = pool_spans(hidden, torch.tensor([1.0, 3.0, 1.0, 0.5]), spans)
    torch.testing.assert_close(pooled, torch.tensor([[0.25, 0.75], [5.0, 7.0]]))
    assert weight.tolist() == [4.0, 0.5]


def test_span_of_weight_zero_pools_to_zero_with_zero_gradient() -> None:
    spans = _one_row([(0, 2), (2, 4)])
    hidden = torch.randn(4, 3, requires_grad=True)
    pooled, weight = pool_spans(hidden, torch.tensor([0.0, 0.0, 1.0, 1.0]), spans)
    pooled.sum().backward()
    assert pooled[0].tolist() == [0, 0, 0]
    assert weight[0] == 0
    assert hidden.grad is not None
    assert hidden.grad[:2].abs().max() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_packing_change_nothing(layout: str) -> None:
    rows, values = random_rows(LENGTHS, 5), [row.abs() for row in random_rows(LENGTHS)]
    batch, packed = make_batch(layout), make_batch("packed")
    made = normalize_weights(batch.lay(values), batch.spans)
    expected = normalize_weights(packed.lay(values), packed.spans)
    assert torch.equal(batch.unlay(made.token), expected.token)
    assert torch.equal(made.span, expected.span)
    hidden = batch.lay(rows).requires_grad_()
    pooled, _ = pool_spans(hidden, made.token, batch.spans)
    assert torch.equal(pooled, pool_spans(packed.lay(rows), expected.token, packed.spans)[0])
    pooled.square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()  # padding holds NaN and receives 0


def test_row_weights_sum_to_one() -> None:
    batch = make_batch("right")
    made = normalize_weights(torch.rand(len(LENGTHS), batch.seq_len), batch.spans)
    sums = [made.span[batch.spans.span_rows == b].sum().item() for b in range(len(LENGTHS))]
    assert sums == pytest.approx([1, 1, 0, 0, 1, 1])


def test_rows_whose_values_are_zero() -> None:
    made = normalize_weights(torch.zeros(4), _one_row([(0, 2)]))
    assert made.token.tolist() == [0, 0, 0, 0]
    assert made.span.tolist() == [0]


def test_token_of_zero_width_inside_a_span_weighs_nothing() -> None:
    offsets = torch.tensor([[[0, 1], [0, 0], [3, 4]]])
    offsets[0, 1] = 1  # a special token between two words
    spans = SpanBatch.from_char_spans([[(0, 4)]], offsets)
    assert spans.ranges.tolist() == [[0, 3]]
    assert spans.covered.tolist() == [0, 2]
    assert normalize_weights(torch.ones(1, 3), spans).token.tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    batch = make_batch(layout, [(5, [(0, 3), (2, 5), (0, 3)]), (2, [])])
    hidden = batch.lay(random_rows([5, 2], 3), padding=0).requires_grad_()
    weights = torch.rand(hidden.shape[:-1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: pool_spans(h, weights, batch.spans)[0], hidden)


def test_explicit_gradient_equals_autograd_of_the_reference() -> None:
    batch = make_batch("packed")
    hidden = torch.cat(random_rows(LENGTHS, 6)).requires_grad_()
    weights, grad = torch.rand(len(hidden), dtype=torch.float64), torch.randn(NUM_SPANS, 6, dtype=torch.float64)
    index, rows = reference.Spans(*batch.spans.index_tensors()), batch.spans.rows
    pooled, span_weight, _ = reference.pool_spans(hidden, weights, index, rows.table, rows.host)
    (expected,) = torch.autograd.grad(pooled, hidden, grad)
    explicit = reference.pool_spans_gradient(grad, span_weight, weights, index, torch.float64)
    torch.testing.assert_close(explicit, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    batch = make_batch("packed")
    hidden = torch.cat(random_rows(LENGTHS, 9)).to(dtype).requires_grad_()
    weights = torch.rand(len(hidden))
    pooled, _ = pool_spans(hidden, weights, batch.spans)
    exact, _ = pool_spans(hidden.detach().double(), weights.double(), batch.spans)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=1e-6)
    pooled.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_double_backward_raises() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    pooled, _ = pool_spans(hidden, torch.ones(4), _one_row([(0, 2)]))
    with pytest.raises(DoubleBackwardError, match="pool_spans"):
        torch.autograd.grad(pooled.sum(), hidden, create_graph=True)


def test_retain_graph_and_checkpoint_give_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    spans, hidden = _one_row([(0, 2), (1, 4)]), torch.randn(4, 3, requires_grad=True)
    pooled, _ = pool_spans(hidden, torch.ones(4), spans)
    first, second = (torch.autograd.grad(pooled.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    again = checkpoint(lambda h: pool_spans(h, torch.ones(4), spans)[0], hidden, use_reentrant=False)
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(again.sum(), hidden)[0], first)


def test_errors_name_expected_and_received() -> None:
    batch = make_batch("right")
    hidden = torch.randn(len(LENGTHS), batch.seq_len, 3)
    with pytest.raises(InputError, match="made for tokens of shape"):
        pool_spans(hidden[:, 1:], torch.ones(hidden.shape[:-1])[:, 1:], batch.spans)
    with pytest.raises(InputError, match=r"weights: expected shape"):
        pool_spans(hidden, torch.ones(3, 4), batch.spans)
    with pytest.raises(InputError, match="spans: expected on meta, got cpu; move them with"):
        pool_spans(hidden.to("meta"), torch.ones(hidden.shape[:-1], device="meta"), batch.spans)
    with pytest.raises(InputError, match="values: expected float64"):
        normalize_weights(torch.ones(hidden.shape[:-1], dtype=torch.long), batch.spans)


def test_opcheck() -> None:
    spans = make_batch("packed").spans
    hidden = torch.cat(random_rows(LENGTHS, 4)).requires_grad_()
    weights, index = torch.rand(len(hidden), dtype=torch.float64), spans.index_tensors()
    rows = [spans.rows.table, spans.rows.host]
    torch.library.opcheck(_span_weights, (weights, index, "reference"))
    torch.library.opcheck(_pool_spans, (hidden, weights, index, rows, "reference"))
    grad, span_weight = torch.randn(NUM_SPANS, 4).double(), torch.rand(NUM_SPANS).double()
    torch.library.opcheck(_pool_spans_gradient, (grad, span_weight, weights, index, torch.float64, "reference"))
