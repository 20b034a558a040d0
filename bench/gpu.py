"""Times on a real GPU: ``mta-fast bench gpu``. Skips with the reason where there is none.

The loss, forward + backward in bfloat16, of the Triton kernels against the reference, the reference compiled, and the
public algorithm, each where it fits; importance alone against flash-colreduce where that is installed. Compared times
are taken in turn within each round. Nothing is timed before the two sides agree.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import check_parity, seconds
from bench.machine import machine
from bench.model import SHAPES, Shape
from bench.report import Report, Row, Section, make_row, publish
from bench.workload import Workload, loss_and_gradients, public_loss_and_gradients, standard_workload
from mta_fast import token_importance

ROUNDS, WARM_UP = 20, 3
# Relative difference of loss and gradients between two sides in bfloat16: their products round differently
PARITY = 2e-2
PUBLIC_PAIRS = 30_000  # the public algorithm's matrices hold (all spans of the batch)^2 values: 7 GB each
MODELLED_MS = 0.25  # the first shape's target on an H100


def main(out: Path | None) -> int:
    """Print the figures, write them beside ``out``, and return 1 if a target was missed."""
    if not torch.cuda.is_available():
        print("bench gpu: skipped, no CUDA or ROCm device answers; bench static and bench model need none")
        return 0
    rows = [row for shape in SHAPES for row in loss_rows(shape, "cuda", torch.bfloat16, ROUNDS)]
    rows += importance_rows("cuda")
    return publish(Report("mta-fast bench gpu", machine(**_device()), [Section("Times and ratios", rows)]), out)


def _device() -> dict[str, Any]:
    """Device, driver and versions."""
    found = {"gpu": torch.cuda.get_device_name(), "triton": importlib.metadata.version("triton")}
    if torch.version.hip:
        return found | {"rocm": torch.version.hip}
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str:
    """Of the kernel driver; nvidia-smi comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


# --- the loss ----------------------------------------------------------------------------------------------------

Step = Callable[[], Sequence[Tensor]]


def loss_rows(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Ratios to the Triton kernels' time of one shape, and that time."""
    dims = shape.student_dim, shape.teacher_dim
    workload = standard_workload(shape.batch, shape.seq_len, dims, shape.pairs).to(device, dtype)
    ours = workload.with_backend("triton")
    what = f"{shape.name}, B={shape.batch} S={shape.seq_len}"
    others: dict[str, tuple[Step, Any]] = {}
    if shape.seq_len <= 8192:  # an hour of reference for the longest row
        reference = workload.with_backend("reference")
        compiled = torch.compile(reference.loss, fullgraph=True, dynamic=False)
        others["reference"] = functools.partial(loss_and_gradients, reference, reference.loss), ours.loss
        others["compiled reference"] = functools.partial(loss_and_gradients, reference, compiled), ours.loss
    if max(_spans(workload)) < PUBLIC_PAIRS:
        others["public algorithm"] = functools.partial(public_loss_and_gradients, workload), ours.public_loss
    for name, (step, loss) in others.items():
        _check_parity(f"{what}: {name}", loss_and_gradients(ours, loss), step())
    if not others:
        _check_parity(f"{what}: reference, one layer pair", *_first_pair(workload))
    rows = [_time_row(f"{what}: triton, forward + backward", ours.loss, ours, rounds, device)]
    for name, (step, loss) in others.items():
        mine = functools.partial(loss_and_gradients, ours, loss)
        rows.append(_ratio_row(f"{what}: {name} / triton", step, mine, rounds, device))
    return rows


def _first_pair(workload: Workload) -> list[Sequence[Tensor]]:
    """Loss and gradients of the first layer pair by the kernels and by the reference, where that is all it can do."""
    config = workload.loss.config
    made = []
    for backend in ("triton", "reference"):
        loss = copy.copy(workload.loss)
        first = {"layer_pairs": config.layer_pairs[:1], "granularity": config.granularity[:1]}
        loss.config = replace(config, backend=backend, **first)
        value = loss(workload.student_hidden, workload.teacher_hidden, workload.spans).loss
        learnt = [workload.student_hidden[0], *loss.projections[0].parameters()]
        made.append((value.detach(), *torch.autograd.grad(value, learnt)))
    return made


def _spans(workload: Workload) -> list[int]:
    return [spans.num_spans for spans in workload.spans.values()]


def _check_parity(what: str, ours: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    check_parity(what, ours, others, PARITY)


def _time_row(what: str, loss: Any, workload: Workload, rounds: int, device: str) -> Row:
    times = [
        1e3 * _time(functools.partial(loss_and_gradients, workload, loss), device) for _ in range(WARM_UP + rounds)
    ]
    first = workload.attention_mask.shape == (SHAPES[0].batch, SHAPES[0].seq_len)
    if device == "cuda" and first and "H100" in torch.cuda.get_device_name():
        return make_row(what, "ms", "<", MODELLED_MS, times[WARM_UP:])
    return make_row(what, "ms", "<", None, times[WARM_UP:])


def _ratio_row(what: str, other: Step, ours: Step, rounds: int, device: str) -> Row:
    ratios = [_time(other, device) / _time(ours, device) for _ in range(WARM_UP + rounds)]
    return make_row(what, "x", ">=", 1.0, ratios[WARM_UP:])


def _time(step: Step, device: str) -> float:
    """Seconds of one call, on the device's own clock where there is one."""
    if device == "cpu":
        return seconds(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# --- importance alone --------------------------------------------------------------------------------------------


def importance_rows(device: str) -> list[Row]:
    """Importance against flash-colreduce, which holds the width on chip and has no self-loop mask: time only."""
    if importlib.util.find_spec("flash_colreduce") is None:
        print("flash-colreduce is not installed: importance is not compared with it (pip install flash-colreduce)")
        return []
    from flash_colreduce import flash_colreduce

    rows = []
    for length in (512, 4096, 32768):
        hidden = torch.randn(1, length, 128, device=device, dtype=torch.bfloat16)
        z = (hidden / (hidden.float().std(-1, keepdim=True) + 1e-5)).to(hidden.dtype)[:, None]
        _check_self_loop(flash_colreduce(z, z, "mean"), hidden)
        rows.append(
            _ratio_row(
                f"importance, B=1 S={length} d=128: flash-colreduce / triton",
                functools.partial(flash_colreduce, z, z, "mean"),
                functools.partial(token_importance, hidden, backend="triton"),
                ROUNDS,
                device,
            )
        )
    return rows


def _check_self_loop(other: Tensor, hidden: Tensor) -> None:
    """What flash-colreduce computes is importance with a self-loop: check it against that in float32."""
    z = hidden[0].float() / (hidden[0].float().std(-1, keepdim=True) + 1e-5)
    total = torch.zeros(len(z), device=z.device)
    for block in z.split(1024):
        total += (block @ z.T / z.shape[1] ** 0.5).softmax(-1).sum(0)
    _check_parity("flash-colreduce", [other.flatten()], [total / len(z)])
