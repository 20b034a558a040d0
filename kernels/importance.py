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
from mta_fast.contract import checked
from mta_fast.kernels._device import load, power_of_two, products, reciprocal
from mta_fast.kernels._launch import Numerics, launch, numerics
from mta_fast.kernels._rows import SHORT_ROW, most_programs, own_row, programs, slots, super_tile
from mta_fast.layout import has_capacities

STD_EPS = tl.constexpr(reference.STD_EPS)
LENGTHS = ("num_rows", "seq_len")  # change every step: no variant is compiled for their divisors
LOG2_E = tl.constexpr(1.4426950408889634)
MOST_SQUARES = tl.constexpr(2.0**120)  # up to it no square is infinite; those that vanish count for nothing
LEAST_SCALE = tl.constexpr(2.0**-20)  # of tokens whose products fit float32 wherever their scores do


@triton.jit
def _seen(o_i, o_j, first_key, end_key, CAUSAL: tl.constexpr):
    """Which keys j a query i attends to: real ones other than itself, or with CAUSAL before it."""
    m_key = ((o_j >= first_key) & (o_j < end_key))[None, :]
    return m_key & (o_j[None, :] < o_i[:, None] if CAUSAL else o_j[None, :] != o_i[:, None])


@triton.jit
def _square_deviations(
    p_t, m_t, stride_d, width, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
    b_power=None,
):  # fmt: skip
    """Sum of (h - mean)^2 of TOKENS tokens, which may be multiplied with a power of two.

    Merged block by block, not a difference of large sums; off by a rounding, a block's mean would be as STD_EPS is."""
    mean = tl.zeros((TOKENS,), dtype=ACC)
    squares = tl.zeros((TOKENS,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_h = load(p_t[:, None] + o_d[None, :] * stride_d, m_t[:, None] & m_d[None, :], ACC, UPCAST).to(ACC)
        if b_power is not None:
            b_h *= b_power[:, None]
        count = tl.minimum(width - start, BLOCK_D).to(ACC)
        b_mean = tl.sum(b_h, 1) / count
        b_mean += tl.sum(tl.where(m_d[None, :], b_h - b_mean[:, None], 0.0), 1) / count
        deviation = tl.where(m_d[None, :], b_h - b_mean[:, None], 0.0)
        shift = b_mean - mean
        share = count / (start + count)
        mean = tl.where(start == 0, b_mean, mean + shift * share)
        squares += tl.sum(deviation * deviation, 1) + shift * shift * (start * share)
    return squares


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
    """sqrt(log2(e) / sqrt(d)) / (std(h) + eps) of each query: the product of two turns h . h into a base-2 score."""
    first_query, queries, _, _, _, i_block = own_row(rows, num_rows, seq_len, "tokens", COUNT_PADDING, STRIP, TOKENS)
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < queries
    p_t = hidden + (first_query + o_t) * stride_t
    squares = _square_deviations(p_t, m_t, stride_d, width, TOKENS, BLOCK_D, ACC, UPCAST)
    std = tl.sqrt(squares / (width - 1))
    m_fits = squares <= MOST_SQUARES
    if tl.min(m_fits.to(tl.int32), 0) == 0:
        b_peak = tl.zeros((TOKENS,), dtype=ACC)
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            m_h = m_t[:, None] & (o_d < width)[None, :]
            b_h = load(p_t[:, None] + o_d[None, :] * stride_d, m_h, ACC, UPCAST).to(ACC)
            b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_h), 1))
        b_power = power_of_two(b_peak)
        squares = _square_deviations(p_t, m_t, stride_d, width, TOKENS, BLOCK_D, ACC, UPCAST, b_power)
        std = tl.where(
            m_fits, std, tl.sqrt(squares / (width - 1)) * power_of_two(b_power)
        )  # a token's bits are its own
    scale = tl.sqrt(tl.rsqrt(width.to(ACC)) * LOG2_E) / (std + STD_EPS)
    tl.store(scales + first_query + o_t, scale, mask=m_t)


