"""Span pairs of rows with many spans: the centred Gram form (``reference.py``, part 4), linear in the spans.

x = u - m and y = v - n are the unit spans less their weighted means, made as they are loaded. X'DX and Y'DX are kept,
[d, d] each; of Y'DY only the norm is wanted. Products are exact float32 whatever torch's matmul precision: the terms
cancel, and single TF32 products leave nothing of a small loss.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast import reference
from mta_fast.kernels._device import WHOLE_ROW, find_span_row, inverse_norm, triangle
from mta_fast.kernels._launch import Numerics, launch, numerics

LENGTHS = ("num_rows", "gram_from")  # change every step: no variant is compiled for their divisors
SPANS_AT_ONCE = 4096  # spans whose weighted states are in memory at a time: 67 MB at d = 4,096


@triton.jit
def _unit(p_states, stride_u, stride_d, norm, o_u, m_u, o_d, m_d, p_mean, ACC: tl.constexpr):
    """Unit spans [U, D] and their weighted mean [D]; 0 outside of the masks."""
    p = p_states + o_u.to(tl.int64)[:, None] * stride_u + o_d[None, :] * stride_d
    b_states = tl.load(p, mask=m_u[:, None] & m_d[None, :], other=0.0)
    b_inverse = inverse_norm(tl.load(norm + o_u, mask=m_u, other=0.0))
    return b_states * b_inverse[:, None], tl.load(p_mean + o_d, mask=m_d, other=0.0)


@triton.jit
def _along_mean(
    p_states, stride_u, stride_d, width, norm, o_u, m_u, p_mean, U: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x_u . m and |u|^2 of U spans, and |m|^2, in float64."""
    b_dot = tl.zeros((U,), dtype=tl.float64)
    b_length = tl.zeros((U,), dtype=tl.float64)
    b_mean_square = tl.zeros((BLOCK_D,), dtype=tl.float64)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_unit, b_mean = _unit(p_states, stride_u, stride_d, norm, o_u, m_u, o_d, o_d < width, p_mean, ACC)
        b_mean_64 = b_mean.to(tl.float64)
        b_dot += tl.sum((b_unit - b_mean[None, :]).to(tl.float64) * b_mean_64[None, :], 1)
        b_length += tl.sum(b_unit.to(tl.float64) * b_unit.to(tl.float64), 1)
        b_mean_square += b_mean_64 * b_mean_64
    return b_dot, b_length, tl.sum(b_mean_square, 0)


