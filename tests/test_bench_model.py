"""The modelled costs are those of the kernels as the interpreter runs them, and the committed report is up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import make_batch, random_rows
from torch import Tensor

from mta_fast import MTAConfig, MTALoss, linear_divergence_loss, token_importance

pytest.importorskip("triton")
pytest.importorskip("typer")

from triton.runtime.interpreter import InterpreterBuilder

from bench.gpu_model.costs import COSTS, SCRATCH, Batch, Cost, cost
from bench.gpu_model.recorder import Recorder
from mta_fast.kernels._launch import INTERPRETED, Launch, observe

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")


@dataclass
class Counts:
    """What one launch did: operations of its products, and each access to memory as (address, program)."""

    launch: Launch
    flops: int = 0
    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)

    def cost(self) -> Cost:
        """The same figures as the model's: distinct bytes, but every access where a kernel writes and reads again."""
        total = Counter[str]()
        tensors = {name: a for name, a in self.launch.arguments.items() if isinstance(a, Tensor)}
        found = sum(len(self._within(tensor, [*self.loads, *self.stores])) for tensor in tensors.values())
        assert found == sum(map(len, [*self.loads, *self.stores]))  # none lies outside of the arguments
        for name, tensor in tensors.items():
            size = tensor.element_size()
            loaded, stored = (self._within(tensor, made) for made in (self.loads, self.stores))
            distinct = len(np.unique(stored[:, 0]))
            total["outputs"] += size * distinct
            if name in SCRATCH.get(self.launch.name, ()):
                fresh = len(np.setdiff1d(loaded[:, 0], stored[:, 0]))
                total["inputs"] += size * fresh
                total["scratch"] += size * (len(loaded) + len(stored) - distinct - fresh)
                continue
            tokens = len(np.unique(loaded[:, 0]))
            total["inputs"] += size * tokens
            if self.launch.name in ("pool", "pool_gradient", "align"):
                total["shared"] += size * (len(np.unique(loaded, axis=0)) - tokens)
        return Cost(flops=self.flops, **total)

    def _within(self, tensor: Tensor, made: list[np.ndarray]) -> np.ndarray:
        accesses = np.concatenate([np.empty((0, 2), np.uint64), *made])
        first = tensor.data_ptr()
        last = first + tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        return accesses[(accesses[:, 0] >= first) & (accesses[:, 0] < last)]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counts]]:
    """Count what the interpreter does, launch by launch."""
    made: list[Counts] = []
    dot, load, store = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("dot", "masked_load", "masked_store")
    )

    def accesses(builder: Any, pointers: Any, mask: Any) -> np.ndarray:
        address = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].reshape(-1)
        x, y, _ = builder.grid_idx
        return np.stack([address, np.full_like(address, x * 2**20 + y)], 1)

    def counting_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        made[-1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        made[-1].loads.append(accesses(self, pointers, mask))
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        made[-1].stores.append(accesses(self, pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch, observe(lambda launch: made.append(Counts(launch))):
        patch.setattr(InterpreterBuilder, "create_dot", counting_dot)
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield made


# Rows of the costs: two tiles and a part of one, with more spans than a tile; a strip and a part of one; overlapping
# spans; one token; no tokens; no spans. Widths are no multiple of any block.
ROWS = [
    (300, [(j, j + 2) for j in range(0, 299, 2)]),
    (70, [(j, j + 1) for j in range(70)]),
    (33, [(4, 9), (0, 33), (4, 9), (20, 21), (8, 21)]),
    (1, [(0, 1)]),
    (0, []),
    (5, []),
]
WIDTHS = 24, 72


def _run_loss(rows: list[Any], dtype: torch.dtype, method: str, with_gradient: bool) -> Batch:
    batch = make_batch("packed", rows)
    student, teacher = ({0: batch.lay(random_rows(batch.lengths, d, dtype=dtype))} for d in WIDTHS)
    config = MTAConfig(layer_pairs=((0, 0),), dsa_method=method, backend="triton")
    loss = MTALoss(config, *WIDTHS).to(dtype).requires_grad_(with_gradient)
    student[0].requires_grad_(with_gradient)
    out = loss(student, teacher, {"phrase": batch.spans}).loss
    if with_gradient:
        out.backward()
    return Batch.of(batch.spans)


LONG = {"statistics", "merge_statistics", "sums"}
GRAM = {"gram_products", "gram_gradient"}
PAIRWISE = {"unit_parts", "pair_errors", "pair_gradients"}


@interpreted
@pytest.mark.parametrize(
    ("rows", "dtype", "method", "with_gradient", "absent"),
    [
        (ROWS, torch.float32, "pairwise", True, GRAM),
        (ROWS, torch.bfloat16, "gram", True, PAIRWISE),
        (ROWS[1:], torch.float32, "pairwise", False, GRAM | LONG | {"pool_gradient", "pair_gradients"}),
    ],
)
def test_costs_are_those_of_the_interpreted_kernels(
    rows: list[Any],
    dtype: torch.dtype,
    method: str,
    with_gradient: bool,
    absent: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with counted(monkeypatch) as launches:
        batch = _run_loss(rows, dtype, method, with_gradient)
    _compare(launches, batch)
    assert {made.launch.name for made in launches} == set(COSTS) - absent - {"diverge"}


@interpreted
def test_costs_of_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mta_fast.kernels.pairwise"], "SCRATCH_BYTES", 1)
    with counted(monkeypatch) as launches:
        batch = _run_loss(ROWS[:2], torch.float32, "pairwise", True)
    _compare(launches, batch)
    assert sum(made.launch.name == "pair_errors" for made in launches) == 5  # tiles of 64 spans: 3 and 2


@interpreted
@pytest.mark.parametrize("kind", ["srkl", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_costs_of_base_losses(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [torch.randn(size, 24, dtype=dtype) for size in (5, 1030, 5, 1030)]  # a block of ids and a part of one
    options = {"divergence": kind, "labels": torch.arange(5), "student_bias": torch.randn(1030, dtype=dtype)}
    with counted(monkeypatch) as launches:
        for learns in (True, False):
            sides[0].requires_grad_(learns)
            linear_divergence_loss(*sides, **options, backend="triton")
    assert len(launches) == 2
    _compare(launches, None)


def _compare(launches: list[Counts], batch: Batch | None) -> None:
    modelled = [(made.launch.name, cost(made.launch, batch)) for made in launches]
    assert modelled == [(made.launch.name, made.cost()) for made in launches]


@pytest.mark.slow
@interpreted
def test_costs_of_large_super_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch("packed", [(2100, [])])  # 256 tokens on a side: two tiles
    with counted(monkeypatch) as launches:
        hidden = torch.randn(2100, 8, dtype=torch.bfloat16)
        token_importance(hidden, rows=batch.spans.rows, backend="triton")
    _compare(launches, Batch.of(batch.spans))


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.unique, bool])
def test_a_read_on_the_host_ends_the_dry_run(read: Callable[[Tensor], Any]) -> None:
    with Recorder({}):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(torch.empty(1, device="meta"))


def test_torch_launches() -> None:
    recorder = Recorder({})
    rows, columns, index = (torch.empty(*size, device="meta") for size in ((6, 4), (4, 5), (2,)))
    with recorder:
        made = rows @ columns
        made.T[:3].detach()  # views launch nothing
        made.new_zeros(7).index_copy_(0, index.long(), index)
    assert [(work.name, work.cost.flops, work.cost.bytes) for work in recorder.works] == [
        ("GEMM", 2 * 6 * 4 * 5, 4 * (6 * 4 + 4 * 5 + 6 * 5)),
        ("torch", 0, 4 * 7),
        ("torch", 0, 4 * 2 + 8 * 2),
        ("torch", 0, 8 * 2 + 2 * 4 * 2),
    ]
    assert [shape for _, shape, _ in recorder.allocations] == [(6, 5), (7,), (2,)]


def test_the_committed_report_is_what_the_command_computes(tmp_path: Path) -> None:
    committed = json.loads((RESULTS / "model.json").read_text())
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mta_fast", "bench", "model", "--json", str(tmp_path / "model.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0 if all(row["reached"] for row in committed["rows"]) else 1)
    made = json.loads((tmp_path / "model.json").read_text())
    if made["about"] != committed["about"]:  # other versions of torch may launch something else
        pytest.skip(f"committed for {committed['about']}, here {made['about']}")
    assert made == committed
    assert (tmp_path / "model.md").read_text() == (RESULTS / "model.md").read_text()


def test_hidden_alignment_and_importance_multiply_what_the_formulas_say() -> None:
    for made in json.loads((RESULTS / "model.json").read_text())["shapes"]:
        shape = SimpleNamespace(**made["shape"])
        flops = {row["kernel"]: row["flops"] for row in made["kernels"]}
        covered = [shape.seq_len * 4 // 5] + [shape.seq_len * 4 // 5 // 2 * 2] * (shape.pairs - 1)
        projected = 6 * shape.batch * sum(covered) * shape.student_dim * shape.teacher_dim
        assert flops["GEMM"] == pytest.approx(projected, rel=1e-3)  # beside the means of the Gram form
        tiles = -(-shape.seq_len // 128)
        square = 2 * shape.batch * shape.seq_len**2 * shape.teacher_dim * shape.pairs
        expected = square if shape.seq_len <= 256 else square * (tiles + 1) / tiles
        assert sum(flops.get(name, 0) for name in ("strips", "statistics", "sums")) == expected
