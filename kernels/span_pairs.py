"""Span pairs (DSA): weighted squared difference of the two sides' cosines over all pairs of a row, and its gradient.

One program a block of spans i walks the blocks j of its row: both cosines of a tile, the error, the value, and the
gradient with the tile still on chip; nothing [N, N] is stored. Without a gradient only j >= i is visited. Rows with
many spans take the Gram form (``gram``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast import contract
from mta_fast.contract import checked
from mta_fast.kernels import gram
from mta_fast.kernels._device import find_span_row, load, products, scaled, unit_factors
from mta_fast.kernels._launch import launch, numerics

LENGTHS = ("num_rows", "gram_from")  # change every step: no variant is compiled for their divisors
NEVER = 2**31 - 1  # more spans than an int32 counts


@triton.jit(do_not_specialize=LENGTHS)
def _pairs(
    student,
    teacher,
    student_norm,
    teacher_norm,
    weights,
    span_splits,
    terms,
    gradient,
    stride_su,
    stride_sd,
    stride_tu,
    stride_td,
    student_width,
    teacher_width,
    num_rows,
    gram_from,
    WITH_GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """terms_i = W_i sum_j W_j e_ij^2 with e = cos^S - cos^T, and d(sum of terms) / d(student_i), of TILE spans i.

    Rows are multiplied with a power of two as they are loaded, and the rest of 1 / |v| comes after the products: their
    sums stay within float32.

    With u = v / |v|: g_i = 4 W_i sum_j W_j e_ij u_j, of which only the part orthogonal to u_i counts; its part along
    u_i is 4 W_i sum_j W_j e_ij cos^S_ij. The gradient grows in memory, which this program alone writes: the barriers
    order its stores before its own loads of what other threads stored.
    """
    row, i_tile, _ = find_span_row(span_splits, num_rows, tl.program_id(0), gram_from, False, TILE)
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    o_i = first + i_tile * TILE + tl.arange(0, TILE)
    m_i = o_i < end
    b_power_si, b_student_i = unit_factors(tl.load(student_norm + o_i, mask=m_i, other=0.0))
    b_power_ti, b_teacher_i = unit_factors(tl.load(teacher_norm + o_i, mask=m_i, other=0.0))
    p_student_i = student + o_i.to(tl.int64) * stride_su
    p_teacher_i = teacher + o_i.to(tl.int64) * stride_tu
    p_gradient = gradient + o_i.to(tl.int64) * student_width
    value = tl.zeros((TILE,), dtype=tl.float64)
    along = tl.zeros((TILE,), dtype=ACC)
    for tj in range(0 if WITH_GRADIENT else i_tile, tl.cdiv(end - first, TILE)):
        o_j = first + tj * TILE + tl.arange(0, TILE)
        m_j = o_j < end
        b_power_sj, b_student_j = unit_factors(tl.load(student_norm + o_j, mask=m_j, other=0.0))
        b_power_tj, b_teacher_j = unit_factors(tl.load(teacher_norm + o_j, mask=m_j, other=0.0))
        b_weight_j = tl.load(weights + o_j, mask=m_j, other=0.0)
        p_student_j = student + o_j.to(tl.int64) * stride_su
        p_teacher_j = teacher + o_j.to(tl.int64) * stride_tu
        b_cosine = products(
            p_student_i, p_student_j, m_i, m_j, stride_sd, stride_sd, student_width, TILE, TILE, BLOCK_D, ACC,
            PRECISION, UPCAST, b_power_si, b_power_sj,
        )  # fmt: skip
        b_cosine = b_cosine * b_student_i[:, None] * b_student_j[None, :]
        b_error = products(
            p_teacher_i, p_teacher_j, m_i, m_j, stride_td, stride_td, teacher_width, TILE, TILE, BLOCK_D, ACC,
            PRECISION, UPCAST, b_power_ti, b_power_tj,
        )  # fmt: skip
        b_error = b_cosine - b_error * b_teacher_i[:, None] * b_teacher_j[None, :]
        b_error = tl.where(o_i[:, None] == o_j[None, :], 0.0, b_error)  # u = v is no pair
        b_weighted = b_error * b_weight_j[None, :]
        b_value = tl.sum(b_weighted * b_error, 1)
        if WITH_GRADIENT:
            along += tl.sum(b_weighted * b_cosine, 1)
            b_weighted *= b_student_j[None, :]
            for start in range(0, student_width, BLOCK_G):
                o_d = start + tl.arange(0, BLOCK_G)
                m_d = (o_d < student_width)[None, :]
                b_student = load(p_student_j[:, None] + o_d[None, :] * stride_sd, m_j[:, None] & m_d, ACC, UPCAST)
                m_g = m_i[:, None] & m_d
                b_gradient = tl.load(p_gradient[:, None] + o_d[None, :], mask=m_g & (tj > 0), other=0.0)
                b_student = scaled(b_student.to(ACC), b_power_sj)
                b_gradient = tl.dot(b_weighted, b_student, b_gradient, input_precision=PRECISION, out_dtype=ACC)
                tl.store(p_gradient[:, None] + o_d[None, :], b_gradient, mask=m_g)
            tl.debug_barrier()
        else:
            b_value *= tl.where(tj == i_tile, 1.0, 2.0)  # j > i stands for i > j too
        value += b_value.to(tl.float64)
    b_weight_i = tl.load(weights + o_i, mask=m_i, other=0.0)
    tl.store(terms + o_i, value * b_weight_i, mask=m_i)
    if WITH_GRADIENT:
        b_scale = 4 * b_weight_i * (b_student_i * b_power_si)
        along *= b_student_i
        for start in range(0, student_width, BLOCK_G):
            o_d = start + tl.arange(0, BLOCK_G)
            m_g = m_i[:, None] & (o_d < student_width)[None, :]
            b_student = load(p_student_i[:, None] + o_d[None, :] * stride_sd, m_g, ACC, UPCAST).to(ACC)
            b_student = scaled(b_student, b_power_si)
            b_gradient = tl.load(p_gradient[:, None] + o_d[None, :], mask=m_g, other=0.0)
            b_gradient = b_scale[:, None] * (b_gradient - along[:, None] * b_student)
            tl.store(p_gradient[:, None] + o_d[None, :], b_gradient, mask=m_g)


@triton.jit(do_not_specialize=(*LENGTHS, "num_tiles"))
def _row_totals(
    terms,
    gram_terms,  # [rows in Gram form, num_tiles]
    weights,
    span_splits,
    numerators,
    denominators,
    num_rows,
    gram_from,
    num_tiles,
    BLOCK_U: tl.constexpr,
):
    """num and den = (sum W)^2 - sum W^2 of one row, in float64 until they are stored."""
    row = tl.program_id(0)
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    b_numerator = tl.zeros((BLOCK_U,), dtype=tl.float64)
    b_weight = tl.zeros((BLOCK_U,), dtype=tl.float64)
    b_square = tl.zeros((BLOCK_U,), dtype=tl.float64)
    for start in range(first, end, BLOCK_U):
        o_u = start + tl.arange(0, BLOCK_U)
        b_w = tl.load(weights + o_u, mask=o_u < end, other=0.0).to(tl.float64)
        b_numerator += tl.load(terms + o_u, mask=o_u < end, other=0.0)
        b_weight += b_w
        b_square += b_w * b_w
    if end - first >= gram_from:
        rank = row * 0
        for start in range(0, row, BLOCK_U):
            o_row = start + tl.arange(0, BLOCK_U)
            m_row = o_row < row
            counts = tl.load(span_splits + o_row + 1, mask=m_row, other=0)
            counts -= tl.load(span_splits + o_row, mask=m_row, other=0)
            rank += tl.sum((m_row & (counts >= gram_from)).to(tl.int32), 0)
        for start in range(0, num_tiles, BLOCK_U):
            o_tile = start + tl.arange(0, BLOCK_U)
            p_tile = gram_terms + rank.to(tl.int64) * num_tiles + o_tile
            b_numerator += tl.load(p_tile, mask=o_tile < num_tiles, other=0.0)
    total = tl.sum(b_weight, 0)
    dtype = numerators.dtype.element_ty
    numerator = tl.sum(b_numerator, 0)
    numerator = tl.where(numerator < 0, 0.0, numerator)  # the Gram form's terms cancel; a NaN stays
    tl.store(numerators + row, numerator.to(dtype))
    tl.store(denominators + row, (total * total - tl.sum(b_square, 0)).to(dtype))


@checked
def span_pairs(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
    span_splits: Tensor,
    host: Tensor,
    method: str,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.span_pairs``."""
    num = numerics(student, teacher)
    widths = student.shape[1], teacher.shape[1]
    gram_from = {"pairwise": NEVER, "gram": 0, "auto": contract.gram_from(*widths)}[method]
    counts = host[:, 0].diff().tolist()
    spans, rows = student.shape[0], len(counts)
    terms = student.new_empty(spans, dtype=torch.float64)
    gradient = student.new_empty(spans if with_gradient else 0, widths[0], dtype=num.dtype)
    tile = num.row("pairs").blocks["TILE"]
    shared: dict[str, Any] = {
        "weights": weights.to(num.dtype),
        "span_splits": span_splits,
        "terms": terms,
        "num_rows": rows,
        "gram_from": gram_from,
    }
    sides: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "student_norm": student_norm.to(num.dtype),
        "teacher_norm": teacher_norm.to(num.dtype),
        "gradient": gradient,
    }
    launch(
        "pairs",
        _pairs,
        (sum(-(-count // tile) for count in counts if count < gram_from),),
        num,
        stride_su=student.stride(0),
        stride_sd=student.stride(1),
        stride_tu=teacher.stride(0),
        stride_td=teacher.stride(1),
        student_width=widths[0],
        teacher_width=widths[1],
        WITH_GRADIENT=with_gradient,
        **sides,
        **shared,
    )
    gram_terms = gram.add_rows(counts, host, with_gradient, **sides, **shared)
    numerators, denominators = (student.new_empty(rows, dtype=num.dtype) for _ in range(2))
    totals = {"numerators": numerators, "denominators": denominators}
    launch(
        "row_totals",
        _row_totals,
        (rows,),
        num,
        gram_terms=gram_terms,
        num_tiles=gram_terms.shape[1],
        **totals,
        **shared,
    )
    return numerators, denominators, gradient
