"""Span pairs (DSA): weighted squared difference of the two sides' cosines over all pairs of a row, and its gradient.

Each row takes the form that needs fewer products: all pairs (``pairwise``), or with many spans the Gram form
(``gram``). Both leave terms, which one kernel adds up.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast import contract
from mta_fast.contract import checked
from mta_fast.kernels import gram, pairwise
from mta_fast.kernels._launch import launch, numerics
from mta_fast.layout import compute_dtype, has_capacities

NEVER = 2**31 - 1  # more spans than an int32 counts


@triton.jit(do_not_specialize=("num_rows", "gram_from", "num_tiles"))
def _row_totals(
    tile_terms,  # [tile pairs of the batch], for rows in pairwise form
    terms,  # [N], for rows in Gram form
    gram_terms,  # [rows in Gram form, num_tiles]
    weights,
    span_splits,
    numerators,
    denominators,
    num_rows,
    gram_from,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """num and den = (sum W)^2 - sum W^2 of one row, in float64 until they are stored."""
    row = tl.program_id(0)
    first, end = tl.load(span_splits + row), tl.load(span_splits + row + 1)
    rank = row * 0
    pairs = row * 0
    for start in range(0, row, BLOCK_U):
        o_row = start + tl.arange(0, BLOCK_U)
        m_row = o_row < row
        counts = tl.load(span_splits + o_row + 1, mask=m_row, other=0)
        counts -= tl.load(span_splits + o_row, mask=m_row, other=0)
        m_gram = m_row & (counts >= gram_from)
        tiles = tl.where(m_gram, 0, tl.cdiv(counts, TILE))
        rank += tl.sum(m_gram.to(tl.int32), 0)
        pairs += tl.sum(tiles * (tiles + 1) // 2, 0)
    b_numerator = tl.zeros((BLOCK_U,), dtype=tl.float64)
    b_weight = tl.zeros((BLOCK_U,), dtype=tl.float64)
    b_square = tl.zeros((BLOCK_U,), dtype=tl.float64)
    in_gram_form = end - first >= gram_from
    end_terms = tl.where(in_gram_form, end, first)
    for start in range(first, end, BLOCK_U):
        o_u = start + tl.arange(0, BLOCK_U)
        b_w = tl.load(weights + o_u, mask=o_u < end, other=0.0).to(tl.float64)
        b_numerator += tl.load(terms + o_u, mask=o_u < end_terms, other=0.0)
        b_weight += b_w
        b_square += b_w * b_w
    row_tiles = tl.cdiv(end - first, TILE)
    row_pairs = tl.where(in_gram_form, 0, row_tiles * (row_tiles + 1) // 2)
    for start in range(0, row_pairs, BLOCK_U):
        o_tile = start + tl.arange(0, BLOCK_U)
        b_numerator += tl.load(tile_terms + pairs + o_tile, mask=o_tile < row_pairs, other=0.0)
    gram_tiles = tl.where(in_gram_form, num_tiles, 0)
    for start in range(0, gram_tiles, BLOCK_U):
        o_tile = start + tl.arange(0, BLOCK_U)
        p_tile = gram_terms + rank.to(tl.int64) * num_tiles + o_tile
        b_numerator += tl.load(p_tile, mask=o_tile < gram_tiles, other=0.0)
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
    num = numerics(student, dtype=compute_dtype(student, teacher))  # what reads the spans turns them to it
    widths = student.shape[1], teacher.shape[1]
    bounded = has_capacities(host)
    auto = NEVER if bounded else contract.gram_from(*widths)  # the Gram form is done row by row of the host's
    gram_from = {"pairwise": NEVER, "gram": 0, "auto": auto}[method]
    splits = host[:, 0].tolist()
    counts = [end - first for first, end in itertools.pairwise(host[:, -1].tolist() if bounded else splits)]
    spans, rows = student.shape[0], len(counts)
    bounded = bounded and rows > 0
    gradient = student.new_empty(spans if with_gradient else 0, widths[0], dtype=num.dtype)
    shared: dict[str, Any] = {
        "weights": weights.to(num.dtype),
        "span_splits": span_splits,
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
    tile_terms = pairwise.add_rows(num, counts, bounded, with_gradient, **sides, **shared)
    terms = student.new_empty(spans, dtype=torch.float64)
    gram_terms = gram.add_rows(splits, with_gradient, terms=terms, **sides, **shared)
    numerators, denominators = (student.new_empty(rows, dtype=num.dtype) for _ in range(2))
    launch(
        "row_totals",
        _row_totals,
        (rows,),
        num,
        tile_terms=tile_terms,
        terms=terms,
        gram_terms=gram_terms,
        num_tiles=gram_terms.shape[1],
        TILE=num.row("pair_errors").blocks["TILE"],
        numerators=numerators,
        denominators=denominators,
        **shared,
    )
    return numerators, denominators, gradient
