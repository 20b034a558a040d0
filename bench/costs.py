"""What launches cost: operations of their products and bytes of device memory; what data sheets allow.

One function for each Triton kernel, in ``COSTS``. It counts from the launch's arguments and the lengths of the batch's
rows and spans, and holds for the program as it is written: ``tests/test_bench_model.py`` compares every one with the
products, loads and stores of the interpreted kernel, byte by byte.

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
# What a kernel writes and reads again: every access counts, as it may be more than a cache holds
SCRATCH = {
    "statistics": ("partial_max", "partial_sums"),
    "sums": ("partial_sums",),
    "pairs": ("gradient",),
    "span_weights": ("token_weight",),
}


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one launch.

    Attributes:
        flops: of the products.
        inputs: distinct bytes that are read; a second read, by this program or another one, comes from a cache.
        outputs: distinct bytes that are written.
        scratch: bytes of every further access to what the kernel itself writes (``SCRATCH``).
        shared: of ``inputs``, what further programs read again; counted for pool, pool_gradient and align only.
    """

    flops: int = 0
    inputs: int = 0
    outputs: int = 0
    scratch: int = 0
    shared: int = 0

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
    counts: np.ndarray  # [B] spans of each row
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
        return cls(
            lengths=spans.rows.host[:, 1].numpy().astype(np.int64),
            counts=spans.host[:, 0].diff().numpy().astype(np.int64),
            range_tokens=int((ends - starts).sum()),
            distinct_tokens=int((inside.cumsum() > 0).sum()),
            covered=spans.covered.shape[0],
            incidences=spans.cover_spans.shape[0],
            covering_spans=len(np.unique(spans.cover_spans.numpy())),
        )


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


def cost(launch: Launch, batch: Batch) -> Cost:
    """What a launch costs; ``batch`` is the one that it works on."""
    return COSTS[launch.name](launch.arguments, batch, launch.grid)


def precision(launch: Launch) -> str:
    """What its products are multiplied in: "bfloat16" for both half precisions, "tf32x3", "tf32" or "ieee"."""
    states = launch.arguments.get("hidden", launch.arguments.get("student"))
    return "bfloat16" if is_half(states) else launch.arguments.get("PRECISION", "ieee")


def is_half(tensor: Tensor | None) -> bool:
    """Whether it holds bfloat16 or float16."""
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


Arguments = dict[str, Any]


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


def _short(batch: Batch) -> np.ndarray:
    return batch.lengths[(batch.lengths > 0) & (batch.lengths <= SHORT_ROW.value)]


def _long(batch: Batch) -> np.ndarray:
    return batch.lengths[batch.lengths > SHORT_ROW.value]


def _row_table(batch: Batch, rows: np.ndarray) -> int:
    """Every program looks its row up by the lengths of all, and reads the start of its own."""
    return INDEX * (len(batch.lengths) + len(rows))


