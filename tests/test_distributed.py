"""Two processes with summed denominators give the gradient of one big batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import make_batch

from mta_fast import MTAConfig, MTALoss

WORLD = 2
ROWS = [(6, [(0, 2), (2, 6)]), (3, [(0, 1), (1, 3), (0, 3)]), (5, []), (9, [(1, 4), (3, 9)])]
PAIRS, KINDS, STUDENT_DIM, TEACHER_DIM = ((1, 2), (3, 4)), ("word", "phrase"), 5, 7


def _inputs(rows: slice) -> tuple[dict[int, Any], dict[int, Any], dict[str, Any]]:
    """The chosen rows of the big batch."""
    generator = torch.Generator().manual_seed(3)
    states = {
        (layer, dim): [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n, _ in ROWS]
        for layer, dim in ((1, STUDENT_DIM), (3, STUDENT_DIM), (2, TEACHER_DIM), (4, TEACHER_DIM))
    }
    part = make_batch("packed", ROWS[rows])
    made = {layer: part.lay(values[rows]) for (layer, _), values in states.items()}
    return {s: made[s] for s, _ in PAIRS}, {t: made[t] for _, t in PAIRS}, dict.fromkeys(("word", "phrase"), part.spans)


def _loss(normalization: Any) -> MTALoss:
    torch.manual_seed(5)
    return MTALoss(MTAConfig(PAIRS, KINDS, normalization=normalization), STUDENT_DIM, TEACHER_DIM).double()


def _rank(rank: int, rendezvous: str, normalization: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    student, teacher, spans = _inputs(slice(2 * rank, 2 * rank + 2))
    loss = _loss(normalization)
    denominators = loss.denominators(teacher, spans)
    dist.all_reduce(denominators)
    parallel = torch.nn.parallel.DistributedDataParallel(loss)
    output = parallel(student, teacher, spans, denominators=denominators)
    (WORLD * output.loss).backward()  # DDP averages over the ranks
    total = output.loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        torch.save((total, [p.grad for p in loss.parameters()]), out)
    dist.destroy_process_group()


@pytest.mark.parametrize("normalization", ["batch", "sample"])
def test_two_processes_equal_one(tmp_path: Path, normalization: str) -> None:
    out = tmp_path / "rank0.pt"
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), normalization, str(out)), nprocs=WORLD)
    total, gradients = torch.load(out)
    loss = _loss(normalization)
    expected = loss(*_inputs(slice(None))).loss
    expected.backward()
    torch.testing.assert_close(total, expected.detach())
    for got, parameter in zip(gradients, loss.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)
