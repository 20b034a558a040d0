"""What only a GPU can show, and the GPU benchmark's harness. On a GPU tests/test_kernels*.py run compiled too."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import make_model, make_tokenizer

from mta_fast import backends, token_importance

pytest.importorskip("triton", reason="the triton backend needs the package triton")
from bench import gpu
from bench import workload as workload_module
from bench.gpu_model.model import Shape
from bench.harness import check_parity
from bench.report import publish
from bench.workload import Workload, loss_and_gradients, standard_workload

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA or ROCm device answers (mta-fast doctor says what torch sees)"
)


def _workload(backend: str = "triton") -> Workload:
    return standard_workload(4, 300, (64, 128)).to("cuda", torch.bfloat16).with_backend(backend)


def _step(workload: Workload) -> tuple[torch.Tensor, ...]:
    return loss_and_gradients(workload, workload.loss)


@pytest.mark.gpu
@needs_gpu
def test_auto_picks_the_kernels() -> None:
    assert backends.choose("token_importance", [torch.empty(2, 2, device="cuda")]).name == "triton"


@pytest.mark.gpu
@needs_gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    workload = _workload()
    _step(workload)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(workload)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_a_step_is_captured_in_a_cuda_graph() -> None:
    workload = _workload()
    expected = _step(workload)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = _step(workload)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lengths", [[131072], [1, 20000, 3, 256, 257]])
def test_long_rows(lengths: list[int]) -> None:
    hidden = torch.randn(sum(lengths), 576, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = token_importance(hidden, cu_seqlens=cu_seqlens)
    longest = max(lengths)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 12 * longest * -(-longest // 1024) + 2**24
    expected = token_importance(hidden, cu_seqlens=cu_seqlens, backend="reference")
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.gpu
@needs_gpu
def test_inductor_takes_the_loss_whole() -> None:
    workload = _workload()
    compiled = torch.compile(workload.loss, fullgraph=True)
    made = compiled(workload.student_hidden, workload.teacher_hidden, workload.spans).loss
    torch.testing.assert_close(made, _step(workload)[0])


@pytest.mark.gpu
@needs_gpu
def test_float64_is_left_to_the_reference() -> None:
    tensor = torch.empty(2, 2, device="cuda", dtype=torch.float64)
    assert backends.choose("token_importance", [tensor]).name == "reference"


@pytest.mark.gpu
@needs_gpu
def test_a_training_is_that_of_the_cpu(tmp_path: Path) -> None:
    assert _losses(tmp_path / "gpu", use_cpu=False) == pytest.approx(_losses(tmp_path / "cpu", use_cpu=True), rel=1e-3)


def _losses(out: Path, use_cpu: bool) -> list[float]:
    """Base loss, DSA and Hid of four steps from ridge projections, the teacher's states from a cache being filled."""
    pytest.importorskip("transformers")
    from training import logged, make_trainer

    from mta_fast.distill.data import load_sample
    from mta_fast.distill.training.caching import TeacherCache

    rows = []
    for row in load_sample()[:20]:  # spans without a parser
        words = [list(found.span()) for found in re.finditer(r"\w+", row["prompt"] + row["output"])]
        phrases = [[first[0], second[1]] for first, second in pairwise(words)]
        rows.append(dict(row) | {"word_spans": words, "phrase_spans": phrases[::2]})
    cache = TeacherCache(out / "teacher", "float32")
    teacher = make_model("llama", 8, width=48, vocabulary=len(make_tokenizer()))
    trainer = make_trainer(
        out, teacher=teacher, rows=rows, use_cpu=use_cpu, projection_init="ridge", teacher_cache=cache
    )
    trainer.train()
    return [value for name in ("base", "dsa", "hid") for value in logged(trainer, name)]


# --- the benchmark's harness, on any machine ---------------------------------------------------------------------

TINY = Shape("tiny", 2, 12, 8, 16, 2)


def test_the_benchmark_skips_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert publish(gpu.measure()) == 0
    assert "skipped: no CUDA or ROCm device" in capsys.readouterr().out


def test_the_harness_compares_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    rows = gpu.of_loss(TINY, "cuda" if torch.cuda.is_available() else "cpu", torch.float32, 1)
    names = [row.what.split(": ")[1] for row in rows]
    others = ["reference", "compiled reference", "public algorithm"]
    assert names == ["triton, forward + backward", *(f"{name} / triton" for name in others)]
    assert all(row.median > 0 for row in rows)


def test_nothing_is_timed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    public = workload_module.public_loss
    monkeypatch.setattr(workload_module, "public_loss", lambda *args: 1.1 * public(*args))
    monkeypatch.setattr(gpu, "device_seconds", lambda *args: pytest.fail("timed before the check"))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    with pytest.raises(SystemExit, match="public algorithm: expected parity below"):
        gpu.of_loss(TINY, "cpu", torch.float32, 1)


def test_the_longest_shape_is_checked_by_one_layer_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = standard_workload(2, 12, (8, 16), 2).with_backend("triton")
    ours, expected = gpu.first_pair(workload)
    check_parity("one pair", ours, expected, gpu.PARITY)
    assert len(ours) == 4  # loss, states, projection and bias
