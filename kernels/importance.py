"""Token importance. The scores are symmetric, so only tiles on and above the diagonal are visited.

A row of up to SHORT_ROW tokens needs one pass: a strip of queries holds its whole softmax on chip. Longer rows take two
passes over tiles (i <= j): the first leaves (max, sum) partials of the softmax of i over j and, transposed, of j over
i; the second computes the tile again and leaves partial column sums. A program walks a super-tile, so that a token has
few partials. Partials are stored per (slot, token) of a row and merged in a fixed order: nothing is added atomically,
and a row's result depends on that row alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast import reference
from mta_fast.kernels._device import ROWS_AT_ONCE, load, products, reciprocal, triangle
from mta_fast.kernels._launch import Numerics, launch, numerics

SHORT_ROW = tl.constexpr(256)
PATCH = tl.constexpr(12)  # 12 columns x 11 rows of super-tiles on an H100's 132 multiprocessors: 23 tiles in the cache
STD_EPS = tl.constexpr(reference.STD_EPS)
LENGTHS = ("num_rows", "seq_len")  # change every step: no variant is compiled for their divisors
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _queries(length, seq_len, COUNT_PADDING: tl.constexpr):
    """How many positions attend: the row's tokens, or with COUNT_PADDING all of its positions."""
    return tl.where(length > 0, seq_len, 0) if COUNT_PADDING else length


@triton.jit
def _super_side(queries):
    """Tokens on the side of a super-tile: few partials for long rows; from 2,049 tokens on at least 136 programs."""
    return tl.where(queries > 16384, 1024, tl.where(queries > 8192, 512, tl.where(queries > 4096, 256, 128)))


