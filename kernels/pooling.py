"""Span pooling: weights normalised over a row's spans, weighted means of token ranges, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast.contract import checked
from mta_fast.kernels._device import load, power_of_two, reciprocal, row_power, squares_fit
from mta_fast.kernels._launch import launch, numerics, writable
from mta_fast.layout import Spans, has_capacities


@triton.jit
def _span_weights(
    values,
    token_weight,
    span_weight,
    row_total,
    ranges,
    span_splits,
    covered,
    covered_splits,
    cover_splits,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """w_j = v_j / sum n_j v_j over the covered tokens of one row, then W_u = sum of w over each of its spans.

    Sums are float64, as in the reference.
    """
    row = tl.program_id(0)
    first, end = tl.load(covered_splits + row), tl.load(covered_splits + row + 1)
    b_total = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for start in range(first, end, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < end
        b_token = tl.load(covered + o_c, mask=m_c, other=0)
        b_count = tl.load(cover_splits + o_c + 1, mask=m_c, other=0) - tl.load(cover_splits + o_c, mask=m_c, other=0)
        b_value = load(values + b_token, m_c, ACC, UPCAST).to(tl.float64)
        b_total += tl.where(m_c, b_count * b_value, 0.0)
    total = tl.sum(b_total, 0)
    tl.store(row_total + row, total.to(row_total.dtype.element_ty))
    for start in range(first, end, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < end
        b_token = tl.load(covered + o_c, mask=m_c, other=0)
        b_weight = load(values + b_token, m_c, ACC, UPCAST).to(tl.float64)
        b_weight = tl.where(total == 0, 0.0, b_weight / tl.where(total == 0, 1.0, total))
        tl.store(token_weight + b_token, b_weight.to(token_weight.dtype.element_ty), mask=m_c)
    tl.debug_barrier()  # below, threads read weights that others stored
    for start in range(tl.load(span_splits + row), tl.load(span_splits + row + 1), BLOCK_U):
        o_u = start + tl.arange(0, BLOCK_U)
        m_u = o_u < tl.load(span_splits + row + 1)
        b_first = tl.load(ranges + 2 * o_u, mask=m_u, other=0)
        b_end = tl.load(ranges + 2 * o_u + 1, mask=m_u, other=0)
        b_sum = tl.zeros((BLOCK_U,), dtype=tl.float64)
        for offset in range(0, tl.max(b_end - b_first, 0), BLOCK_J):
            o_j = b_first[:, None] + offset + tl.arange(0, BLOCK_J)[None, :]
            b_sum += tl.sum(tl.load(token_weight + o_j, mask=o_j < b_end[:, None], other=0.0).to(tl.float64), 1)
        tl.store(span_weight + o_u, b_sum.to(span_weight.dtype.element_ty), mask=m_u)


@checked
def span_weights(values: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.span_weights``: one program a row."""
    num = numerics(values)
    sizes = (spans.ranges.shape[0], spans.span_splits.shape[0] - 1)
    token_weight = values.new_zeros(values.shape[0], dtype=num.dtype)
    span_weight, row_total = (values.new_empty(size, dtype=num.dtype) for size in sizes)
    if has_capacities(spans.host):
        span_weight.zero_()  # of those beyond the last row's
    launch(
        "span_weights",
        _span_weights,
        (row_total.shape[0],),
        num,
        values=values,
        token_weight=token_weight,
        span_weight=span_weight,
        row_total=row_total,
        ranges=spans.ranges,
        span_splits=spans.span_splits,
        covered=spans.covered,
        covered_splits=spans.covered_splits,
        cover_splits=spans.cover_splits,
    )
    return token_weight, span_weight, row_total


