"""How the rows of a batch are dealt out to the programs of the importance kernels.

Rows of up to SHORT_ROW queries are cut into strips, longer ones into super-tiles. A program finds its row by itself,
from the lengths: no table of tiles has to be made or copied for a batch.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from mta_fast.kernels._device import ROWS_AT_ONCE, triangle

SHORT_ROW = tl.constexpr(256)
PATCH = tl.constexpr(12)  # 12 columns x 11 rows of super-tiles on an H100's 132 multiprocessors: 23 tiles in the cache


@triton.jit
def attending(length, seq_len, COUNT_PADDING: tl.constexpr):
    """How many positions attend: the row's tokens, or with COUNT_PADDING all of its positions."""
    return tl.where(length > 0, seq_len, 0) if COUNT_PADDING else length


@triton.jit
def super_side(queries):
    """Tokens on the side of a super-tile: few partials for long rows; from 2,049 tokens on at least 136 programs."""
    return tl.where(queries > 16384, 1024, tl.where(queries > 8192, 512, tl.where(queries > 4096, 256, 128)))


@triton.jit
def slots(queries, STRIP: tl.constexpr):
    """How many partials each token of a row has."""
    return tl.where(queries <= SHORT_ROW, tl.cdiv(queries, STRIP), tl.cdiv(queries, super_side(queries)))


@triton.jit
def find_row(
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
        queries = attending(tl.load(rows + 2 * o_row + 1, mask=m_row, other=0), seq_len, COUNT_PADDING)
        short = queries <= SHORT_ROW
        partials_each = slots(queries, STRIP)
        if WHICH == "tokens":
            programs = tl.cdiv(queries, BLOCK)
        elif WHICH == "strips":
            programs = tl.where(short, partials_each, 0)
        else:
            programs = tl.where(short, 0, partials_each * (partials_each + 1) // 2)
        passed = m_row & (before + tl.cumsum(programs, 0) <= i_program)
        row += tl.sum(passed.to(tl.int32), 0)
        local -= tl.sum(tl.where(passed, programs, 0), 0)
        partials += tl.sum(tl.where(passed, queries.to(tl.int64) * partials_each, 0), 0)
        before += tl.sum(programs, 0)
    return row, local, partials


@triton.jit
def row_geometry(rows, row, seq_len, COUNT_PADDING: tl.constexpr):
    """First query (flat) and number of queries of a row; its keys [first, end) counted from the first query."""
    start = tl.load(rows + 2 * row)
    length = tl.load(rows + 2 * row + 1)
    if COUNT_PADDING:
        first_query = row * seq_len
        first_key = start - first_query
        return first_query.to(tl.int64), seq_len, first_key, first_key + length
    else:
        return start.to(tl.int64), length, 0, length


@triton.jit
def own_row(
    rows, num_rows, seq_len, WHICH: tl.constexpr, COUNT_PADDING: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr
):
    """The geometry of this program's row, where the row's partials start, and which of its programs this is.

    A program beyond those of the last row, of which there are some where a batch has capacities, has no queries and no
    keys.
    """
    row, local, partials = find_row(rows, num_rows, seq_len, tl.program_id(0), WHICH, COUNT_PADDING, STRIP, BLOCK)
    last = tl.minimum(row, num_rows - 1)
    first_query, queries, first_key, end_key = row_geometry(rows, last, seq_len, COUNT_PADDING)
    inside = row == last
    return first_query, tl.where(inside, queries, 0), first_key, tl.where(inside, end_key, first_key), partials, local


@triton.jit
def super_tile(queries, i_pair, TILE: tl.constexpr):
    """Row and column (I <= J) of a super-tile, its side in tiles, and how many tiles lie in its two strips.

    Super-tiles come PATCH columns at a time, row by row: those that run together share tiles, which then stay in the
    L2 cache.
    """
    side = super_side(queries) // TILE
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


def super_sides(queries: np.ndarray) -> np.ndarray:
    """``super_side`` on the host."""
    return np.select([queries > 16384, queries > 8192, queries > 4096], [1024, 512, 256], 128)


def most_programs(longest: int, rows: int, strip: int) -> dict[str, int]:
    """At least as many as ``programs`` for any ``rows`` rows of up to ``longest`` queries."""
    lengths = [length for length in (SHORT_ROW.value, 4096, 8192, 16384) if length < longest]  # where more begins
    each = [programs(np.array([length]), strip) for length in (*lengths, longest)]
    return {name: rows * max(own[name] for own in each) for name in ("strips", "super", "partials")}


def programs(queries: np.ndarray, strip: int) -> dict[str, int]:
    """How many programs and partials ``find_row`` deals out for rows with these numbers of queries."""
    strips = -(-queries // strip)
    if queries.max(initial=0) <= SHORT_ROW.value:
        return {"strips": int(strips.sum()), "super": 0, "partials": int((queries * strips).sum())}
    short = queries <= SHORT_ROW.value
    side = -(-queries // super_sides(queries))
    return {
        "strips": int(strips[short].sum()),
        "super": int((side * (side + 1) // 2)[~short].sum()),
        "partials": int((queries * np.where(short, strips, side)).sum()),
    }
