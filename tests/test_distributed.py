"""Two processes give what one gives: the loss by hand, and the Trainer under DDP and FSDP2."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import make_batch
from distributed_worker import start
from processes import LIMIT
from safetensors.torch import load_file
from training import make_rows

from mta_fast import MTAConfig, MTALoss
from mta_fast.distill import manifest
from mta_fast.distill.teacher.store import TeacherStore
from mta_fast.errors import InputError

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(  # what each rank would take seconds to import
    ["mta_fast.distill.training.trainer", "transformers.models.llama.modeling_llama", "datasets", "spacy"]
)
WORLD = 2
WORKER = Path(__file__).with_name("distributed_worker.py")
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
    del parallel  # its threads end before their process group
    dist.barrier()  # nobody leaves while the other still talks
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


# --- the Trainer -------------------------------------------------------------------------------------------------


def _run(out: Path, mode: str, processes: int, *arguments: str) -> list[dict[str, Any]]:
    """What each rank saw, in processes forked from one that has imported everything."""
    out.mkdir(parents=True, exist_ok=True)
    rendezvous, logs = out / f"rendezvous-{uuid.uuid4().hex}", [out / f"rank-{rank}.log" for rank in range(processes)]
    given = (mode, str(out), *arguments)
    ranks = [
        FORKS.Process(target=start, args=(rank, processes, str(rendezvous), str(log), given, make_rows()))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank, log in zip(ranks, logs, strict=True):
            rank.join(LIMIT)
            assert rank.exitcode == 0, log.read_text(errors="replace")[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return _seen(out, processes)


def _run_by_torchrun(out: Path, mode: str, processes: int) -> list[dict[str, Any]]:
    """The same, as users start it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(WORKER), mode, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return _seen(out, processes)


def _seen(out: Path, processes: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def _history(checkpoint: Path) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return history


def _assert_same_run(one: Path, two: Path) -> None:
    for a, b in zip(_history(one / "checkpoint-4"), _history(two / "checkpoint-4"), strict=True):
        for name in ("loss", "base", "dsa", "hid", "grad_norm", "eval_loss", "eval_base", "eval_dsa", "eval_hid"):
            assert (name in a) == (name in b)
            assert b.get(name, 0) == pytest.approx(a.get(name, 0), rel=1e-4), (name, a["step"])
    for file in ("student/model.safetensors", "checkpoint-4/mta/projections.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process."""
    out = tmp_path_factory.mktemp("single")
    _run(out, "ddp", 1)
    return out


@pytest.mark.parametrize(("mode", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPDistillationModel")])
def test_two_trainers_equal_one(tmp_path: Path, single: Path, mode: str, wrapper: str) -> None:
    told = (_run_by_torchrun if mode == "ddp" else _run)(tmp_path / "two", mode, WORLD)
    assert [(rank["wrapper"], rank["fused_head"]) for rank in told] == [(wrapper, True)] * WORLD
    _assert_same_run(single, tmp_path / "two")
    # what both leave is a plain student, and either can go on from the middle
    _run(tmp_path / "on", mode, WORLD, "srkl", str(tmp_path / "two/checkpoint-2"))
    _assert_same_run(single, tmp_path / "on")


@pytest.mark.parametrize("method", ["fdd", "distillm2"])
def test_base_methods_on_two_ranks_equal_one(tmp_path: Path, method: str) -> None:
    _run(tmp_path / "one", "ddp", 1, method)
    _run(tmp_path / "two", "ddp", WORLD, method)
    _assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_stream_on_two_ranks_equals_one(tmp_path: Path) -> None:
    """Parts, rows and evaluation rows that two ranks can't share evenly: none is lost, none counts twice."""
    _run(tmp_path / "one", "ddp", 1, "stream")
    _run(tmp_path / "two", "ddp", WORLD, "stream")
    _assert_same_run(tmp_path / "one", tmp_path / "two")
    _run(tmp_path / "on", "ddp", WORLD, "stream", str(tmp_path / "two/checkpoint-2"))
    _assert_same_run(tmp_path / "one", tmp_path / "on")


def test_projections_fitted_on_two_ranks_equal_those_of_one(tmp_path: Path) -> None:
    """Seven rows: one rank has a row more than the other in its last batch."""
    _run(tmp_path / "one", "ddp", 1, "ridge")
    _run(tmp_path / "two", "ddp", WORLD, "ridge")
    _assert_same_run(tmp_path / "one", tmp_path / "two")


def test_two_ranks_write_their_own_responses_and_go_on(tmp_path: Path) -> None:
    _run(tmp_path / "two", "ddp", WORLD, "distillm")
    history = _history(tmp_path / "two" / "checkpoint-4")
    assert next(entry["student_share"] for entry in history if "student_share" in entry) == 1.0
    buffers = [
        json.loads((tmp_path / "two" / "checkpoint-2" / f"progress_{rank}.json").read_text())["base"]["replay"]
        for rank in range(WORLD)
    ]
    assert {row["prompt"] for row in buffers[0]}.isdisjoint(row["prompt"] for row in buffers[1])
    _run(tmp_path / "two", "ddp", WORLD, "distillm", str(tmp_path / "two" / "checkpoint-2"))


def test_one_clock_ends_both_ranks(tmp_path: Path) -> None:
    """Ranks that stopped by clocks of their own would wait for each other for ever, with other learning rates."""
    first, second = _run(tmp_path, "ddp", WORLD, "clock")
    assert first == second


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    _run(tmp_path, "ddp", WORLD, "stop")
    (last,) = (path for path in tmp_path.glob("checkpoint-*") if path.name != "checkpoint-2")
    assert last.name == "checkpoint-3"  # of neither a save step nor the last one
    assert manifest.verify(last)
    names = {path.name for path in last.iterdir()}
    assert {
        f"{kind}_{rank}.{end}" for kind, end in (("rng_state", "pth"), ("progress", "json")) for rank in (0, 1)
    } < names
    (last / "rng_state_1.pth").unlink()
    with pytest.raises(InputError, match=r"1 differs: rng_state_1.pth \(missing\); checkpoint-2 beside it is whole"):
        manifest.verify(last)


def test_ranks_fill_one_cache(tmp_path: Path) -> None:
    """Each keeps its own rows while they train; one process without the teacher then trains the same."""
    _run(tmp_path / "two", "ddp", WORLD, "cache")
    assert len(TeacherStore(tmp_path / "states")) == 24
    assert len(list((tmp_path / "states").glob("rows-*"))) == WORLD
    _run(tmp_path / "one", "ddp", 1, "cache")
    _assert_same_run(tmp_path / "one", tmp_path / "two")
