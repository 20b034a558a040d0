"""Device functions that several kernels share.

Names in all kernels: ``i_`` program ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks of values;
capitals are compile-time constants. UPCAST turns half-precision tiles to ACC as they are loaded: the interpreter has
no bfloat16 arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

WHOLE_ROW = tl.constexpr(0)  # as BLOCK of find_span_row: one program a row
ROWS_AT_ONCE = tl.constexpr(128)  # rows whose programs are counted at a time when a program looks for its own


@triton.jit
def load(p, mask, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Values under the mask, 0 elsewhere."""
    values = tl.load(p, mask=mask, other=0.0)
    if UPCAST:
        if values.dtype == tl.bfloat16:
            values = values.to(tl.float32)
        values = values.to(ACC)
    return values


@triton.jit
def reciprocal(values):
    """1 / values, and 0 where a value is 0."""
    return tl.where(values == 0, 0.0, 1.0 / tl.where(values == 0, 1.0, values))


@triton.jit
def power_of_two(values):
    """2^-e for values >= 0 in [2^e, 2^(e + 1)), as ``reference.power_of_two``: exact to multiply with."""
    if values.dtype == tl.float64:
        exponent = tl.minimum(tl.maximum(values.to(tl.int64, bitcast=True) >> 52, 1), 2045)
        return ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.minimum(tl.maximum(values.to(tl.int32, bitcast=True) >> 23, 1), 253)
        return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_norm(norm):
    """``reference.inverse_norms``."""
    m_zero = norm < (2.0**-1022 if norm.dtype == tl.float64 else 2.0**-126)
    inverse = tl.where(m_zero, 0.0, 1.0 / tl.where(m_zero, 1.0, norm))
    return tl.where(norm == float("inf"), float("nan"), inverse)


@triton.jit
def unit_factors(norm):
    """A power of two that brings a row near 1, where its products are within float32, and the rest of 1 / norm."""
    power = power_of_two(norm)
    return power, inverse_norm(norm) * power_of_two(power)


@triton.jit
def row_power(p, stride, width, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """The power of two that brings the largest value of a row [width] to [1, 2)."""
    b_peak = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_peak = tl.maximum(b_peak, tl.abs(load(p + o_d * stride, o_d < width, ACC, True)))
    return power_of_two(tl.max(b_peak, 0))


@triton.jit
def squares_fit(least, most):
    """Whether sums of squares from ``least`` to ``most`` are right: none that counts was flushed or is infinite."""
    return (least >= 2.0**-80) & (most <= 2.0**120)


@triton.jit
def scaled(values, b_power):
    """Rows of a tile times their powers of two [M]: exact, in the tile's dtype, whose range the powers may leave."""
    return (values.to(b_power.dtype) * b_power[:, None]).to(values.dtype)


@triton.jit
def products(
    p_left,  # [M] pointers to the first feature of each left row
    p_right,  # [N]
    m_left,
    m_right,
    stride_left,
    stride_right,
    width,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    b_power_left=None,  # [M] powers of two that the rows are multiplied with
    b_power_right=None,
):
    """[M, N] products of all left rows with all right rows; the width is a loop, so any width fits."""
    acc = tl.zeros((M, N), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_left = load(p_left[:, None] + o_d[None, :] * stride_left, m_left[:, None] & m_d[None, :], ACC, UPCAST)
        b_right = load(p_right[:, None] + o_d[None, :] * stride_right, m_right[:, None] & m_d[None, :], ACC, UPCAST)
        if b_power_left is not None:
            b_left, b_right = scaled(b_left, b_power_left), scaled(b_right, b_power_right)
        acc = tl.dot(b_left, tl.trans(b_right), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def triangle(i_pair):
    """Row and column, row <= column, of the i-th pair on or above the diagonal, column by column."""
    column = ((tl.sqrt((8 * i_pair + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    column -= (column * (column + 1) // 2 > i_pair).to(tl.int32)  # the root is rounded
    column += ((column + 1) * (column + 2) // 2 <= i_pair).to(tl.int32)
    return i_pair - column * (column + 1) // 2, column


@triton.jit
def find_span_row(span_splits, num_rows, i_program, gram_from, GRAM: tl.constexpr, BLOCK: tl.constexpr):
    """The row of a program, which of the row's programs it is, and how many rows in Gram form come before.

    Rows with at least ``gram_from`` spans are in Gram form; programs are dealt out for these with GRAM, else for the
    others: one for BLOCK spans, or with WHOLE_ROW one a row.
    """
    row = 0
    local = i_program
    rank = 0
    before = 0
    for first in range(0, num_rows, ROWS_AT_ONCE):
        o_row = first + tl.arange(0, ROWS_AT_ONCE)
        m_row = o_row < num_rows
        counts = tl.load(span_splits + o_row + 1, mask=m_row, other=0) - tl.load(
            span_splits + o_row, mask=m_row, other=0
        )
        m_gram = m_row & (counts >= gram_from)
        programs = m_row.to(tl.int32) if BLOCK == WHOLE_ROW else tl.cdiv(counts, BLOCK)
        programs = tl.where(m_gram, programs, 0) if GRAM else tl.where(m_gram, 0, programs)
        passed = m_row & (before + tl.cumsum(programs, 0) <= i_program)
        row += tl.sum(passed.to(tl.int32), 0)
        local -= tl.sum(tl.where(passed, programs, 0), 0)
        rank += tl.sum((passed & m_gram).to(tl.int32), 0)
        before += tl.sum(programs, 0)
    return row, local, rank