@triton.jit
def _scaled_products(
    p_i, p_j, m_i, m_j, b_scale_i, b_scale_j, stride_d, width, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[M, N] base-2 scores h_i . h_j scale_i scale_j.

    Where states are so large that a product could overflow though its score does not, a power of two of each scale
    comes first. Else it would cost the tensor cores their direct way to the shared memory.
    """
    if p_i.dtype.element_ty == tl.float16:  # has no states so large
        b_scores = products(p_i, p_j, m_i, m_j, stride_d, stride_d, width, M, N, BLOCK_D, ACC, PRECISION, UPCAST)
        b_scores = b_scores * b_scale_i[:, None] * b_scale_j[None, :]
    elif tl.minimum(tl.min(b_scale_i, 0), tl.min(b_scale_j, 0)) < LEAST_SCALE:
        b_inverse_i, b_inverse_j = power_of_two(b_scale_i), power_of_two(b_scale_j)
        b_power_i, b_power_j = power_of_two(b_inverse_i), power_of_two(b_inverse_j)
        b_scores = products(  # in blocks so small that the common case keeps its registers
            p_i, p_j, m_i, m_j, stride_d, stride_d, width, M, N, 16, ACC, PRECISION, UPCAST, b_power_i, b_power_j
        )
        b_scores = b_scores * (b_scale_i * b_inverse_i)[:, None] * (b_scale_j * b_inverse_j)[None, :]
    else:
        b_scores = products(p_i, p_j, m_i, m_j, stride_d, stride_d, width, M, N, BLOCK_D, ACC, PRECISION, UPCAST)
        b_scores = b_scores * b_scale_i[:, None] * b_scale_j[None, :]
    return b_scores


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
    first_query, queries, first_key, end_key, partials, i_strip = own_row(
        rows, num_rows, seq_len, "strips", COUNT_PADDING, STRIP, STRIP
    )
    if queries == 0:
        return
    o_i = i_strip * STRIP + tl.arange(0, STRIP)
    o_j = tl.arange(0, SHORT_ROW)
    m_i, m_j = o_i < queries, o_j < queries
    p_i = hidden + (first_query + o_i) * stride_t
    p_j = hidden + (first_query + o_j) * stride_t
    b_scale_i = tl.load(scales + first_query + o_i, mask=m_i, other=1.0)
    b_scale_j = tl.load(scales + first_query + o_j, mask=m_j, other=1.0)
    b_scores = _scaled_products(
        p_i, p_j, m_i, m_j, b_scale_i, b_scale_j, stride_d, width, STRIP, SHORT_ROW, BLOCK_D, ACC, PRECISION, UPCAST
    )
    m_seen = m_i[:, None] & _seen(o_i, o_j, first_key, end_key, CAUSAL)
    b_scores = tl.where(m_seen, b_scores, float("-inf"))
    peak = tl.max(b_scores, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # an empty softmax adds 0
    b_root = tl.exp2((b_scores - peak[:, None]) * 0.5)
    inverse = reciprocal(tl.sum(b_root * b_root, 1))
    b_attention = _attention(b_root, inverse[:, None])
    p_sums = partial_sums + partials + i_strip.to(tl.int64) * queries + o_j
    tl.store(p_sums, tl.sum(b_attention, 0), mask=m_j)


@triton.jit
def _attention(b_root, b_inverse):
    """Softmax terms from exp2 of half the exponents: a GPU's exp2 flushes subnormal results, its products don't.

    A token of importance 1e-40 still has a state of its own in a span of one token; one of importance 0 has none.
    """
    return (b_root * b_inverse) * b_root


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
    b_scale_i = tl.load(p_scale + o_i, mask=m_i, other=1.0)
    b_scale_j = tl.load(p_scale + o_j, mask=m_j, other=1.0)
    return _scaled_products(
        p_i, p_j, m_i, m_j, b_scale_i, b_scale_j, stride_d, width, TILE, TILE, BLOCK_D, ACC, PRECISION, UPCAST
    )


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
    first_query, queries, first_key, end_key, partials, i_pair = own_row(
        rows, num_rows, seq_len, "super", COUNT_PADDING, STRIP, TILE
    )
    if queries == 0:
        return
    i_row, i_column, side, tiles_i, tiles_j = super_tile(queries, i_pair, TILE)
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
            b_row = tl.where(_seen(o_i, o_j, first_key, end_key, CAUSAL), b_scores, float("-inf"))
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
    first_query, queries, _, _, partials, i_block = own_row(
        rows, num_rows, seq_len, "tokens", COUNT_PADDING, STRIP, TOKENS
    )
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < queries
    peak = tl.full((TOKENS,), float("-inf"), dtype=ACC)
    total = tl.zeros((TOKENS,), dtype=ACC)
    for slot in range(tl.where(queries <= SHORT_ROW, 0, slots(queries, STRIP))):
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
    first_query, queries, first_key, end_key, partials, i_pair = own_row(
        rows, num_rows, seq_len, "super", COUNT_PADDING, STRIP, TILE
    )
    if queries == 0:
        return
    i_row, i_column, side, tiles_i, tiles_j = super_tile(queries, i_pair, TILE)
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
            m_seen = m_i[:, None] & _seen(o_i, o_j, first_key, end_key, CAUSAL)
            b_exponent = tl.where(m_seen, b_scores - b_peak_i[:, None], float("-inf"))
            sum_j = tl.sum(_attention(tl.exp2(b_exponent * 0.5), b_inverse_i[:, None]), 0)
            if i_row * side + ti != i_column * side + tj:  # else both directions are in the tile
                b_peak_j = tl.load(peaks + first_query + o_j, mask=m_j, other=0.0)
                b_inverse_j = tl.load(inverses + first_query + o_j, mask=m_j, other=0.0)
                m_before = (o_i[:, None] < o_j[None, :]) if CAUSAL else (o_j[None, :] < queries)
                b_exponent = tl.where(m_key_i[:, None] & m_before, b_scores - b_peak_j[None, :], float("-inf"))
                sum_i += tl.sum(_attention(tl.exp2(b_exponent * 0.5), b_inverse_j[None, :]), 1)
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
    first_query, queries, first_key, end_key, partials, i_block = own_row(
        rows, num_rows, seq_len, "tokens", COUNT_PADDING, STRIP, TOKENS
    )
    o_t = i_block * TOKENS + tl.arange(0, TOKENS)
    m_key = (o_t >= first_key) & (o_t < end_key)
    total = tl.zeros((TOKENS,), dtype=ACC)
    for slot in range(slots(queries, STRIP)):
        total += tl.load(partial_sums + partials + slot * queries.to(tl.int64) + o_t, mask=m_key, other=0.0)
    mean = tl.where(end_key - first_key == 1, 1.0, total / queries.to(ACC))
    tl.store(importance + first_query + o_t, mean, mask=m_key)


@checked
def token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool
) -> Tensor:
    """``reference.token_importance``: no [S, S] in memory; at most 1 + 128 / S times S x S products of a row."""
    num = numerics(hidden)
    importance = hidden.new_zeros(hidden.shape[0], dtype=num.dtype)
    lengths = rows_host[:, -1].numpy().astype(np.int64)  # or what they may be
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
    bounded = len(queries) and has_capacities(rows_host)
    dealt = most_programs(int(queries[0]), len(queries), strip) if bounded else programs(queries, strip)
    scales = hidden.new_empty(hidden.shape[0], dtype=num.dtype)
    partial_sums = hidden.new_empty(dealt["partials"], dtype=num.dtype)
    _launch_blocks("token_scale", _token_scale, queries, num, scales=scales, **states)
    tiled = {"scales": scales, "partial_sums": partial_sums, "CAUSAL": causal, **states}
    launch("strips", _strips, (dealt["strips"],), num, **tiled)
    if dealt["super"]:
        partial_max, peaks, inverses = (torch.empty_like(x) for x in (partial_sums, scales, scales))
        softmax = {"peaks": peaks, "inverses": inverses}
        partials = {"partial_max": partial_max, "partial_sums": partial_sums}
        launch("statistics", _statistics, (dealt["super"],), num, partial_max=partial_max, **tiled)
        _launch_blocks("merge_statistics", _merge_statistics, queries, num, **partials, **softmax, **geometry)
        launch("sums", _sums, (dealt["super"],), num, **softmax, **tiled)
    _launch_blocks(
        "merge_sums", _merge_sums, queries, num, partial_sums=partial_sums, importance=importance, **geometry
    )
    return importance


def _launch_blocks(name: str, kernel: Any, queries: np.ndarray, num: Numerics, **arguments: Any) -> None:
    """Launch a kernel that has one program for each block of tokens of each row."""
    blocks = -(-queries // num.row(name).blocks["TOKENS"])
    launch(name, kernel, (int(blocks.sum()),), num, **arguments)
