"""Span pooling: token weights normalised over the spans of a row, and the weighted mean state of each span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast import backends
from mta_fast.contract import as_spans, unpacked
from mta_fast.layout import compute_dtype
from mta_fast.ops._common import check_device, check_float, check_shape, check_spans, flat
from mta_fast.ops._operator import fake, fitting, operator, register_backward
from mta_fast.spans.batch import SpanBatch


class SpanWeights(NamedTuple):
    """Token values normalised over the span incidences of each row."""

    token: Tensor  # w, [B, S] or [T]; 0 where no span covers the token
    span: Tensor  # W [N], the sum of w over each span (salience); sums to 1 over a row
    row_total: Tensor  # [B] sum over the incidences before the normalisation


def normalize_weights(values: Tensor, spans: SpanBatch, *, backend: str = "auto") -> SpanWeights:
    """w_j = v_j / sum_j' n_j' v_j' per row, n_j the number of spans over token j; W_u = sum of w over span u.

    Formula: ``mta_fast/reference.py``, part 2. Only covered tokens are read, so padding may hold anything. Detached.

    Args:
        values: [B, S] or [T] importances (``token_importance``) or entropy weights, not negative.
        spans: the spans of the same tokens.
        backend: "auto" or a backend's name.

    Raises:
        InputError: shape, dtype or device.
    """
    check_float("values", values, (1, 2))
    check_spans(spans, values.shape, values.device, "values")
    backends.check_name(backend)
    op = fitting(_span_weights, spans.host)
    token, span, row_total = op(values.detach().reshape(-1), spans.index_tensors(), backend)
    return SpanWeights(token.reshape(values.shape), span, row_total)


def pool_spans(hidden: Tensor, weights: Tensor, spans: SpanBatch, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Weighted mean state of each span: v_u = sum_j w_j h_j / sum_j w_j (arXiv 2605.01374;
    formula: ``mta_fast/reference.py``, part 3).

    The scale of ``weights`` does not matter to the mean, subnormal or huge; a span whose weights sum to exactly 0 pools
    to the zero vector, with gradient 0. Differentiable in ``hidden`` (once); the weights receive no gradient.

    Args:
        hidden: [B, S, d] or [T, d]; any floating dtype.
        weights: [B, S] or [T], not negative; ``normalize_weights(...).token``. Give tokens of zero width weight 0.
        spans: the spans of the same tokens.
        backend: "auto" or a backend's name.

    Returns:
        pooled [N, d] and span_weight [N] = sum_j w_j: float64 for float64 hidden states, else float32 (in which a sum
        may be infinite or 0; the mean is taken with the sum in float64).

    Raises:
        InputError: shape, dtype or device. DoubleBackwardError: a second derivative.
    """
    check_float("hidden", hidden, (2, 3))
    check_float("weights", weights, (1, 2))
    check_shape("weights", weights, hidden.shape[:-1], "hidden.shape[:-1]")
    check_device(hidden.device, weights=weights)
    check_spans(spans, hidden.shape[:-1], hidden.device)
    backends.check_name(backend)
    pooled, span_weight, _norm = pooled_spans(flat(hidden), weights.reshape(-1), spans, backend=backend)
    return pooled, span_weight.to(pooled.dtype)


class PooledSpans(NamedTuple):
    """What pooling leaves for the span pairs: the mean states and, from the same pass over memory, their lengths."""

    states: Tensor  # [N, d]
    span_weight: Tensor  # [N] float64
    norm: Tensor  # [N] lengths of the states; detached, as span_pairs goes through the normalisation itself


def pooled_spans(hidden: Tensor, weights: Tensor, spans: SpanBatch, *, backend: str = "auto") -> PooledSpans:
    """``pool_spans`` of flat states [T, d] and weights [T], which are not checked, with the lengths of the spans."""
    rows = [spans.rows.table, spans.rows.host]
    op = fitting(_pool_spans, spans.host)
    pooled, span_weight, norm = op(hidden, weights.detach(), spans.index_tensors(), rows, backend)
    return PooledSpans(pooled, span_weight.detach(), norm.detach())


# Below, ``spans`` are the tensors of ``layout.Spans`` in its order, ``rows`` the table on device and host.


@operator("span_weights", reads_lengths=True)
def _span_weights(values: Tensor, spans: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = backends.run("span_weights", backend, [values], values, as_spans(spans))
    return result


@fake(_span_weights)
def _(values: Tensor, spans: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    dtype, index = compute_dtype(values), as_spans(spans)
    sizes = (values.shape[0], index.ranges.shape[0], index.span_splits.shape[0] - 1)
    return tuple(values.new_empty(size, dtype=dtype) for size in sizes)


@operator("pool_spans", reads_lengths=True)
def _pool_spans(
    hidden: Tensor, weights: Tensor, spans: Sequence[Tensor], rows: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    table, host = unpacked("rows", rows, ("rows", "rows_host"))
    result: tuple[Tensor, Tensor, Tensor] = backends.run(
        "pool_spans", backend, [hidden, weights], hidden, weights, as_spans(spans), table, host
    )
    return result


@fake(_pool_spans)
def _(
    hidden: Tensor, weights: Tensor, spans: Sequence[Tensor], rows: Sequence[Tensor], backend: str
) -> tuple[Tensor, ...]:
    dtype, size = compute_dtype(hidden), as_spans(spans).ranges.shape[0]
    span_weight = hidden.new_empty(size, dtype=torch.float64)
    return hidden.new_empty(size, hidden.shape[1], dtype=dtype), span_weight, hidden.new_empty(size, dtype=dtype)


@operator("pool_spans_gradient")
def _pool_spans_gradient(
    grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Sequence[Tensor], dtype: torch.dtype, backend: str
) -> Tensor:
    result: Tensor = backends.run(
        "pool_spans_gradient", backend, [grad, weights], grad, span_weight, weights, as_spans(spans), dtype
    )
    return result


@fake(_pool_spans_gradient)
def _(
    grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Sequence[Tensor], dtype: torch.dtype, backend: str
) -> Tensor:
    return grad.new_empty(weights.shape[0], grad.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.backend = inputs.hidden.dtype, inputs.backend
    _pooled, span_weight, _norm = outputs
    ctx.save_for_backward(span_weight, inputs.weights, *inputs.spans)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    span_weight, weights, *spans = ctx.saved_tensors
    return {"hidden": _pool_spans_gradient(grad, span_weight, weights, spans, ctx.dtype, ctx.backend)}


register_backward(_pool_spans, "pool_spans", _save, _backward)
