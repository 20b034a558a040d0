"""Single ops under pytest-benchmark: ``pytest bench/test_ops.py -k "importance and 16x256"``.

Every side's result is checked against the reference before it is timed. ``--benchmark-compare`` and its like work as
ever; for ratios use ``mta-fast bench ops``, which times the sides in turn (here one follows the other, and a noisy
machine may have changed in between).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from bench.compiled import NAME as COMPILED
from bench.compiled import compiled_reference
from bench.harness import Tensors, check_parity
from bench.ops.cases import SHAPES, Op, Shape
from bench.ops.run import OPS
from bench.workload import REFERENCE, cpu_backends

CASES = [
    pytest.param(
        op, shape, mode, side, id="-".join((op.name, mode, f"{shape.batch}x{shape.seq_len}", side)).replace(" ", "")
    )
    for op in OPS
    for shape in SHAPES
    for mode in op.modes
    for side in dict.fromkeys((*cpu_backends(), REFERENCE, COMPILED, *op.peers))
]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    with compiled_reference():
        yield


@lru_cache(maxsize=1)
def _inputs(op: Op, shape: Shape) -> Any:
    return op.make(shape)


@lru_cache(maxsize=1)
def _expected(op: Op, shape: Shape, mode: str) -> Tensors:
    return op.side(_inputs(op, shape), REFERENCE, mode)()


@pytest.mark.parametrize(("op", "shape", "mode", "side"), CASES)
def test_op(benchmark: Any, op: Op, shape: Shape, mode: str, side: str) -> None:
    call = op.side(_inputs(op, shape), side, mode)
    check_parity(f"{op.name}, {mode}, {shape.name}: {side}", call(), _expected(op, shape, mode))
    work = op.work(_inputs(op, shape), mode)
    benchmark.group = f"{op.name}, {mode}, {shape.name}"
    benchmark.extra_info.update(gflop=work.flops / 1e9, megabytes=work.bytes / 1e6)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
