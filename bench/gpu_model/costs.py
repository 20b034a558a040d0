"""What launches cost: operations of their products and bytes of device memory; what data sheets allow.

One function for each Triton kernel, under its name. It counts from the launch's arguments and the lengths of its
batch's rows and spans, and holds for the program as it is written: ``tests/test_bench_model.py`` compares every one
with the products, loads and stores of the interpreted kernel, byte by byte.

Operations: 2 M N K of every tile that is multiplied, so the padding of a row's last tile and of the width to whole
blocks is included. Arithmetic outside of the tensor cores is not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mta_fast import SpanBatch
from mta_fast.kernels._launch import Launch
from mta_fast.kernels._rows import SHORT_ROW, super_sides

INDEX = 4  # bytes of an int32
DOUBLE = 8
# What a kernel writes and reads again, or reads in several passes: every access counts, as it may be more than a cache
# holds
SCRATCH = {
    "statistics": ("partial_max", "partial_sums"),
    "sums": ("partial_sums",),
    "span_weights": ("token_weight",),
    "diverge": ("student", "teacher"),
}


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one launch."""

    flops: int = 0  # of the products
    inputs: int = 0  # distinct bytes that are read; a second read, by any program, comes from a cache
    outputs: int = 0  # distinct bytes that are written
    scratch: int = 0  # bytes of every further access to what ``SCRATCH`` names
    shared: int = 0  # of ``inputs``, what further programs read again; of pool, pool_gradient and align only

    @property
    def minimum(self) -> int:
        """Every input read once, every output written once."""
        return self.inputs + self.outputs

    @property
    def bytes(self) -> int:
        """What device memory moves."""
        return self.minimum + self.scratch