@triton.jit
def _find_row(
    rows,  # [B, 2]
    num_rows,
    seq_len,
    i_program,
    WHICH: tl.constexpr,  # "tokens": blocks of BLOCK tokens; "strips" of short rows; "super" tiles of long rows
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of a program, which of the row's programs it is, and where the row's partials start."""
    row = 0
    local = i_program
    partials = i_program.to(tl.int64) * 0
    before = 0
    for first in range(0, num_rows, ROWS_AT_ONCE):
        o_row = first + tl.arange(0, ROWS_AT_ONCE)
        m_row = o_row < num_rows
        queries = _queries(tl.load(rows + 2 * o_row + 1, mask=m_row, other=0), seq_len, COUNT_PADDING)
        short = queries <= SHORT_ROW
        side = tl.cdiv(queries, _super_side(queries))
        slots = tl.where(short, tl.cdiv(queries, STRIP), side)
        if WHICH == "tokens":
            programs = tl.cdiv(queries, BLOCK)
        elif WHICH == "strips":
            programs = tl.where(short, slots, 0)
        else:
            programs = tl.where(short, 0, side * (side + 1) // 2)
        passed = m_row & (before + tl.cumsum(programs, 0) <= i_program)
        row += tl.sum(passed.to(tl.int32), 0)
        local -= tl.sum(tl.where(passed, programs, 0), 0)
        partials += tl.sum(tl.where(passed, queries.to(tl.int64) * slots, 0), 0)
        before += tl.sum(programs, 0)
    return row, local, partials


@triton.jit
def _row_geometry(rows, row, seq_len, COUNT_PADDING: tl.constexpr):
    """First query (flat) and number of queries of a row; its keys [first, end) counted from the first query."""
    start = tl.load(rows + 2 * row)
    length = tl.load(rows + 2 * row + 1)
    if COUNT_PADDING:
        first_query = row * seq_len
        first_key = start - first_query
        return first_query.to(tl.int64), seq_len, first_key, first_key + length
    else:
        return start.to(tl.int64), length, 0, length


@triton.jit(do_not_specialize=LENGTHS)
def _token_scale(
    hidden,
    scales,
    rows,
    stride_t,
    stride_d,
    width,
    num_rows,
    seq_len,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sqrt(log2(e) / sqrt(d)) / (std(h) + eps) of each query: the product of two turns h . h into a base-2 score.

    Mean and squared deviation are merged block by block, never as a difference of large sums.
    """
    row, i_block, _ = _find_row(rows, num_rows, seq_len, tl.program_id(0), "tokens", COUNT_PADDING, STRIP, TOKENS)
    first_query, queries, _, _ = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < queries
    p_t = hidden + (first_query + o_t) * stride_t
    mean = tl.zeros((TOKENS,), dtype=ACC)
    squares = tl.zeros((TOKENS,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_h = load(p_t[:, None] + o_d[None, :] * stride_d, m_t[:, None] & m_d[None, :], ACC, UPCAST).to(ACC)
        count = tl.minimum(width - start, BLOCK_D).to(ACC)
        b_mean = tl.sum(b_h, 1) / count
        deviation = tl.where(m_d[None, :], b_h - b_mean[:, None], 0.0)
        shift = b_mean - mean
        share = count / (start + count)
        mean += shift * share
        squares += tl.sum(deviation * deviation, 1) + shift * shift * (start * share)
    std = tl.sqrt(squares / (width - 1))
    scale = tl.sqrt(tl.rsqrt(width.to(ACC)) * LOG2_E) / (std + STD_EPS)
    tl.store(scales + first_query + o_t, scale, mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def _strips(
    hidden,
    scales,
    rows,
    partial_sums,
    stride_t,
    stride_d,
    width,
    num_rows,
    seq_len,
    CAUSAL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One pass for a short row: STRIP queries against all keys, softmax, column sums of the strip."""
    row, i_strip, partials = _find_row(rows, num_rows, seq_len, tl.program_id(0), "strips", COUNT_PADDING, STRIP, STRIP)
    first_query, queries, first_key, end_key = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    o_i = i_strip * STRIP + tl.arange(0, STRIP)
    o_j = tl.arange(0, SHORT_ROW)
    m_i, m_j = o_i < queries, o_j < queries
    p_i = hidden + (first_query + o_i) * stride_t
    p_j = hidden + (first_query + o_j) * stride_t
    b_products = products(
        p_i, p_j, m_i, m_j, stride_d, stride_d, width, STRIP, SHORT_ROW, BLOCK_D, ACC, PRECISION, UPCAST
    )
    b_scale_i = tl.load(scales + first_query + o_i, mask=m_i, other=0.0)
    b_scale_j = tl.load(scales + first_query + o_j, mask=m_j, other=0.0)
    m_seen = m_i[:, None] & ((o_j >= first_key) & (o_j < end_key))[None, :]
    m_seen = m_seen & (o_j[None, :] < o_i[:, None] if CAUSAL else o_j[None, :] != o_i[:, None])
    b_scores = tl.where(m_seen, b_products * b_scale_i[:, None] * b_scale_j[None, :], float("-inf"))
    peak = tl.max(b_scores, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # an empty softmax adds 0
    b_attention = tl.exp2(b_scores - peak[:, None])
    b_attention *= reciprocal(tl.sum(b_attention, 1))[:, None]
    p_sums = partial_sums + partials + i_strip.to(tl.int64) * queries + o_j
    tl.store(p_sums, tl.sum(b_attention, 0), mask=m_j)


@triton.jit
def _super_tile(queries, i_pair, TILE: tl.constexpr):
    """Row and column (I <= J) of a super-tile, its side in tiles, and how many tiles lie in its two strips.

    Super-tiles come PATCH columns at a time, row by row: those that run together share tiles, which then stay in the
    L2 cache.
    """
    side = _super_side(queries) // TILE
    tiles = tl.cdiv(queries, TILE)
    _, column = triangle(i_pair)
    first = column // PATCH * PATCH
    columns = tl.minimum(PATCH, tl.cdiv(tiles, side) - first)
    i_local = i_pair - first * (first + 1) // 2
    in_square = i_local < first * columns
    row_below, column_below = triangle(tl.where(in_square, 0, i_local - first * columns))
    row = tl.where(in_square, i_local // columns, first + row_below)
    column = first + tl.where(in_square, i_local % columns, column_below)
    return row, column, side, tl.minimum(side, tiles - row * side), tl.minimum(side, tiles - column * side)


@triton.jit
def _scores(
    p_row,  # first query's hidden state
    p_scale,
    o_i,
    o_j,
    queries,
    stride_t,
    stride_d,
    width,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Base-2 scores of a tile [TILE, TILE]."""
    m_i, m_j = o_i < queries, o_j < queries
    p_i, p_j = p_row + o_i.to(tl.int64) * stride_t, p_row + o_j.to(tl.int64) * stride_t
    b_products = products(p_i, p_j, m_i, m_j, stride_d, stride_d, width, TILE, TILE, BLOCK_D, ACC, PRECISION, UPCAST)
    b_scale_i = tl.load(p_scale + o_i, mask=m_i, other=0.0)
    b_scale_j = tl.load(p_scale + o_j, mask=m_j, other=0.0)
    return b_products * b_scale_i[:, None] * b_scale_j[None, :]


@triton.jit
def _merge_peaks(p_max, p_sum, peak, total, mask):
    """(max, sum) pairs merged with those in memory."""
    old_peak = tl.load(p_max, mask=mask, other=float("-inf"))
    old_total = tl.load(p_sum, mask=mask, other=0.0)
    new_peak = tl.maximum(peak, old_peak)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, total * tl.exp2(peak - safe) + old_total * tl.exp2(old_peak - safe)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics(
    hidden,
    scales,
    rows,
    partial_max,
    partial_sums,
    stride_t,
    stride_d,
    width,
    num_rows,
    seq_len,
    CAUSAL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """First pass: (max, sum of exp2) of the scores of each query over the keys of a super-tile.

    Slot J of the tokens of I holds the part over J and slot I of the tokens of J the part over I; the program owns
    both. The barriers order its stores before its own loads of what other threads stored.
    """
    row, i_pair, partials = _find_row(rows, num_rows, seq_len, tl.program_id(0), "super", COUNT_PADDING, STRIP, TILE)
    first_query, queries, first_key, end_key = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    i_row, i_column, side, tiles_i, tiles_j = _super_tile(queries, i_pair, TILE)
    p_row, p_scale = hidden + first_query * stride_t, scales + first_query
    slot_i = partials + i_column.to(tl.int64) * queries  # of the tokens of I
    slot_j = partials + i_row.to(tl.int64) * queries
    for ti in range(tiles_i):
        o_i = (i_row * side + ti) * TILE + tl.arange(0, TILE)
        m_key_i = (o_i >= first_key) & (o_i < end_key)
        peak_i = tl.full((TILE,), float("-inf"), dtype=ACC)
        total_i = tl.zeros((TILE,), dtype=ACC)
        for tj in range(tl.where(i_row == i_column, ti, 0), tiles_j):
            o_j = (i_column * side + tj) * TILE + tl.arange(0, TILE)
            b_scores = _scores(
                p_row, p_scale, o_i, o_j, queries, stride_t, stride_d, width, TILE, BLOCK_D, ACC, PRECISION, UPCAST
            )
            m_seen = ((o_j >= first_key) & (o_j < end_key))[None, :]
            m_seen = m_seen & (o_j[None, :] < o_i[:, None] if CAUSAL else o_j[None, :] != o_i[:, None])
            b_row = tl.where(m_seen, b_scores, float("-inf"))
            peak = tl.maximum(peak_i, tl.max(b_row, 1))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            total_i = total_i * tl.exp2(peak_i - safe) + tl.sum(tl.exp2(b_row - safe[:, None]), 1)
            peak_i = peak
            if i_row * side + ti != i_column * side + tj:  # else both directions are in the tile
                m_before = (o_i[:, None] < o_j[None, :]) if CAUSAL else (o_j[None, :] < queries)
                b_column = tl.where(m_key_i[:, None] & m_before, b_scores, float("-inf"))
                peak_j = tl.max(b_column, 0)
                safe_j = tl.where(peak_j == float("-inf"), 0.0, peak_j)
                total_j = tl.sum(tl.exp2(b_column - safe_j[None, :]), 0)
                m_j = o_j < queries
                if ti > 0:
                    peak_j, total_j = _merge_peaks(
                        partial_max + slot_j + o_j, partial_sums + slot_j + o_j, peak_j, total_j, m_j
                    )
                tl.store(partial_max + slot_j + o_j, peak_j, mask=m_j)
                tl.store(partial_sums + slot_j + o_j, total_j, mask=m_j)
        tl.debug_barrier()
        m_i = o_i < queries
        if (i_row == i_column) & (ti > 0):
            peak_i, total_i = _merge_peaks(
                partial_max + slot_i + o_i, partial_sums + slot_i + o_i, peak_i, total_i, m_i
            )
        tl.store(partial_max + slot_i + o_i, peak_i, mask=m_i)
        tl.store(partial_sums + slot_i + o_i, total_i, mask=m_i)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_statistics(
    partial_max,
    partial_sums,
    peaks,
    inverses,
    rows,
    num_rows,
    seq_len,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Maximum and inverse sum of each query's softmax, from its partials; inverse 0 where the softmax is empty."""
    row, i_block, partials = _find_row(
        rows, num_rows, seq_len, tl.program_id(0), "tokens", COUNT_PADDING, STRIP, TOKENS
    )
    first_query, queries, _, _ = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < queries
    peak = tl.full((TOKENS,), float("-inf"), dtype=ACC)
    total = tl.zeros((TOKENS,), dtype=ACC)
    slots = tl.where(queries <= SHORT_ROW, 0, tl.cdiv(queries, _super_side(queries)))
    for slot in range(slots):
        o_slot = partials + slot * queries.to(tl.int64) + o_t
        peak, total = _merge_peaks(partial_max + o_slot, partial_sums + o_slot, peak, total, m_t)
    tl.store(peaks + first_query + o_t, tl.where(peak == float("-inf"), 0.0, peak), mask=m_t)
    tl.store(inverses + first_query + o_t, reciprocal(total), mask=m_t)


@triton.jit(do_not_specialize=LENGTHS)
def _sums(
    hidden,
    scales,
    peaks,
    inverses,
    rows,
    partial_sums,
    stride_t,
    stride_d,
    width,
    num_rows,
    seq_len,
    CAUSAL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Second pass: how much attention each key of a super-tile receives from the queries of the super-tile."""
    row, i_pair, partials = _find_row(rows, num_rows, seq_len, tl.program_id(0), "super", COUNT_PADDING, STRIP, TILE)
    first_query, queries, first_key, end_key = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    i_row, i_column, side, tiles_i, tiles_j = _super_tile(queries, i_pair, TILE)
    p_row, p_scale = hidden + first_query * stride_t, scales + first_query
    slot_i = partials + i_column.to(tl.int64) * queries  # of the tokens of I
    slot_j = partials + i_row.to(tl.int64) * queries
    for ti in range(tiles_i):
        o_i = (i_row * side + ti) * TILE + tl.arange(0, TILE)
        m_i = o_i < queries
        m_key_i = (o_i >= first_key) & (o_i < end_key)
        b_peak_i = tl.load(peaks + first_query + o_i, mask=m_i, other=0.0)
        b_inverse_i = tl.load(inverses + first_query + o_i, mask=m_i, other=0.0)
        sum_i = tl.zeros((TILE,), dtype=ACC)
        for tj in range(tl.where(i_row == i_column, ti, 0), tiles_j):
            o_j = (i_column * side + tj) * TILE + tl.arange(0, TILE)
            m_j = o_j < queries
            b_scores = _scores(
                p_row, p_scale, o_i, o_j, queries, stride_t, stride_d, width, TILE, BLOCK_D, ACC, PRECISION, UPCAST
            )
            m_seen = m_i[:, None] & ((o_j >= first_key) & (o_j < end_key))[None, :]
            m_seen = m_seen & (o_j[None, :] < o_i[:, None] if CAUSAL else o_j[None, :] != o_i[:, None])
            b_exponent = tl.where(m_seen, b_scores - b_peak_i[:, None], float("-inf"))
            sum_j = tl.sum(tl.exp2(b_exponent) * b_inverse_i[:, None], 0)
            if i_row * side + ti != i_column * side + tj:  # else both directions are in the tile
                b_peak_j = tl.load(peaks + first_query + o_j, mask=m_j, other=0.0)
                b_inverse_j = tl.load(inverses + first_query + o_j, mask=m_j, other=0.0)
                m_before = (o_i[:, None] < o_j[None, :]) if CAUSAL else (o_j[None, :] < queries)
                b_exponent = tl.where(m_key_i[:, None] & m_before, b_scores - b_peak_j[None, :], float("-inf"))
                sum_i += tl.sum(tl.exp2(b_exponent) * b_inverse_j[None, :], 1)
            if ti > 0:
                sum_j += tl.load(partial_sums + slot_j + o_j, mask=m_j, other=0.0)
            tl.store(partial_sums + slot_j + o_j, sum_j, mask=m_j)
        tl.debug_barrier()
        if i_row == i_column:  # the diagonal tile's columns are these tokens too
            sum_i += tl.load(partial_sums + slot_i + o_i, mask=m_i, other=0.0)
        tl.store(partial_sums + slot_i + o_i, sum_i, mask=m_i)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_sums(
    partial_sums,
    importance,
    rows,
    num_rows,
    seq_len,
    COUNT_PADDING: tl.constexpr,
    STRIP: tl.constexpr,
    TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean attention over the queries, from the partials of a key; 1 in a row of one token."""
    row, i_block, partials = _find_row(
        rows, num_rows, seq_len, tl.program_id(0), "tokens", COUNT_PADDING, STRIP, TOKENS
    )
    first_query, queries, first_key, end_key = _row_geometry(rows, row, seq_len, COUNT_PADDING)
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_key = (o_t >= first_key) & (o_t < end_key)
    total = tl.zeros((TOKENS,), dtype=ACC)
    slots = tl.where(queries <= SHORT_ROW, tl.cdiv(queries, STRIP), tl.cdiv(queries, _super_side(queries)))
    for slot in range(slots):
        total += tl.load(partial_sums + partials + slot * queries.to(tl.int64) + o_t, mask=m_key, other=0.0)
    mean = tl.where(end_key - first_key == 1, 1.0, total / queries.to(ACC))
    tl.store(importance + first_query + o_t, mean, mask=m_key)


def _super_sides(queries: np.ndarray) -> np.ndarray:
    """``_super_side`` on the host."""
    return np.select([queries > 16384, queries > 8192, queries > 4096], [1024, 512, 256], 128)


def _programs(queries: np.ndarray, strip: int) -> dict[str, int]:
    """How many programs and partials ``_find_row`` deals out for rows with these numbers of queries."""
    short = queries <= SHORT_ROW.value
    side = -(-queries // _super_sides(queries))
    strips = -(-queries // strip)
    return {
        "strips": int(strips[short].sum()),
        "super": int((side * (side + 1) // 2)[~short].sum()),
        "partials": int((queries * np.where(short, strips, side)).sum()),
    }


def token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool
) -> Tensor:
    """``reference.token_importance``: no [S, S] in memory; at most 1 + 128 / S times S x S products of a row."""
    num = numerics(hidden)
    importance = hidden.new_zeros(hidden.shape[0], dtype=num.dtype)
    lengths = rows_host[:, 1].numpy().astype(np.int64)
    queries = np.where(lengths > 0, seq_len, 0) if count_padding else lengths
    strip = num.row("strips").blocks["STRIP"]
    geometry = {
        "rows": rows,
        "num_rows": rows.shape[0],
        "seq_len": seq_len if count_padding else 0,
        "COUNT_PADDING": count_padding,
        "STRIP": strip,
    }
    stride_t, stride_d = hidden.stride()
    states = {"hidden": hidden, "stride_t": stride_t, "stride_d": stride_d, "width": hidden.shape[1], **geometry}
    programs = _programs(queries, strip)
    scales = hidden.new_empty(hidden.shape[0], dtype=num.dtype)
    partial_sums = hidden.new_empty(programs["partials"], dtype=num.dtype)
    _launch_blocks("token_scale", _token_scale, queries, num, scales=scales, **states)
    tiled = {"scales": scales, "partial_sums": partial_sums, "CAUSAL": causal, **states}
    launch("strips", _strips, (programs["strips"],), num, **tiled)
    if programs["super"]:
        partial_max, peaks, inverses = (torch.empty_like(x) for x in (partial_sums, scales, scales))
        softmax = {"peaks": peaks, "inverses": inverses}
        partials = {"partial_max": partial_max, "partial_sums": partial_sums}
        launch("statistics", _statistics, (programs["super"],), num, partial_max=partial_max, **tiled)
        _launch_blocks("merge_statistics", _merge_statistics, queries, num, **partials, **softmax, **geometry)
        launch("sums", _sums, (programs["super"],), num, **softmax, **tiled)
    _launch_blocks(
        "merge_sums", _merge_sums, queries, num, partial_sums=partial_sums, importance=importance, **geometry
    )
    return importance


def _launch_blocks(name: str, kernel: Any, queries: np.ndarray, num: Numerics, **arguments: Any) -> None:
    """Launch a kernel that has one program for each block of tokens of each row."""
    blocks = -(-queries // num.row(name).blocks["TOKENS"])
    launch(name, kernel, (int(blocks.sum()),), num, **arguments)