def _strip_partials(batch: Batch, strip: int) -> int:
    return int((_short(batch) * -(-_short(batch) // strip)).sum())


def _super_partials(batch: Batch) -> int:
    return int((_long(batch) * -(-_long(batch) // super_sides(_long(batch)))).sum())


def _token_scale(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    tokens = int(batch.lengths.sum())
    states = tokens * a["width"] * _size(a, "hidden")
    rows = _row_table(batch, batch.lengths[batch.lengths > 0])
    return Cost(inputs=states + rows, outputs=tokens * _size(a, "scales"))


def _strips(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    tokens, size = int(_short(batch).sum()), _size(a, "scales")
    states = tokens * a["width"] * _size(a, "hidden")
    return Cost(
        flops=grid[0] * 2 * a["STRIP"] * SHORT_ROW.value * _padded(a["width"], a["BLOCK_D"]),
        inputs=states + tokens * size + _row_table(batch, _short(batch)),
        outputs=_strip_partials(batch, a["STRIP"]) * size,
    )


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


def _triangle_flops(a: Arguments, batch: Batch) -> int:
    tiles = -(-_long(batch) // a["TILE"])
    return int((tiles * (tiles + 1) // 2).sum()) * 2 * a["TILE"] ** 2 * _padded(a["width"], a["BLOCK_D"])


def _statistics(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    tokens, size = int(_long(batch).sum()), _size(a, "scales")
    states = tokens * a["width"] * _size(a, "hidden")
    accesses = sum(_partial_accesses(int(length), a["TILE"])[0] for length in _long(batch))
    outputs = 2 * _super_partials(batch) * size
    return Cost(
        flops=_triangle_flops(a, batch),
        inputs=states + tokens * size + _row_table(batch, _long(batch)),
        outputs=outputs,
        scratch=2 * accesses * size - outputs,
    )


def _merge_statistics(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    size = _size(a, "peaks")
    return Cost(
        inputs=2 * _super_partials(batch) * size + _row_table(batch, batch.lengths[batch.lengths > 0]),
        outputs=2 * int(batch.lengths.sum()) * size,
    )


def _sums(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    tokens, size = int(_long(batch).sum()), _size(a, "scales")
    states = tokens * a["width"] * _size(a, "hidden")
    accesses = sum(_partial_accesses(int(length), a["TILE"])[1] for length in _long(batch))
    outputs = _super_partials(batch) * size
    return Cost(
        flops=_triangle_flops(a, batch),
        inputs=states + 3 * tokens * size + _row_table(batch, _long(batch)),
        outputs=outputs,
        scratch=accesses * size - outputs,
    )


def _merge_sums(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    size = _size(a, "importance")
    partials = _strip_partials(batch, a["STRIP"]) + _super_partials(batch)
    rows = _row_table(batch, batch.lengths[batch.lengths > 0])
    return Cost(inputs=partials * size + rows, outputs=int(batch.lengths.sum()) * size)


# --- pooling -----------------------------------------------------------------------------------------------------


def _span_weights(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    rows, spans, size = len(batch.counts), int(batch.counts.sum()), _size(a, "token_weight")
    covers = 2 * batch.covered + 1 if batch.covered else 0  # covered, cover_splits
    return Cost(
        inputs=INDEX * (2 * (rows + 1) + covers + 2 * spans) + batch.covered * _size(a, "values"),
        outputs=(rows + batch.covered + spans) * size,
        scratch=batch.range_tokens * size,
    )


def _pool(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    spans, size = int(batch.counts.sum()), _size(a, "pooled")
    token = a["width"] * _size(a, "hidden") + _size(a, "weights")
    return Cost(
        inputs=2 * INDEX * spans + batch.distinct_tokens * token,
        outputs=spans * ((a["width"] + 1) * size + _size(a, "span_weight")),
        shared=(batch.range_tokens - batch.distinct_tokens) * token,
    )


def _pool_gradient(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    tokens = grid[0]
    span = a["width"] * _size(a, "grad") + _size(a, "span_weight")
    index = INDEX * (tokens + 1 + batch.incidences)
    return Cost(
        inputs=index + batch.covered * _size(a, "weights") + batch.covering_spans * span,
        outputs=tokens * a["width"] * _size(a, "gradient"),
        shared=(batch.incidences - batch.covering_spans) * span + INDEX * (tokens - 1),
    )


# --- span pairs --------------------------------------------------------------------------------------------------


def _pairs(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    counts = batch.counts[batch.counts < a["gram_from"]]
    spans, tiles = int(counts.sum()), -(-counts // a["TILE"])
    width_s, width_t, size = a["student_width"], a["teacher_width"], _size(a, "student_norm")
    depth = _padded(width_s, a["BLOCK_D"]) + _padded(width_t, a["BLOCK_D"])
    visited, gradient, scratch = (tiles * (tiles + 1) // 2), 0, 0
    if a["WITH_GRADIENT"]:
        visited, depth = tiles**2, depth + _padded(width_s, a["BLOCK_G"])
        gradient = spans * width_s * size
        scratch = 2 * int((counts * tiles).sum()) * width_s * size  # a load and a store for each tile but the first
    states = width_s * _size(a, "student") + width_t * _size(a, "teacher")
    return Cost(
        flops=int(visited.sum()) * 2 * a["TILE"] ** 2 * depth,
        inputs=INDEX * (len(batch.counts) + 1) + spans * (states + 3 * size),
        outputs=spans * DOUBLE + gradient,
        scratch=scratch,
    )


def _row_totals(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    rows, spans, size = len(batch.counts), int(batch.counts.sum()), _size(a, "weights")
    gram_terms = int((batch.counts >= a["gram_from"]).sum()) * a["num_tiles"]
    return Cost(
        inputs=INDEX * (rows + 1) + spans * (DOUBLE + size) + gram_terms * DOUBLE,
        outputs=2 * rows * _size(a, "numerators"),
    )


def _gram_rows(a: Arguments, batch: Batch) -> np.ndarray:
    return batch.counts[batch.counts >= a["gram_from"]]


def _gram_inputs(a: Arguments, batch: Batch, per_span: int, means: int) -> int:
    """Row table, both sides' spans, the means of some rows, and ``per_span`` further numbers a span."""
    spans, width = int(_gram_rows(a, batch).sum()), a["student_width"] + a["teacher_width"]
    return INDEX * (len(batch.counts) + 1) + _size(a, "student") * (spans * (width + per_span) + means * width)


def _gram_products(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    counts, size = _gram_rows(a, batch), _size(a, "gram_xx")
    matrices = a["student_width"] * (a["student_width"] + a["teacher_width"])
    depth = int((-(-counts // a["BLOCK_U"]) * a["BLOCK_U"]).sum())
    terms = int(counts.sum()) * (DOUBLE + 2 * size)  # of the programs that follow the tiles
    return Cost(
        flops=a["num_tiles"] * 2 * a["TILE"] ** 2 * depth,
        inputs=_gram_inputs(a, batch, 3, len(counts)) + len(counts) * DOUBLE,
        outputs=len(counts) * (matrices * size + a["num_tiles"] * DOUBLE) + terms,
    )


def _gram_gradient(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
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


def _align(a: Arguments, batch: Batch, grid: tuple[int, ...]) -> Cost:
    projected = a["width"] * _size(a, "projected")
    token = _size(a, "tokens") + _size(a, "weights") + projected + a["width"] * _size(a, "teacher")
    written = _size(a, "distances")
    if a["WITH_GRADIENT"]:
        written += projected + (_size(a, "scales") if a["UNIT"] else 0)
    return Cost(inputs=grid[0] * token, outputs=grid[0] * written)


COSTS: dict[str, Callable[[Arguments, Batch, tuple[int, ...]], Cost]] = {
    "token_scale": _token_scale,
    "strips": _strips,
    "statistics": _statistics,
    "merge_statistics": _merge_statistics,
    "sums": _sums,
    "merge_sums": _merge_sums,
    "span_weights": _span_weights,
    "pool": _pool,
    "pool_gradient": _pool_gradient,
    "pairs": _pairs,
    "row_totals": _row_totals,
    "gram_products": _gram_products,
    "gram_gradient": _gram_gradient,
    "align": _align,
}