@triton.jit
def _share(total, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """A power of two, in the weights' DTYPE, and a rest: w times both is w / total, and 0 where the total is 0.

    The power brings subnormal weights, and those whose float64 total is beyond float32, near 1 before anything rounds.
    """
    power = power_of_two(tl.abs(total).to(DTYPE))
    return power, reciprocal((total * power.to(tl.float64)).to(ACC))


@triton.jit
def _scaled_norm(p, width, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """The length of a row whose squares leave the range of ACC."""
    power = row_power(p, 1, width, BLOCK_D, ACC)
    b_square = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_value = tl.load(p + o_d, mask=o_d < width, other=0.0) * power
        b_square += b_value * b_value
    return tl.sqrt(tl.sum(b_square, 0)) * power_of_two(power)


@triton.jit
def _pool(
    hidden,
    weights,
    ranges,
    pooled,
    span_weight,
    norm,
    stride_t,
    stride_d,
    width,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """v_u = sum_j w_j h_j / sum_j w_j and |v_u| of one span; every token of it is read once."""
    i_u = tl.program_id(0).to(tl.int64)
    first, end = tl.load(ranges + 2 * i_u), tl.load(ranges + 2 * i_u + 1)
    b_total = tl.zeros((BLOCK_J,), dtype=tl.float64)
    for start in range(first, end, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        b_total += tl.load(weights + o_j, mask=o_j < end, other=0.0).to(tl.float64)
    total = tl.sum(b_total, 0)
    power, rest = _share(total, weights.dtype.element_ty, ACC)
    b_square = tl.zeros((BLOCK_D,), dtype=ACC)
    for start_d in range(0, width, BLOCK_D):
        o_d = start_d + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_sum = tl.zeros((BLOCK_D,), dtype=ACC)
        for start in range(first, end, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)
            m_j = o_j < end
            p_h = hidden + o_j.to(tl.int64)[:, None] * stride_t + o_d[None, :] * stride_d
            b_h = load(p_h, m_j[:, None] & m_d[None, :], ACC, UPCAST).to(ACC)
            b_share = (tl.load(weights + o_j, mask=m_j, other=0.0) * power).to(ACC) * rest
            b_sum += tl.sum(b_h * b_share[:, None], 0)
        tl.store(pooled + i_u * width + o_d, b_sum, mask=m_d)
        b_square += b_sum * b_sum
    square = tl.sum(b_square, 0)
    length = tl.sqrt(square)
    if squares_fit(square, square) == 0:
        tl.debug_barrier()  # below, threads read values that others stored
        length = _scaled_norm(pooled + i_u * width, width, BLOCK_D, ACC)
    tl.store(span_weight + i_u, total)
    tl.store(norm + i_u, length)


@checked
def pool_spans(
    hidden: Tensor, weights: Tensor, spans: Spans, rows: Tensor, rows_host: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.pool_spans``: one program a span."""
    num = numerics(hidden)
    count, width = spans.ranges.shape[0], hidden.shape[1]
    pooled = hidden.new_empty(count, width, dtype=num.dtype)
    span_weight, norm = (hidden.new_empty(count, dtype=dtype) for dtype in (torch.float64, num.dtype))
    launch(
        "pool",
        _pool,
        (count,),
        num,
        hidden=hidden,
        weights=_at_least(weights, num.dtype),
        ranges=spans.ranges,
        pooled=pooled,
        span_weight=span_weight,
        norm=norm,
        stride_t=hidden.stride(0),
        stride_d=hidden.stride(1),
        width=width,
    )
    return pooled, span_weight, norm


@triton.jit
def _pool_gradient(
    grad,
    span_weight,
    weights,
    token_splits,
    cover_spans,
    gradient,
    stride_u,
    stride_d,
    width,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dh_j = w_j sum over the spans u of j of dv_u / sum(w over u), of one token; 0 where no span covers it."""
    i_t = tl.program_id(0).to(tl.int64)
    first, end = tl.load(token_splits + i_t), tl.load(token_splits + i_t + 1)
    weight = tl.load(weights + i_t, mask=first < end, other=0.0)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_sum = tl.zeros((BLOCK_D,), dtype=ACC)
        for i_cover in range(first, end):
            i_u = tl.load(cover_spans + i_cover).to(tl.int64)
            b_grad = tl.load(grad + i_u * stride_u + o_d * stride_d, mask=m_d, other=0.0)
            power, rest = _share(tl.load(span_weight + i_u).to(tl.float64), weights.dtype.element_ty, ACC)
            b_sum += b_grad * ((weight * power).to(ACC) * rest)
        tl.store(gradient + i_t * width + o_d, b_sum.to(gradient.dtype.element_ty), mask=m_d)


@checked
def pool_spans_gradient(grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
    """``reference.pool_spans_gradient``: one program a token, so that no two programs write one row."""
    num = numerics(grad)
    tokens, width = weights.shape[0], grad.shape[1]
    gradient = grad.new_empty(tokens, width, dtype=writable(dtype))
    launch(
        "pool_gradient",
        _pool_gradient,
        (tokens,),
        num,
        grad=grad,
        span_weight=span_weight,
        weights=_at_least(weights, num.dtype),
        token_splits=spans.token_splits,
        cover_spans=spans.cover_spans,
        gradient=gradient,
        stride_u=grad.stride(0),
        stride_d=grad.stride(1),
        width=width,
    )
    return gradient.to(dtype)


def _at_least(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in ``dtype``, or float64 where they are: what float32 can't hold may still have a mean."""
    return weights if weights.dtype == torch.float64 else weights.to(dtype)
