"""The kernels touch nothing beside their tensors: guard pages, poisoned outputs, offsets beyond 2^31."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import make_batch, random_rows
from guard import guarded
from torch import Tensor

from mta_fast import hidden_alignment_loss, pool_spans, span_pair_loss
from mta_fast.errors import InputError
from mta_fast.ops.pooling import normalize_weights
from mta_fast.spans.batch import Capacities

triton = pytest.importorskip("triton", reason="the triton backend needs the package triton")
tl = triton.language
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from mta_fast import kernels  # noqa: E402
from mta_fast.contract import DIVERGENCES  # noqa: E402
from mta_fast.kernels._launch import observe  # noqa: E402
from mta_fast.layout import Head, Spans  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("guard pages are for the interpreter: on a GPU use compute-sanitizer", allow_module_level=True)

# one pass and two, rows of padding, spans of one token and of many, beginning and ending with the tokens
ROWS = [(5, [(0, 2), (0, 5)]), (1, [(0, 1)]), (0, []), (270, [(0, 270), (3, 4), (269, 270)]), (33, [(30, 33)])]
WIDTHS = (19, 37)  # no multiple of anything


def _guarded_batch(
    rows: list[Any], end: bool, most: Capacities | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Spans]:
    """Both sides' states, rows and rows_host, and spans; from here on NaN wherever an output is not written."""
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1000).isnan().all()
    torch.manual_seed(0)
    batch = make_batch("packed", rows)
    made = batch.spans if most is None else batch.spans.with_capacities(most)
    student, teacher = (guarded(batch.lay(random_rows(batch.lengths, d, dtype=torch.float32)), end) for d in WIDTHS)
    index = made.index_tensors()
    spans = Spans(*(guarded(x, end) for x in index[:-1]), index.host)
    return student, teacher, guarded(made.rows.table, end), made.rows.host, spans


def run_with_capacities(end: bool) -> Iterator[Tensor]:
    """Kernels of a batch with capacities, which launches more programs than it needs."""
    most = Capacities(row_tokens=300, row_spans=150, spans=40, incidences=60)
    student, teacher, rows, host, spans = _guarded_batch([ROWS[0], ROWS[1], ROWS[4]], end, most)
    importance = kernels.token_importance(teacher, rows, host, 0, False, False)
    token, span, totals = kernels.span_weights(guarded(importance, end), spans)
    yield from (importance, token, span, totals)
    token = guarded(token, end)
    pooled = [kernels.pool_spans(states, token, spans, rows, host) for states in (student, teacher)]
    yield from (*pooled[0], *pooled[1])
    sides = [guarded(x, end) for x in (pooled[0][0], pooled[1][0], span, pooled[0][2], pooled[1][2])]
    *terms, gradient = kernels.span_pairs(*sides, spans.span_splits, spans.host, "auto", True)
    yield from (*terms, gradient[: int(spans.span_splits[-1])])


def run_all(end: bool) -> Iterator[Tensor]:
    """Every backend function on guarded inputs."""
    student, teacher, rows, host, spans = _guarded_batch(ROWS, end)
    for causal in (False, True):
        importance = kernels.token_importance(teacher, rows, host, 0, causal, False)
        yield importance
    token, span, totals = kernels.span_weights(guarded(importance.abs() + 0.1, end), spans)
    yield from (token, span, totals)
    token = guarded(token, end)
    pooled = [kernels.pool_spans(states, token, spans, rows, host) for states in (student, teacher)]
    yield from (*pooled[0], *pooled[1])
    yield kernels.pool_spans_gradient(guarded(pooled[0][0], end), guarded(span, end), token, spans, torch.float32)
    sides = [guarded(x, end) for x in (pooled[0][0], pooled[1][0], span, pooled[0][2], pooled[1][2])]
    for method in ("pairwise", "gram"):
        for with_gradient in (False, True):
            yield from kernels.span_pairs(*sides, spans.span_splits, spans.host, method, with_gradient)
    matrix, bias = guarded(torch.randn(WIDTHS[1], WIDTHS[0]), end), guarded(torch.randn(WIDTHS[1]), end)
    weights = guarded(token[spans.covered], end)
    value, gradient = kernels.hidden_alignment(
        student, teacher, spans.covered, weights, matrix, bias, torch.float32, True
    )
    assert gradient is not None
    yield from (value, *(x for x in gradient if x is not None))
    heads = [guarded(torch.randn(*shape), end) for shape in ((37, WIDTHS[0]), (37,), (41, WIDTHS[1]), (41,))]
    states = [guarded(x[:5], end) for x in (student, teacher)]
    row, labels = guarded(torch.full((5,), 0.1), end), guarded(torch.arange(5), end)
    for name in DIVERGENCES:
        read = name != "cross_entropy"
        others = (states[1], *heads[2:], None) if read else (None, None, None, labels)
        values, slopes = kernels.linear_divergence(
            states[0], *heads[:2], *others, row, row, name, 0.5, False, Head(softcap=3.0), Head(), 37,
            torch.float32, torch.float32, True,
        )  # fmt: skip
        assert slopes is not None
        yield from (values, *slopes)


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    """Python code run beside this file; a segmentation fault ends that process, not the tests."""
    here = Path(__file__).parent
    program = f"import conftest; conftest.pytest_configure(); {code}"
    return subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("run", "end"),
    [("run_all", True), ("run_all", False), ("run_with_capacities", True)],
    ids=["end", "start", "capacities"],
)
def test_nothing_is_read_outside_and_everything_is_written(run: str, end: bool) -> None:
    code = f"import test_kernels_memory as t; print(sum(int(x.isfinite().all()) - 1 for x in t.{run}({end})), 'done')"
    made = in_a_process(code)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout == "0 done\n"


