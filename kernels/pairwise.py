"""Span pairs of rows with up to a few thousand spans: all pairs, tile by tile.

With x = sqrt(|W|) v / |v| of each span, s = sign(W) and e_ij = x^S_i . x^S_j - x^T_i . x^T_j, a row's numerator is
sum s_i s_j e_ij^2, and its gradient in the unit span i is 4 s_i sqrt(|W_i|) sum_j s_j e_ij x^S_j, of which only the
part orthogonal to it counts: weights need no multiplication of their own between the products.

Three kernels. ``unit_parts`` writes every x once, split into bfloat16 parts whose products the tensor cores take
straight from shared memory. ``pair_errors`` makes the tiles of s e s on and above a row's diagonal, ``pair_gradients``
multiplies them with x. What lies between is scratch of a fixed size: rows are done in groups, and of a row too long
for that, strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast.kernels._device import load, triangle, unit_factors
from mta_fast.kernels._launch import INTERPRETED, Numerics, launch

LENGTHS = ("first_row", "num_rows", "gram_from", "origin", "first_pair", "first_tile", "part_stride_s", "part_stride_t")
SCRATCH_BYTES = 1 << 28  # of parts and tiles at a time; a row that needs more is done in strips
ROWS_AT_ONCE = tl.constexpr(128)


@triton.jit
def _rounded(values):
    """float32 rounded to bfloat16's bits, halves to even; NaN and infinity stay what they are."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(tl.abs(values) < float("inf"), rounded.to(tl.float32, bitcast=True), values)