@triton.jit
def _tangents(
    student, teacher, student_norm, teacher_norm, p_student_mean, p_teacher_mean, omega, weights, terms, bends, offsets,
    stride_su, stride_sd, stride_tu, stride_td, student_width, teacher_width, first, end, i_block,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """b_u = x_u . m - y_u . n of BLOCK_V spans, omega (delta + b_u), and the terms of num that need no product.

    terms_u = 2 omega W b^2 less the diagonal (W (|u|^2 - |v|^2))^2, which is 0 unless a row is the zero vector;
    omega^2 delta^2 goes to the row's first span.
    """
    o_u = first + i_block * BLOCK_V + tl.arange(0, BLOCK_V)
    m_u = o_u < end
    b_x, b_student, mean_s = _along_mean(
        student, stride_su, stride_sd, student_width, student_norm, o_u, m_u, p_student_mean, BLOCK_V, BLOCK_D, ACC
    )
    b_y, b_teacher, mean_t = _along_mean(
        teacher, stride_tu, stride_td, teacher_width, teacher_norm, o_u, m_u, p_teacher_mean, BLOCK_V, BLOCK_D, ACC
    )
    b_weight = tl.load(weights + o_u, mask=m_u, other=0.0).to(tl.float64)
    b_bend = b_x - b_y
    delta = mean_s - mean_t
    b_diagonal = b_weight * (b_student - b_teacher)
    b_terms = 2 * omega * b_weight * b_bend * b_bend - b_diagonal * b_diagonal
    b_terms += tl.where(o_u == first, omega * omega * delta * delta, 0.0)
    tl.store(terms + o_u, b_terms, mask=m_u)
    tl.store(bends + o_u, b_bend.to(ACC), mask=m_u)
    tl.store(offsets + o_u, (omega * (delta + b_bend)).to(ACC), mask=m_u)


@triton.jit
def _tile(
    left, left_stride_u, left_stride_d, left_width, left_norm, p_left_mean, o_left,
    right, right_stride_u, right_stride_d, right_width, right_norm, p_right_mean, o_right,
    weights, first, end,
    TILE: tl.constexpr, BLOCK_U: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[TILE, TILE] of left' D right, both centred, over the spans of a row."""
    acc = tl.zeros((TILE, TILE), dtype=ACC)
    for start in range(first, end, BLOCK_U):
        o_u = start + tl.arange(0, BLOCK_U)
        m_u = o_u < end
        b_left, b_left_mean = _unit(
            left, left_stride_u, left_stride_d, left_norm, o_u, m_u, o_left, o_left < left_width, p_left_mean, ACC
        )
        b_right, b_right_mean = _unit(
            right, right_stride_u, right_stride_d, right_norm, o_u, m_u, o_right, o_right < right_width, p_right_mean,
            ACC,
        )  # fmt: skip
        b_weight = tl.load(weights + o_u, mask=m_u, other=0.0)
        b_right = (b_right - b_right_mean[None, :]) * b_weight[:, None]
        b_left = tl.trans(b_left - b_left_mean[None, :])
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit(do_not_specialize=(*LENGTHS, "num_tiles", "num_programs"))
def _gram_products(
    student,
    teacher,
    student_norm,
    teacher_norm,
    student_mean,
    teacher_mean,
    omegas,  # [rows in Gram form] sum of W
    weights,
    span_splits,
    gram_xx,  # [rows in Gram form, d_S, d_S]
    gram_yx,  # [rows in Gram form, d_T, d_S]
    gram_terms,  # [rows in Gram form, num_tiles]
    terms,
    bends,
    offsets,
    stride_su,
    stride_sd,
    stride_tu,
    stride_td,
    student_width,
    teacher_width,
    num_rows,
    gram_from,
    num_tiles,
    num_programs,  # of a row
    TILE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of X'DX, Y'DX or Y'DY of one row and its part of |X'DX|^2 - 2 |Y'DX|^2 + |Y'DY|^2.

    The symmetric two are visited on and above the diagonal. Programs from ``num_tiles`` on do the row's ``_tangents``,
    which depend on no product: one launch for both.
    """
    i_program = tl.program_id(0) % num_programs
    i_rank = tl.program_id(0) // num_programs
    row, _, rank = find_span_row(span_splits, num_rows, i_rank, gram_from, True, WHOLE_ROW)
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    big_rank = rank.to(tl.int64)
    p_student_mean = student_mean + big_rank * student_width
    p_teacher_mean = teacher_mean + big_rank * teacher_width
    if i_program >= num_tiles:
        _tangents(
            student, teacher, student_norm, teacher_norm, p_student_mean, p_teacher_mean, tl.load(omegas + rank),
            weights, terms, bends, offsets, stride_su, stride_sd, stride_tu, stride_td, student_width, teacher_width,
            first, end, i_program - num_tiles, BLOCK_V, BLOCK_D, ACC,
        )  # fmt: skip
        return
    tiles_s, tiles_t = tl.cdiv(student_width, TILE), tl.cdiv(teacher_width, TILE)
    programs_xx = tiles_s * (tiles_s + 1) // 2
    programs_yx = tiles_t * tiles_s
    if i_program < programs_xx:
        i_left, i_right = triangle(i_program)
        o_left, o_right = i_left * TILE + tl.arange(0, TILE), i_right * TILE + tl.arange(0, TILE)
        acc = _tile(
            student, stride_su, stride_sd, student_width, student_norm, p_student_mean, o_left,
            student, stride_su, stride_sd, student_width, student_norm, p_student_mean, o_right,
            weights, first, end, TILE, BLOCK_U, ACC, PRECISION,
        )  # fmt: skip
        factor = tl.where(i_left == i_right, 1.0, 2.0)
        p_gram = gram_xx + big_rank * student_width * student_width
        m_tile = (o_left < student_width)[:, None] & (o_right < student_width)[None, :]
        tl.store(p_gram + o_left[:, None] * student_width + o_right[None, :], acc, mask=m_tile)
        end_mirrored = tl.where(i_left == i_right, 0, student_width)  # a tile on the diagonal is its own mirror image
        m_mirrored = (o_left < end_mirrored)[:, None] & (o_right < end_mirrored)[None, :]
        tl.store(p_gram + o_right[None, :] * student_width + o_left[:, None], acc, mask=m_mirrored)
    elif i_program < programs_xx + programs_yx:
        i_left, i_right = (i_program - programs_xx) // tiles_s, (i_program - programs_xx) % tiles_s
        o_left, o_right = i_left * TILE + tl.arange(0, TILE), i_right * TILE + tl.arange(0, TILE)
        acc = _tile(
            teacher, stride_tu, stride_td, teacher_width, teacher_norm, p_teacher_mean, o_left,
            student, stride_su, stride_sd, student_width, student_norm, p_student_mean, o_right,
            weights, first, end, TILE, BLOCK_U, ACC, PRECISION,
        )  # fmt: skip
        factor = tl.full((), -2.0, dtype=tl.float32)
        p_gram = gram_yx + big_rank * teacher_width * student_width
        m_tile = (o_left < teacher_width)[:, None] & (o_right < student_width)[None, :]
        tl.store(p_gram + o_left[:, None] * student_width + o_right[None, :], acc, mask=m_tile)
    else:
        i_left, i_right = triangle(i_program - programs_xx - programs_yx)
        o_left, o_right = i_left * TILE + tl.arange(0, TILE), i_right * TILE + tl.arange(0, TILE)
        acc = _tile(
            teacher, stride_tu, stride_td, teacher_width, teacher_norm, p_teacher_mean, o_left,
            teacher, stride_tu, stride_td, teacher_width, teacher_norm, p_teacher_mean, o_right,
            weights, first, end, TILE, BLOCK_U, ACC, PRECISION,
        )  # fmt: skip
        factor = tl.where(i_left == i_right, 1.0, 2.0)
    total = tl.sum(tl.sum(acc * acc, 1).to(tl.float64), 0) * factor
    tl.store(gram_terms + big_rank * num_tiles + i_program, total)


@triton.jit(do_not_specialize=(*LENGTHS, "num_spans"))
def _gram_gradient(
    student,
    teacher,
    student_norm,
    teacher_norm,
    student_mean,
    teacher_mean,
    weights,
    span_splits,
    gram_xx,
    gram_yx,
    offsets,
    pulls,  # [rows in Gram form, d_S] sum_v W_v b_v x_v
    gradient,
    along,  # [programs of a span, N] g . u over the columns of each
    stride_su,
    stride_sd,
    stride_tu,
    stride_td,
    student_width,
    teacher_width,
    num_rows,
    gram_from,
    num_spans,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g = 4 W_u (omega (delta + b_u) m + sum_v W_v b_v x_v + x_u X'DX - y_u Y'DX) of TILE spans x TILE columns."""
    row, i_tile, rank = find_span_row(span_splits, num_rows, tl.program_id(0), gram_from, True, TILE)
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    o_u = first + i_tile * TILE + tl.arange(0, TILE)
    m_u = o_u < end
    o_d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_d = o_d < student_width
    big_rank = rank.to(tl.int64)
    p_student_mean = student_mean + big_rank * student_width
    p_teacher_mean = teacher_mean + big_rank * teacher_width
    p_xx = gram_xx + big_rank * student_width * student_width + o_d[None, :]
    p_yx = gram_yx + big_rank * teacher_width * student_width + o_d[None, :]
    acc = tl.zeros((TILE, TILE), dtype=ACC)
    for start in range(0, student_width, BLOCK_D):
        o_k = start + tl.arange(0, BLOCK_D)
        m_k = o_k < student_width
        b_unit, b_mean = _unit(student, stride_su, stride_sd, student_norm, o_u, m_u, o_k, m_k, p_student_mean, ACC)
        b_gram = tl.load(p_xx + o_k[:, None] * student_width, mask=m_k[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(b_unit - b_mean[None, :], b_gram, acc, input_precision=PRECISION, out_dtype=ACC)
    for start in range(0, teacher_width, BLOCK_D):
        o_k = start + tl.arange(0, BLOCK_D)
        m_k = o_k < teacher_width
        b_unit, b_mean = _unit(teacher, stride_tu, stride_td, teacher_norm, o_u, m_u, o_k, m_k, p_teacher_mean, ACC)
        b_gram = tl.load(p_yx + o_k[:, None] * student_width, mask=m_k[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(b_mean[None, :] - b_unit, b_gram, acc, input_precision=PRECISION, out_dtype=ACC)
    b_weight = tl.load(weights + o_u, mask=m_u, other=0.0)
    b_offset = tl.load(offsets + o_u, mask=m_u, other=0.0)
    b_unit, b_mean = _unit(student, stride_su, stride_sd, student_norm, o_u, m_u, o_d, m_d, p_student_mean, ACC)
    b_pull = tl.load(pulls + big_rank * student_width + o_d, mask=m_d, other=0.0)
    acc = 4 * b_weight[:, None] * (acc + b_offset[:, None] * b_mean[None, :] + b_pull[None, :])
    p_gradient = gradient + o_u.to(tl.int64)[:, None] * student_width + o_d[None, :]
    tl.store(p_gradient, acc, mask=m_u[:, None] & m_d[None, :])
    p_along = along + tl.program_id(1).to(tl.int64) * num_spans + o_u
    tl.store(p_along, tl.sum(acc * b_unit, 1), mask=m_u)


def add_rows(
    splits: list[int],
    with_gradient: bool,
    *,
    student: Tensor,
    teacher: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
    weights: Tensor,
    gradient: Tensor,
    gram_from: int,
    terms: Tensor,
    **shared: Any,
) -> Tensor:
    """Fill ``terms`` and ``gradient`` of the rows with at least ``gram_from`` spans.

    Their scratch, [rows, d_S + d_T, d_S], is smaller than their pooled spans wherever the cost model picks this form.

    Returns:
        [rows in Gram form, tiles] float64: further terms of each row's num.
    """
    rows = [slice(first, end) for first, end in pairwise(splits) if end - first >= gram_from]
    if not rows:
        return student.new_empty(0, 0, dtype=torch.float64)
    student, teacher = student.to(weights.dtype), teacher.to(weights.dtype)
    num = numerics(student, teacher, exact=True)
    d_s, d_t = student.shape[1], teacher.shape[1]
    tile = num.row("gram_products").blocks["TILE"]
    tiles_s, tiles_t = -(-d_s // tile), -(-d_t // tile)
    num_tiles = tiles_s * (tiles_s + 1) // 2 + tiles_t * tiles_s + tiles_t * (tiles_t + 1) // 2
    gram_terms = student.new_empty(len(rows), num_tiles, dtype=torch.float64)
    omegas = torch.stack([weights[row].double().sum() for row in rows])
    inverse_s, inverse_t = reference.inverse_norms(student_norm), reference.inverse_norms(teacher_norm)
    scale = torch.where(omegas == 0, 1.0, omegas).to(num.dtype)[:, None]
    means = [
        torch.stack([_weighted_sum(states[row], inverse[row], weights[row]) for row in rows]) / scale
        for states, inverse in ((student, inverse_s), (teacher, inverse_t))
    ]
    sides = {
        "student": student,
        "teacher": teacher,
        "student_norm": student_norm,
        "teacher_norm": teacher_norm,
        "student_mean": means[0],
        "teacher_mean": means[1],
        "weights": weights,
        "stride_su": student.stride(0),
        "stride_sd": student.stride(1),
        "stride_tu": teacher.stride(0),
        "stride_td": teacher.stride(1),
        "student_width": d_s,
        "teacher_width": d_t,
        "gram_from": gram_from,
        **shared,
    }
    bends, offsets = torch.empty_like(weights), torch.empty_like(weights)
    products = {
        "gram_xx": student.new_empty(len(rows), d_s, d_s, dtype=num.dtype),
        "gram_yx": student.new_empty(len(rows), d_t, d_s, dtype=num.dtype),
    }
    blocks = -(-max(row.stop - row.start for row in rows) // num.row("gram_products").blocks["BLOCK_V"])
    launch(
        "gram_products",
        _gram_products,
        ((num_tiles + blocks) * len(rows),),
        num,
        omegas=omegas,
        gram_terms=gram_terms,
        num_tiles=num_tiles,
        num_programs=num_tiles + blocks,
        terms=terms,
        bends=bends,
        offsets=offsets,
        **products,
        **sides,
    )
    if with_gradient:
        bent = weights * bends
        _add_gradients(rows, num, bent, inverse_s, gradient, offsets=offsets, **products, **sides)
    return gram_terms


def _add_gradients(
    rows: list[slice],
    num: Numerics,
    bent: Tensor,
    inverse: Tensor,
    gradient: Tensor,
    *,
    student: Tensor,
    student_mean: Tensor,
    **sides: Any,
) -> None:
    """Fill ``gradient`` [N, d_S] of the rows; bent: [N] W_u b_u; inverse: [N] 1 / length of the student's spans."""
    pulls = torch.stack([_weighted_sum(student[row], inverse[row], bent[row]) for row in rows])
    pulls -= torch.stack([bent[row].sum() for row in rows])[:, None] * student_mean
    tile = num.row("gram_gradient").blocks["TILE"]
    blocks = sum(-(-(row.stop - row.start) // tile) for row in rows)
    columns = -(-student.shape[1] // tile)
    along = student.new_empty(columns, student.shape[0], dtype=num.dtype)
    launch(
        "gram_gradient",
        _gram_gradient,
        (blocks, columns),
        num,
        pulls=pulls,
        gradient=gradient,
        along=along,
        num_spans=student.shape[0],
        student=student,
        student_mean=student_mean,
        **sides,
    )
    for row in rows:  # through the normalisation: the part orthogonal to u, over the length
        scale = inverse[row, None]
        gradient[row].addcmul_(student[row] * scale, along[:, row].sum(0)[:, None], value=-1).mul_(scale)


def _weighted_sum(states: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """sum_u weights_u inverse_u states_u [d]; no matrix product, which torch may make of TF32.

    The states are brought to length 1 first: a weight over a large norm could leave float32's range.
    """
    total = states.new_zeros(states.shape[1])
    for part, scale, factors in zip(*(x.split(SPANS_AT_ONCE) for x in (states, inverse, weights)), strict=True):
        total += (part * scale[:, None]).mul_(factors[:, None]).sum(0)
    return total