@contextmanager
def single_stores() -> Iterator[set[str]]:
    """Refuse launches in which an address is stored to by two programs, or twice by one with no barrier between.

    Which value stays is then up to the order of threads. Yields the names of the kernels that were watched.
    """
    owners: dict[int, tuple[int, ...]] = {}  # address -> the program that stored there
    fresh: set[int] = set()  # addresses since the program's last barrier
    seen: set[str] = set()
    current: list[Any] = ["", None]  # kernel, program
    store, barrier = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_barrier

    def launched(launch: Any) -> None:
        owners.clear()
        current[:] = launch.name, None
        seen.add(launch.name)

    def storing(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        program = tuple(builder.grid_idx)
        if program != current[1]:
            current[1] = program
            fresh.clear()
        made = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].reshape(-1).tolist()
        assert len(set(made)) == len(made), f"{current[0]}: one store writes an address twice"
        assert fresh.isdisjoint(made), f"{current[0]}: two stores of a program write an address, no barrier between"
        assert all(owners.setdefault(address, program) == program for address in made), f"{current[0]}: two programs"
        fresh.update(made)
        return store(builder, pointers, value, mask, *rest)

    def waiting(builder: Any) -> Any:
        fresh.clear()
        return barrier(builder)

    InterpreterBuilder.create_masked_store, InterpreterBuilder.create_barrier = storing, waiting
    try:
        with observe(launched):
            yield seen
    finally:
        InterpreterBuilder.create_masked_store, InterpreterBuilder.create_barrier = store, barrier


STORES = """
import test_kernels_memory as t
from mta_fast.kernels._table import TABLE
with t.single_stores() as seen:
    for _ in t.run_all(True):
        pass
print({name for name, _ in TABLE} - seen)
"""


def test_no_address_is_stored_to_twice() -> None:
    made = in_a_process(STORES)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout == "set()\n"  # every kernel was watched


@pytest.mark.parametrize("name", ["twice", "both"])
def test_a_planted_race_is_seen(name: str) -> None:
    code = f"import test_kernels_memory as t\nwith t.single_stores():\n    t.planted_{name}[(2,)](t.torch.empty(64))"
    made = in_a_process(code)
    assert made.returncode == 1
    assert {"twice": "no barrier between", "both": "two programs"}[name] in made.stderr


@triton.jit
def planted_twice(out):
    p = out + tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(p, 1.0)
    tl.store(p, 2.0)


@triton.jit
def planted_both(out):
    tl.store(out + tl.arange(0, 32), tl.program_id(0) * 1.0)


PLANTED = """
import os, torch, triton, triton.language as tl, test_kernels_memory as t
from mta_fast.kernels import _rows, token_importance
inside = _rows.row_geometry
def beyond(*args):  # one token more than the row has
    first, queries, first_key, end_key = inside(*args)
    return first, queries + {more}, first_key, end_key
_rows.row_geometry = beyond
hidden = t.guarded(torch.randn(40, 1024), True)
rows = torch.tensor([[0, 40]], dtype=torch.int32)
token_importance(hidden, rows, rows, 0, False, False)
print("survived")
"""


@pytest.mark.parametrize("more", [0, 1])
def test_a_planted_error_kills_the_process(more: int) -> None:
    made = in_a_process(PLANTED.format(more=more))
    assert made.returncode == (-signal.SIGSEGV if more else 0), made.stderr[-2000:]
    assert ("survived" in made.stdout) == (not more)