@triton.jit
def _write_parts(
    p_span, stride_d, width, norm, weight, p_parts, part_stride, padded, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x of one span as a sum of PARTS, each the rest of those before it, and 0 beyond its width."""
    power, inverse = unit_factors(norm)
    root = tl.sqrt(tl.abs(weight))
    for start in range(0, padded, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_rest = load(p_span + o_d * stride_d, o_d < width, ACC, True).to(ACC) * power * inverse * root
        for part in tl.static_range(PARTS):
            b_part = b_rest
            if PARTS > 1:
                b_part = _rounded(b_rest)
                b_rest -= b_part
            p_part = p_parts + part * part_stride.to(tl.int64) + o_d
            tl.store(p_part, b_part.to(p_parts.dtype.element_ty), mask=o_d < padded)


@triton.jit(do_not_specialize=LENGTHS)
def _unit_parts(
    student,
    teacher,
    student_norm,
    teacher_norm,
    weights,
    student_parts,  # [PARTS, spans of the group, student_padded]
    teacher_parts,
    stride_su,
    stride_sd,
    stride_tu,
    stride_td,
    student_width,
    teacher_width,
    student_padded,
    teacher_padded,
    part_stride_s,
    part_stride_t,
    origin,  # first span of the group
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Both sides' x of a span: program (span, side)."""
    i_u = tl.program_id(0).to(tl.int64)
    o_u = i_u + origin
    weight = tl.load(weights + o_u)
    if tl.program_id(1) == 0:
        _write_parts(
            student + o_u * stride_su, stride_sd, student_width, tl.load(student_norm + o_u), weight,
            student_parts + i_u * student_padded, part_stride_s, student_padded, PARTS, BLOCK_D, ACC,
        )  # fmt: skip
    else:
        _write_parts(
            teacher + o_u * stride_tu, stride_td, teacher_width, tl.load(teacher_norm + o_u), weight,
            teacher_parts + i_u * teacher_padded, part_stride_t, teacher_padded, PARTS, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def _find_tile(span_splits, first_row, num_rows, i_program, gram_from, TILE: tl.constexpr, PAIRS: tl.constexpr):
    """The row of a program, which of the row's programs it is, and how many tile pairs the rows before have.

    Rows in Gram form have none. A row of t tiles has t programs, with PAIRS t (t + 1) / 2. A program beyond those of
    the last row, of which there are some where a batch has capacities, gets the row after it.
    """
    row = first_row
    local = i_program
    pairs_before = 0
    before = 0
    for first in range(first_row, first_row + num_rows, ROWS_AT_ONCE):
        o_row = first + tl.arange(0, ROWS_AT_ONCE)
        m_row = o_row < first_row + num_rows
        counts = tl.load(span_splits + o_row + 1, mask=m_row, other=0)
        counts -= tl.load(span_splits + o_row, mask=m_row, other=0)
        tiles = tl.where(counts < gram_from, tl.cdiv(counts, TILE), 0)
        pairs = tiles * (tiles + 1) // 2
        programs = pairs if PAIRS else tiles
        passed = m_row & (before + tl.cumsum(programs, 0) <= i_program)
        row += tl.sum(passed.to(tl.int32), 0)
        local -= tl.sum(tl.where(passed, programs, 0), 0)
        pairs_before += tl.sum(tl.where(passed, pairs, 0), 0)
        before += tl.sum(programs, 0)
    return row, local, pairs_before


@triton.jit
def _block(p, mask, TRANSPOSED: tl.constexpr):
    values = tl.load(p) if mask is None else tl.load(p, mask=mask, other=0.0)
    return tl.trans(values) if TRANSPOSED else values


@triton.jit
def _split_product(
    p_left, p_right, left_stride, right_stride, m_left, m_right, acc, LEFT_TRANSPOSED: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc + left right of blocks that are sums of PARTS, of which the smallest products are left out.

    Tensor cores cut off what does not fit their sum, at every step: a block has a sum of its own, of small products
    first, and is added by an addition that rounds.
    """
    b_left_0, b_right_0 = _block(p_left, m_left, LEFT_TRANSPOSED), _block(p_right, m_right, RIGHT_TRANSPOSED)
    if PARTS == 1:
        return _product(b_left_0, b_right_0, acc, ACC)
    b_left_1 = _block(p_left + left_stride, m_left, LEFT_TRANSPOSED)
    b_right_1 = _block(p_right + right_stride, m_right, RIGHT_TRANSPOSED)
    b_sum = tl.zeros(acc.shape, dtype=ACC)
    if PARTS > 2:
        b_left_2 = _block(p_left + 2 * left_stride, m_left, LEFT_TRANSPOSED)
        b_right_2 = _block(p_right + 2 * right_stride, m_right, RIGHT_TRANSPOSED)
        b_sum = _product(b_left_0, b_right_2, b_sum, ACC)
        b_sum = _product(b_left_2, b_right_0, b_sum, ACC)
        b_sum = _product(b_left_1, b_right_1, b_sum, ACC)
    b_sum = _product(b_left_0, b_right_1, b_sum, ACC)
    b_sum = _product(b_left_1, b_right_0, b_sum, ACC)
    return acc + _product(b_left_0, b_right_0, b_sum, ACC)


@triton.jit
def _product(b_left, b_right, acc, ACC: tl.constexpr):
    return tl.dot(b_left, b_right, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _cosines(
    parts, part_stride, padded, o_i, o_j, m_i, m_j, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x_i . x_j [TILE, TILE] of one side; o_i, o_j: spans within the group."""
    acc = tl.zeros((TILE, TILE), dtype=ACC)
    p_i = parts + o_i.to(tl.int64)[:, None] * padded + tl.arange(0, BLOCK_D)[None, :]
    p_j = parts + o_j.to(tl.int64)[:, None] * padded + tl.arange(0, BLOCK_D)[None, :]
    stride = part_stride.to(tl.int64)
    for start in range(0, padded, BLOCK_D):
        acc = _split_product(
            p_i + start,
            p_j + start,
            stride,
            stride,
            m_i[:, None],
            m_j[:, None],
            acc,
            False,
            True,
            PARTS,
            ACC,
        )
    return acc


@triton.jit(do_not_specialize=(*LENGTHS, "strip_tiles"))
def _pair_errors(
    student_parts,
    teacher_parts,
    weights,
    span_splits,
    tile_terms,  # [tile pairs of the batch] float64
    errors,  # [tile pairs of the group, PARTS, TILE, TILE]
    along,  # [tile pairs of the group, 2, TILE] sum over the tile of s e s x_i . x_j, by rows and by columns
    student_padded,
    teacher_padded,
    part_stride_s,
    part_stride_t,
    first_row,
    num_rows,
    gram_from,
    origin,
    first_pair,  # tile pairs of the rows before the group
    first_tile,  # of a strip
    strip_tiles,  # tiles of the strip's row; 0: whole rows
    WITH_GRADIENT: tl.constexpr,
    IN_STRIPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Tile (i, j) of s e s, its sum of squares, and in a strip of every j, else of j >= i alone."""
    program = tl.program_id(0)
    row, slot = first_row, program
    if IN_STRIPS:
        i, j = first_tile + program // strip_tiles, program % strip_tiles
        term = first_pair + j * (j + 1) // 2 + i
    else:
        row, local, _ = _find_tile(span_splits, first_row, num_rows, program, gram_from, TILE, True)
        if row == first_row + num_rows:
            return
        i, j = triangle(local)
        term = first_pair + program
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    o_i, o_j = first + i * TILE + tl.arange(0, TILE), first + j * TILE + tl.arange(0, TILE)
    m_i, m_j = o_i < end, o_j < end
    b_cosine = _cosines(
        student_parts, part_stride_s, student_padded, o_i - origin, o_j - origin, m_i, m_j, TILE, BLOCK_D, PARTS,
        ACC,
    )  # fmt: skip
    b_error = b_cosine - _cosines(
        teacher_parts, part_stride_t, teacher_padded, o_i - origin, o_j - origin, m_i, m_j, TILE, BLOCK_D, PARTS,
        ACC,
    )  # fmt: skip
    b_error = tl.where(o_i[:, None] == o_j[None, :], 0.0, b_error)  # u = v is no pair
    b_sign_i = tl.where(tl.load(weights + o_i, mask=m_i, other=0.0) < 0, -1.0, 1.0).to(ACC)
    b_sign_j = tl.where(tl.load(weights + o_j, mask=m_j, other=0.0) < 0, -1.0, 1.0).to(ACC)
    b_signed = b_error * (b_sign_i[:, None] * b_sign_j[None, :])
    value = tl.sum(tl.sum(b_signed * b_error, 1).to(tl.float64), 0)
    tl.store(tile_terms + term, tl.where(j > i, 2 * value, value), mask=j >= i)
    if WITH_GRADIENT:
        b_along = b_signed * b_cosine
        p_along = along + slot.to(tl.int64) * (2 * TILE) + tl.arange(0, TILE)
        tl.store(p_along, tl.sum(b_along, 1))
        if not IN_STRIPS:
            tl.store(p_along + TILE, tl.sum(b_along, 0))
        o_row, o_column = tl.arange(0, TILE)[:, None] * TILE, tl.arange(0, TILE)[None, :]
        p_error = errors + slot.to(tl.int64) * (PARTS * TILE * TILE) + o_row + o_column
        for part in tl.static_range(PARTS):
            b_part = b_signed
            if PARTS > 1:
                b_part = _rounded(b_signed)
                b_signed -= b_part
            tl.store(p_error + part * TILE * TILE, b_part.to(errors.dtype.element_ty))


@triton.jit(do_not_specialize=(*LENGTHS, "strip_tiles"))
def _pair_gradients(
    student,
    student_norm,
    weights,
    span_splits,
    student_parts,
    errors,
    along,
    gradient,
    stride_su,
    stride_sd,
    student_width,
    student_padded,
    part_stride_s,
    first_row,
    num_rows,
    gram_from,
    origin,
    first_tile,
    strip_tiles,
    IN_STRIPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """d(sum of terms) / d(student_i) of TILE spans x BLOCK_N features: the tiles of their errors, times x."""
    program = tl.program_id(0)
    row, pairs = first_row, 0
    i = first_tile + program
    if not IN_STRIPS:
        row, i, pairs = _find_tile(span_splits, first_row, num_rows, program, gram_from, TILE, False)
        if row == first_row + num_rows:
            return
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    o_i = first + i * TILE + tl.arange(0, TILE)
    m_i = o_i < end
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row, o_k = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    stride = part_stride_s.to(tl.int64)
    acc = tl.zeros((TILE, BLOCK_N), dtype=ACC)
    b_along = tl.zeros((TILE,), dtype=ACC)
    before = 0 if IN_STRIPS else i  # tiles j < i, of which the transposed one is there
    for start in range(0, before * TILE, BLOCK_K):
        slot = (pairs + i * (i + 1) // 2 + start // TILE).to(tl.int64)
        p_error = errors + slot * (PARTS * TILE * TILE) + (start % TILE + o_k)[:, None] * TILE + o_row[None, :]
        o_j = first + start + o_k
        p_unit = student_parts + (o_j - origin).to(tl.int64)[:, None] * student_padded + o_n[None, :]
        m_unit = (o_j < end)[:, None] & (o_n < student_padded)[None, :]
        acc = _split_product(p_error, p_unit, TILE * TILE, stride, None, m_unit, acc, True, False, PARTS, ACC)
    for start in range(before * TILE, end - first, BLOCK_K):
        j = start // TILE
        slot = (program * strip_tiles + j if IN_STRIPS else pairs + j * (j + 1) // 2 + i).to(tl.int64)
        p_error = errors + slot * (PARTS * TILE * TILE) + o_row[:, None] * TILE + (start % TILE + o_k)[None, :]
        o_j = first + start + o_k
        p_unit = student_parts + (o_j - origin).to(tl.int64)[:, None] * student_padded + o_n[None, :]
        m_unit = (o_j < end)[:, None] & (o_n < student_padded)[None, :]
        acc = _split_product(p_error, p_unit, TILE * TILE, stride, None, m_unit, acc, False, False, PARTS, ACC)
    for j in range(tl.cdiv(end - first, TILE)):
        if IN_STRIPS:
            slot = program * strip_tiles + j
        else:
            slot = pairs + tl.where(j < i, i * (i + 1) // 2 + j, j * (j + 1) // 2 + i)
        b_along += tl.load(along + (2 * slot.to(tl.int64) + (0 if IN_STRIPS else (j < i).to(tl.int32))) * TILE + o_row)
    b_weight = tl.load(weights + o_i, mask=m_i, other=0.0)
    b_power, b_inverse = unit_factors(tl.load(student_norm + o_i, mask=m_i, other=0.0))
    m_tile = m_i[:, None] & (o_n < student_width)[None, :]
    b_unit = load(student + o_i.to(tl.int64)[:, None] * stride_su + o_n[None, :] * stride_sd, m_tile, ACC, True)
    b_unit = b_unit.to(ACC) * b_power[:, None] * b_inverse[:, None]
    b_gradient = acc * tl.sqrt(tl.abs(b_weight))[:, None] - b_along[:, None] * b_unit
    b_gradient = b_gradient * 4 * (b_inverse * b_power)[:, None]
    tl.store(gradient + o_i.to(tl.int64)[:, None] * student_width + o_n[None, :], b_gradient, mask=m_tile)


class _Group(NamedTuple):
    """Rows in pairwise form, one after the other, whose scratch fits; or strips of one row."""

    first_row: int
    num_rows: int
    first_span: int
    spans: int
    first_pair: int  # tile pairs of the rows before
    tiles: int
    pairs: int  # tile pairs of its rows
    strip: int  # tiles i done at a time with all tiles j; 0: whole rows


def _groups(counts: list[int], gram_from: int, tile: int, span_bytes: int, tile_bytes: int) -> Iterator[_Group]:
    """The rows with fewer than ``gram_from`` spans, as many at a time as ``SCRATCH_BYTES`` hold."""
    group: _Group | None = None
    span = pair = 0
    for row, count in enumerate(counts):
        pairwise = count < gram_from
        tiles = -(-count // tile) if pairwise else 0
        own = _Group(row, 1, span, count, pair, tiles, tiles * (tiles + 1) // 2, 0)
        if group is not None:
            joined = group._replace(
                num_rows=group.num_rows + 1,
                spans=group.spans + count,
                tiles=group.tiles + tiles,
                pairs=group.pairs + own.pairs,
            )
            if pairwise and joined.spans * span_bytes + joined.pairs * tile_bytes <= SCRATCH_BYTES:
                group, own = joined, group
            else:
                yield group
                group = None
        if group is None and pairwise:
            group = own
            if count * span_bytes + own.pairs * tile_bytes > SCRATCH_BYTES:
                yield own._replace(strip=max(1, min(tiles, SCRATCH_BYTES // max(1, tiles * tile_bytes))))
                group = None
        span, pair = span + count, pair + tiles * (tiles + 1) // 2
    if group is not None:
        yield group


def _whole(most: int, rows: int, spans: int, tile: int) -> _Group:
    """All rows of up to ``most`` spans at once: where each begins is known on the device alone."""
    tiles = -(-most // tile)
    return _Group(0, rows, 0, spans, 0, rows * tiles, rows * (tiles * (tiles + 1) // 2), 0)


def _parts(num: Numerics) -> tuple[int, torch.dtype]:
    """Into how many parts of which dtype a factor is split: three bfloat16 parts hold a float32.

    Two hold more than TF32, which is what products are made of where torch's matmul precision allows that.
    """
    if num.dtype == torch.float64:
        return 1, torch.float64
    count = 2 if num.constants["PRECISION"] == "tf32" else 3
    return count, torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter truncates bfloat16


def add_rows(
    num: Numerics,
    counts: list[int],
    bounded: bool,
    with_gradient: bool,
    *,
    student: Tensor,
    teacher: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
    gradient: Tensor,
    weights: Tensor,
    span_splits: Tensor,
    num_rows: int,
    gram_from: int,
) -> Tensor:
    """Fill ``gradient`` of the rows with fewer than ``gram_from`` spans.

    Args:
        counts: spans of each row; ``bounded``: at most, the same for each.

    Returns:
        [tile pairs] float64: the terms of each row's num, row by row.
    """
    row = num.row("pair_errors")
    tile, block = row.blocks["TILE"], row.blocks["BLOCK_D"]
    count, dtype = _parts(num)
    padded = [-(-width // block) * block for width in (student.shape[1], teacher.shape[1])]
    tile_bytes = count * tile**2 * dtype.itemsize + 2 * tile * num.dtype.itemsize if with_gradient else 0
    if bounded:
        groups = [_whole(counts[0], num_rows, student.shape[0], tile)]
    else:
        groups = [*_groups(counts, gram_from, tile, count * sum(padded) * dtype.itemsize, tile_bytes)]
    tile_terms = student.new_empty(sum(group.pairs for group in groups), dtype=torch.float64)
    strides = {"stride_su": student.stride(0), "stride_sd": student.stride(1), "student_width": student.shape[1]}
    of_teacher = {"stride_tu": teacher.stride(0), "stride_td": teacher.stride(1), "teacher_width": teacher.shape[1]}
    for group in groups:
        parts = [student.new_empty(count, group.spans, width, dtype=dtype) for width in padded]
        of_student = {
            "student_parts": parts[0], "student_padded": padded[0], "part_stride_s": group.spans * padded[0],
            "PARTS": count, "weights": weights, "origin": group.first_span,
        }  # fmt: skip
        both = of_student | {
            "teacher_parts": parts[1], "teacher_padded": padded[1], "part_stride_t": group.spans * padded[1],
        }  # fmt: skip
        sides = {"student": student, "student_norm": student_norm}
        launch(
            "unit_parts", _unit_parts, (group.spans, 2), num, teacher=teacher, teacher_norm=teacher_norm, **sides,
            **strides, **of_teacher, **both,
        )  # fmt: skip
        step = group.strip or group.tiles or 1
        slots = group.strip * group.tiles or group.pairs
        errors = student.new_empty(slots if with_gradient else 0, count, tile, tile, dtype=dtype)
        along = student.new_empty(errors.shape[0], 2, tile, dtype=num.dtype)
        for first_tile in range(0, group.tiles, step):
            tiles = min(step, group.tiles - first_tile)
            place = {
                "span_splits": span_splits, "first_row": group.first_row, "num_rows": group.num_rows,
                "gram_from": gram_from, "first_tile": first_tile, "strip_tiles": group.tiles if group.strip else 0,
                "IN_STRIPS": bool(group.strip), "errors": errors, "along": along,
            }  # fmt: skip
            launch(
                "pair_errors", _pair_errors, (tiles * group.tiles if group.strip else group.pairs,), num,
                tile_terms=tile_terms, first_pair=group.first_pair, WITH_GRADIENT=with_gradient, **both, **place,
            )  # fmt: skip
            if with_gradient:
                columns = -(-student.shape[1] // num.row("pair_gradients").blocks["BLOCK_N"])
                launch(
                    "pair_gradients", _pair_gradients, (tiles, columns), num, gradient=gradient, **sides, **strides,
                    **of_student, **place,
                )  # fmt: skip
    return tile_terms