@dataclass(frozen=True)
class Batch:
    """The lengths behind the index tensors of a SpanBatch, which in a dry run hold no data."""

    lengths: np.ndarray  # [B] tokens of each row
    short: np.ndarray  # lengths of the rows that take one pass, the empty ones left out
    long: np.ndarray  # of those that take two
    super_partials: int  # of the long rows' super-tiles
    counts: np.ndarray  # [B] spans of each row
    filled: int  # rows with a token
    tokens: int
    spans: int
    range_tokens: int  # tokens of all spans, a token once for each span
    distinct_tokens: int  # tokens that lie in some span
    covered: int  # C
    incidences: int  # I
    covering_spans: int  # distinct spans among the incidences

    @classmethod
    def of(cls, spans: SpanBatch) -> Batch:
        """Read from a SpanBatch on the CPU."""
        inside = np.zeros(int(np.prod(spans.shape)) + 1, np.int64)
        starts, ends = spans.ranges.numpy().T
        np.add.at(inside, starts, 1)
        np.add.at(inside, ends, -1)
        lengths, counts = (t.numpy().astype(np.int64) for t in (spans.rows.host[:, 1], spans.host[:, 0].diff()))
        long = lengths[lengths > SHORT_ROW.value]
        return cls(
            lengths=lengths,
            short=lengths[(lengths > 0) & (lengths <= SHORT_ROW.value)],
            long=long,
            super_partials=int((long * -(-long // super_sides(long))).sum()),
            counts=counts,
            filled=int((lengths > 0).sum()),
            tokens=int(lengths.sum()),
            spans=int(counts.sum()),
            range_tokens=int((ends - starts).sum()),
            distinct_tokens=int((inside.cumsum() > 0).sum()),
            covered=spans.covered.shape[0],
            incidences=spans.cover_spans.shape[0],
            covering_spans=len(np.unique(spans.cover_spans.numpy())),
        )

    def row_table(self, rows: int) -> int:
        """Every program looks its row up by the lengths of all, and reads the start of its own."""
        return INDEX * (len(self.lengths) + rows)


@dataclass(frozen=True)
class Gpu:
    """Dense peaks and memory bandwidth of a data sheet, per second."""

    name: str
    sheet: str
    bfloat16: float
    tf32: float
    float32: float
    bandwidth: float

    def peak(self, precision: str) -> float:
        """Operations a second; a float32 product in split precision is three of TF32."""
        peaks = {"bfloat16": self.bfloat16, "tf32": self.tf32, "tf32x3": self.tf32 / 3, "ieee": self.float32}
        return peaks[precision]


_SPARSE = "half of its rates with sparsity"
GPUS = (
    Gpu("A100", "NVIDIA A100 data sheet, SXM 80GB", 312e12, 156e12, 19.5e12, 2.039e12),
    Gpu("H100", f"NVIDIA H100 data sheet, SXM; {_SPARSE}", 989.5e12, 494.5e12, 67e12, 3.35e12),
    Gpu("B200", f"NVIDIA HGX B200 data sheet, one of eight; {_SPARSE}", 2250e12, 1125e12, 75e12, 8e12),
)


def cost(launch: Launch, batch: Batch | None) -> Cost:
    """What a launch costs; ``batch`` is the one that it works on, None of a kernel that knows no rows and spans."""
    return COSTS[launch.name](launch.arguments, batch, launch.grid)


def precision(launch: Launch) -> str:
    """What its products are multiplied in: "bfloat16" for both half precisions, "tf32x3", "tf32" or "ieee"."""
    parts = launch.arguments.get("student_parts")
    if parts is not None:  # of unit spans: bfloat16 wherever they are not float64 (the interpreter keeps them wider)
        return "ieee" if parts.dtype == torch.float64 else "bfloat16"
    states = launch.arguments.get("hidden", launch.arguments.get("student"))
    return "bfloat16" if is_half(states) else launch.arguments.get("PRECISION", "ieee")


def is_half(tensor: Tensor | None) -> bool:
    """Whether it holds bfloat16 or float16."""
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


Arguments = dict[str, Any]
Grid = tuple[int, ...]


def _size(a: Arguments, name: str) -> int:
    size: int = a[name].element_size()
    return size


def _padded(width: int, block: int) -> int:
    return -(-width // block) * block


# --- torch's launches --------------------------------------------------------------------------------------------

GEMMS = {"mm", "addmm", "addmm_"}
FILLS = {"zeros", "new_zeros", "ones_like", "scalar_tensor"}
GATHERS = {"index", "index_select"}


def torch_cost(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Cost:
    """What one of torch's operators costs on tensors of these shapes, in one launch."""
    read, written = [_distinct_bytes(t) for t in inputs], sum(map(_distinct_bytes, outputs))
    if name in GEMMS:
        return Cost(2 * outputs[0].numel() * inputs[-2].shape[-1], sum(read), written)
    if name in FILLS:
        return Cost(outputs=written)
    if name in GATHERS:  # of the tensor only what is gathered
        return Cost(inputs=written + sum(read[1:]), outputs=written)
    if name == "copy_":
        return Cost(inputs=read[1], outputs=written)
    if name == "index_copy_":  # to, index, from
        return Cost(inputs=sum(read[1:]), outputs=read[2])
    return Cost(inputs=sum(read), outputs=written)


def _distinct_bytes(tensor: Tensor) -> int:
    """An expanded dimension counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


# --- importance --------------------------------------------------------------------------------------------------


def token_scale(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    states = batch.tokens * a["width"] * _size(a, "hidden")
    table = batch.row_table(batch.filled)
    return Cost(inputs=states + table, outputs=batch.tokens * _size(a, "scales"))


def strips(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    size, token = _size(a, "scales"), a["width"] * _size(a, "hidden") + _size(a, "scales")
    return Cost(
        flops=grid[0] * 2 * a["STRIP"] * SHORT_ROW.value * _padded(a["width"], a["BLOCK_D"]),
        inputs=int(batch.short.sum()) * token + batch.row_table(len(batch.short)),
        outputs=_strip_partials(a, batch) * size,
    )


def _strip_partials(a: Arguments, batch: Batch) -> int:
    return int((batch.short * -(-batch.short // a["STRIP"])).sum())


@cache
def _partial_accesses(length: int, tile: int) -> tuple[int, int]:
    """Loads and stores of the partials of a long row by ``statistics`` (in pairs) and by ``sums``."""
    tiles = [min(tile, length - start) for start in range(0, length, tile)]
    side = int(super_sides(np.array(length))) // tile
    strips = [tiles[first : first + side] for first in range(0, len(tiles), side)]
    statistics = sums = 0
    for i, j in itertools.combinations_with_replacement(range(len(strips)), 2):
        if i != j:  # each row of tiles but the first adds to what is there; then the slot of I is stored
            made = (2 * len(strips[i]) - 1) * sum(strips[j]) + sum(strips[i])
            statistics, sums = statistics + made, sums + made
            continue
        for column, size in enumerate(strips[j]):  # ti = 0 ... column, of which statistics leaves out the diagonal
            statistics += max(2 * column - 1, 0) * size
            sums += (2 * column + 1) * size
        statistics += 2 * sum(strips[i]) - strips[i][0]
        sums += 2 * sum(strips[i])
    return statistics, sums


def _triangle(a: Arguments, batch: Batch, which: int, numbers: int, outputs: int) -> Cost:
    """Of all tiles on and above the diagonal; ``numbers`` a token are read beside the states."""
    size, tiles = _size(a, "scales"), -(-batch.long // a["TILE"])
    accesses = sum(_partial_accesses(int(length), a["TILE"])[which] for length in batch.long)
    written = outputs * batch.super_partials * size
    token = a["width"] * _size(a, "hidden") + numbers * size
    return Cost(
        flops=int((tiles * (tiles + 1) // 2).sum()) * 2 * a["TILE"] ** 2 * _padded(a["width"], a["BLOCK_D"]),
        inputs=int(batch.long.sum()) * token + batch.row_table(len(batch.long)),
        outputs=written,
        scratch=outputs * accesses * size - written,
    )


def statistics(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    return _triangle(a, batch, 0, numbers=1, outputs=2)


def sums(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    return _triangle(a, batch, 1, numbers=3, outputs=1)


def merge_statistics(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    size, table = _size(a, "peaks"), batch.row_table(batch.filled)
    return Cost(inputs=2 * batch.super_partials * size + table, outputs=2 * batch.tokens * size)


def merge_sums(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    size, table = _size(a, "importance"), batch.row_table(batch.filled)
    partials = _strip_partials(a, batch) + batch.super_partials
    return Cost(inputs=partials * size + table, outputs=batch.tokens * size)


# --- pooling -----------------------------------------------------------------------------------------------------


def span_weights(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    rows, size = len(batch.counts), _size(a, "token_weight")
    covers = 2 * batch.covered + 1 if batch.covered else 0  # covered, cover_splits
    return Cost(
        inputs=INDEX * (2 * (rows + 1) + covers + 2 * batch.spans) + batch.covered * _size(a, "values"),
        outputs=(rows + batch.covered + batch.spans) * size,
        scratch=batch.range_tokens * size,
    )


def pool(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    token = a["width"] * _size(a, "hidden") + _size(a, "weights")
    return Cost(
        inputs=2 * INDEX * batch.spans + batch.distinct_tokens * token,
        outputs=batch.spans * ((a["width"] + 1) * _size(a, "pooled") + _size(a, "span_weight")),
        shared=(batch.range_tokens - batch.distinct_tokens) * token,
    )


def pool_gradient(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    tokens, span = grid[0], a["width"] * _size(a, "grad") + _size(a, "span_weight")
    index = INDEX * (tokens + 1 + batch.incidences)
    return Cost(
        inputs=index + batch.covered * _size(a, "weights") + batch.covering_spans * span,
        outputs=tokens * a["width"] * _size(a, "gradient"),
        shared=(batch.incidences - batch.covering_spans) * span + INDEX * (tokens - 1),
    )


# --- span pairs --------------------------------------------------------------------------------------------------


PRODUCTS = {1: 1, 2: 3, 3: 6}  # of factors that are sums of so many parts


def unit_parts(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    span = a["student_width"] * _size(a, "student") + a["teacher_width"] * _size(a, "teacher")
    span += 2 * _size(a, "student_norm") + _size(a, "weights")
    return Cost(inputs=grid[0] * span, outputs=grid[0] * _parts(a, "student", "teacher"))


def _parts(a: Arguments, *sides: str) -> int:
    """Bytes of a span's parts."""
    return a["PARTS"] * sum(a[f"{side}_padded"] for side in sides) * _size(a, "student_parts")


def _group(a: Arguments, batch: Batch) -> tuple[np.ndarray, int]:
    """Spans of each of a group's rows, and the bytes of its row table."""
    rows = batch.counts[a["first_row"] :][: a["num_rows"]]
    return rows, INDEX * (2 if a["IN_STRIPS"] else len(rows) + 1)


def pair_errors(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    counts, table = _group(a, batch)
    terms, tile = grid[0], a["TILE"]
    if a["IN_STRIPS"]:  # a term for every j >= i
        i = a["first_tile"] + np.arange(grid[0] // a["strip_tiles"])
        terms = int((a["strip_tiles"] - i).sum())
    written = 0
    if a["WITH_GRADIENT"]:
        along = (1 if a["IN_STRIPS"] else 2) * tile * _size(a, "along")
        written = grid[0] * (a["PARTS"] * tile**2 * _size(a, "errors") + along)
    spans = int(counts.sum())
    return Cost(
        flops=grid[0] * 2 * tile**2 * (a["student_padded"] + a["teacher_padded"]) * PRODUCTS[a["PARTS"]],
        inputs=table + spans * (_parts(a, "student", "teacher") + _size(a, "weights")),
        outputs=terms * DOUBLE + written,
    )


def pair_gradients(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    counts, table = _group(a, batch)
    tile, width, size = a["TILE"], a["student_width"], _size(a, "gradient")
    steps = read = along = spans = 0
    for count in map(int, counts):
        tiles, depth = -(-count // tile), _padded(count, a["BLOCK_K"])
        if a["IN_STRIPS"]:
            tiles = grid[0]
            steps, read, along = tiles * depth, tiles * tile * depth, tiles * a["strip_tiles"] * tile
            spans += min(count - a["first_tile"] * tile, tiles * tile)
        else:
            last = depth - (tiles - 1) * tile  # features of the last diagonal tile that are read
            steps += tiles * depth
            read += tiles * (tiles + 1) // 2 * tile**2 - (tile - last) * tile if tiles else 0
            along += tiles**2 * tile
            spans += count
    features = min(a["student_padded"], grid[1] * a["BLOCK_N"])
    parts = a["PARTS"] * features * _size(a, "student_parts") * int(counts.sum())
    own = width * _size(a, "student") + _size(a, "student_norm") + _size(a, "weights")
    return Cost(
        flops=grid[1] * steps * 2 * tile * a["BLOCK_N"] * PRODUCTS[a["PARTS"]],
        inputs=table + a["PARTS"] * read * _size(a, "errors") + along * _size(a, "along") + parts + spans * own,
        outputs=spans * width * size,
    )


def row_totals(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    rows, gram = len(batch.counts), _gram_rows(a, batch)
    terms = a["tile_terms"].numel() + len(gram) * a["num_tiles"] + int(gram.sum())
    read = INDEX * (rows + 1) + batch.spans * _size(a, "weights") + terms * DOUBLE
    return Cost(inputs=read, outputs=2 * rows * _size(a, "numerators"))


def _gram_rows(a: Arguments, batch: Batch) -> np.ndarray:
    return batch.counts[batch.counts >= a["gram_from"]]


def _gram_inputs(a: Arguments, batch: Batch, per_span: int, means: int) -> int:
    """Row table, both sides' spans, the means of some rows, and ``per_span`` further numbers a span."""
    spans, width = int(_gram_rows(a, batch).sum()), a["student_width"] + a["teacher_width"]
    return INDEX * (len(batch.counts) + 1) + _size(a, "student") * (spans * (width + per_span) + means * width)


def gram_products(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    counts, size = _gram_rows(a, batch), _size(a, "gram_xx")
    matrices = a["student_width"] * (a["student_width"] + a["teacher_width"])
    depth = int((-(-counts // a["BLOCK_U"]) * a["BLOCK_U"]).sum())
    terms = int(counts.sum()) * (DOUBLE + 2 * size)  # of the programs that follow the tiles
    return Cost(
        flops=a["num_tiles"] * 2 * a["TILE"] ** 2 * depth,
        inputs=_gram_inputs(a, batch, 3, len(counts)) + len(counts) * DOUBLE,
        outputs=len(counts) * (matrices * size + a["num_tiles"] * DOUBLE) + terms,
    )


def gram_gradient(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    counts, size = _gram_rows(a, batch), _size(a, "gradient")
    width_s, width_t = a["student_width"], a["teacher_width"]
    depth = _padded(width_s, a["BLOCK_D"]) + _padded(width_t, a["BLOCK_D"])
    rows = int((counts > 0).sum())
    kept = rows * width_s * (width_s + width_t + 1)  # X'DX, Y'DX and the pull
    return Cost(
        flops=grid[0] * grid[1] * 2 * a["TILE"] ** 2 * depth,
        inputs=_gram_inputs(a, batch, 4, rows) + kept * size,
        outputs=int(counts.sum()) * (width_s + grid[1]) * size,
    )


# --- hidden alignment --------------------------------------------------------------------------------------------


def align(a: Arguments, batch: Batch, grid: Grid) -> Cost:
    projected = a["width"] * _size(a, "projected")
    token = _size(a, "tokens") + _size(a, "weights") + projected + a["width"] * _size(a, "teacher")
    written = _size(a, "distances")
    if a["WITH_GRADIENT"]:
        written += projected + (_size(a, "scales") if a["UNIT"] else 0)
    return Cost(inputs=grid[0] * token, outputs=grid[0] * written)


# --- linear divergence -------------------------------------------------------------------------------------------


def diverge(a: Arguments, batch: Batch | None, grid: Grid) -> Cost:
    """Three passes over both rows of logits (with cross-entropy, over the student's: two and a label)."""
    rows, width, size = grid[0], a["width"], _size(a, "student")
    gradient = a["WITH_GRADIENT"]
    row = _size(a, "values") + (width * _size(a, "out") if gradient else 0)
    of_rows = 0 if a["UNIT"] else _size(a, "factors")
    biases = sum(width * a[name].element_size() for name in ("student_bias", "teacher_bias") if a[name] is not None)
    if a["teacher"] is None:
        of_rows += _size(a, "labels")
        first, further = width * size, (width if gradient else 0) * size + size
    else:
        of_rows += _size(a, "alphas")
        first = width * (size + _size(a, "teacher"))
        further = (2 if gradient else 1) * first
    return Cost(inputs=rows * (first + of_rows) + biases, outputs=rows * row, scratch=rows * further)


_KERNELS = (
    token_scale, strips, statistics, merge_statistics, sums, merge_sums,
    span_weights, pool, pool_gradient,
    unit_parts, pair_errors, pair_gradients, row_totals, gram_products, gram_gradient,
    align,
    diverge,
)  # fmt: skip
COSTS: dict[str, Callable[[Arguments, Any, Grid], Cost]] = {kernel.__name__: kernel for kernel in _KERNELS}