def test_offsets_beyond_two_to_the_31() -> None:
    # 40 tokens, 2^26 elements apart, in memory that is only reserved; row 32 and later lie beyond 2^31
    tokens, width, stride = 40, 16, 2**26
    memory = mmap.mmap(-1, 4 * (stride * (tokens - 1) + width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    wide = torch.frombuffer(memory, dtype=torch.float32).as_strided((tokens, width), (stride, 1))
    dense = torch.randn(tokens, width)
    wide.copy_(dense)
    batch = make_batch("packed", [(tokens, [(0, 3), (33, 40), (39, 40)])])
    rows, spans = batch.spans.rows, batch.spans.index_tensors()
    importance = [kernels.token_importance(x, rows.table, rows.host, 0, False, False) for x in (wide, dense)]
    assert torch.equal(*importance)
    token, span, _ = kernels.span_weights(importance[0], spans)
    pooled = [kernels.pool_spans(x, token, spans, rows.table, rows.host) for x in (wide, dense)]
    assert all(torch.equal(*pair) for pair in zip(*pooled, strict=True))
    pooled_wide = wide[37:].copy_(pooled[1][0])
    norm = pooled[1][2]
    pairs = [
        kernels.span_pairs(x, x, span, norm, norm, spans.span_splits, spans.host, method, True)
        for method in ("pairwise", "gram")
        for x in (pooled_wide, pooled[1][0])
    ]
    for i in (0, 2):
        assert all(torch.equal(*pair) for pair in zip(*pairs[i : i + 2], strict=True))
    wide.copy_(dense)
    matrix = torch.randn(width, width)
    aligned = [
        kernels.hidden_alignment(dense, x, spans.covered, token[spans.covered], matrix, None, torch.float32, True)
        for x in (wide, dense)
    ]
    assert torch.equal(aligned[0][0], aligned[1][0])


def test_vectors_of_any_stride() -> None:
    batch = make_batch("packed", [(40, [(0, 3), (33, 40), (2, 9)])])
    spans, hidden = batch.spans, torch.randn(40, 16)
    for values in (torch.rand(40, 2)[:, 0], torch.ones(()).expand(40)):
        made, expected = (normalize_weights(values, spans, backend=b) for b in ("triton", "reference"))
        assert all(map(torch.allclose, made, expected))
        pooled, want = (pool_spans(hidden, values, spans, backend=b) for b in ("triton", "reference"))
        assert all(map(torch.allclose, pooled, want))
        salience = torch.rand(3, 2)[:, 1]
        terms = [span_pair_loss(pooled[0], pooled[0] + 1, salience, spans, backend=b) for b in ("triton", "reference")]
        torch.testing.assert_close(*terms)
        aligned = [
            hidden_alignment_loss(hidden, hidden, values, torch.randn(16, 16).fill_(0.1), spans=spans, backend=b)
            for b in ("triton", "reference")
        ]
        torch.testing.assert_close(*aligned)


def test_features_too_far_apart_are_refused() -> None:
    memory = mmap.mmap(-1, 4 * (2**27 * 16 + 40), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    wide = torch.frombuffer(memory, dtype=torch.float32).as_strided((40, 17), (1, 2**27))
    rows = torch.tensor([[0, 40]], dtype=torch.int32)
    with pytest.raises(InputError, match=r"hidden: expected fewer than 2\^31 elements.*got a stride of 134217728"):
        kernels.token_importance(wide, rows, rows, 0, False, False)


def test_strided_inputs() -> None:
    # a slice of a wider tensor, a transposed one, every other token
    batch = make_batch("packed", [(40, [(0, 3), (33, 40)])])
    rows, spans = batch.spans.rows, batch.spans.index_tensors()
    base = torch.randn(40, 16)
    views = [torch.randn(40, 20)[:, 2:18], torch.randn(16, 40).T, torch.randn(80, 16)[::2]]
    for view in views:
        view.copy_(base)
        for x in (view, base):
            assert x.stride() != (16, 1) or x is base
        importance = [kernels.token_importance(x, rows.table, rows.host, 0, False, False) for x in (view, base)]
        assert torch.equal(*importance)
        token, span, _ = kernels.span_weights(importance[0], spans)
        pooled = [kernels.pool_spans(x, token, spans, rows.table, rows.host)[0] for x in (view, base)]
        assert torch.equal(*pooled)
        grads = [kernels.pool_spans_gradient(x[:2], span, token, spans, torch.float32) for x in (view, base)]
        assert torch.equal(*grads)
        norm = base[:2].norm(dim=1)
        for method in ("pairwise", "gram"):
            pairs = [
                kernels.span_pairs(x[:2], x[:2], span, norm, norm, spans.span_splits, spans.host, method, True)
                for x in (view, base)
            ]
            torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)  # torch's own products depend on strides
