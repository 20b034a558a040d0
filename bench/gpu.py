"""Times on a real GPU: ``python -m bench gpu``. Skips with the reason where there is none.

The loss, forward + backward in bfloat16, of the Triton kernels against the reference, the reference compiled, and the
public algorithm, each where it fits. Compared times are taken in turn within each round. Nothing is timed before the
two sides agree.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_day.clock import device_seconds
from bench.gpu_model.model import SHAPES, Shape
from bench.harness import Call, check_parity
from bench.report import Entry, Report, Section, entry, machine, milliseconds, nothing
from bench.workload import Workload, loss_and_gradients, public_loss_and_gradients, standard_workload

ROUNDS, WARM_UP = 20, 3
# Relative difference of loss and gradients between two sides in bfloat16: their products round differently
PARITY = 2e-2
PUBLIC_PAIRS = 30_000  # the public algorithm's matrices hold (all spans of the batch)^2 values: 7 GB each
MODELLED_MS = "< 0.4"  # the first shape's target on an H100


def measure() -> Report:
    """Every shape of the model."""
    command = "mta-fast bench gpu"
    if not torch.cuda.is_available():
        return nothing(command, "no CUDA or ROCm device answers; bench static and bench model need none")
    made = [each for shape in SHAPES for each in of_loss(shape, "cuda", torch.bfloat16, ROUNDS)]
    return Report(command, machine(**device_facts()), [Section("Times and ratios", made)])


def device_facts() -> dict[str, Any]:
    """Device, driver and versions."""
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "triton": importlib.metadata.version("triton")}
    if torch.version.hip:
        return found | {"rocm": torch.version.hip}
    found |= {"cuda": torch.version.cuda}
    if shutil.which("nvidia-smi") is None:
        return found
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return found | {"driver": driver}


def of_loss(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[Entry]:
    """Ratios to the Triton kernels' time of one shape, and that time."""
    dims = shape.student_dim, shape.teacher_dim
    workload = standard_workload(shape.batch, shape.seq_len, dims, shape.pairs).to(device, dtype)
    ours = workload.with_backend("triton")
    what = f"{shape.name}, B={shape.batch} S={shape.seq_len}"
    others: dict[str, tuple[Call, Any]] = {}
    if shape.seq_len <= 8192:  # an hour of reference for the longest row
        reference = workload.with_backend("reference")
        compiled = torch.compile(reference.loss, fullgraph=True, dynamic=False)
        others["reference"] = functools.partial(loss_and_gradients, reference, reference.loss), ours.loss
        others["compiled reference"] = functools.partial(loss_and_gradients, reference, compiled), ours.loss
    if max(spans.num_spans for spans in workload.spans.values()) < PUBLIC_PAIRS:
        others["public algorithm"] = functools.partial(public_loss_and_gradients, workload), ours.public_loss
    for name, (step, loss) in others.items():
        check_parity(f"{what}: {name}", loss_and_gradients(ours, loss), step(), PARITY)
    if not others:
        first, expected = first_pair(workload)
        check_parity(f"{what}: reference, one layer pair", first, expected, PARITY)
    made = [_own_time(f"{what}: triton, forward + backward", ours.loss, ours, rounds, device)]
    for name, (step, loss) in others.items():
        mine = functools.partial(loss_and_gradients, ours, loss)
        made.append(_ratio(f"{what}: {name} / triton", step, mine, rounds, device))
    return made


def first_pair(workload: Workload) -> list[tuple[Tensor, ...]]:
    """Loss and gradients of the first layer pair by the kernels and by the reference, where that is all it can do."""
    config = workload.loss.config
    first = replace(config, layer_pairs=config.layer_pairs[:1], granularity=config.granularity[:1])
    made = []
    for backend in ("triton", "reference"):
        loss = copy.copy(workload.loss)
        loss.config = replace(first, backend=backend)
        value = loss(workload.student_hidden, workload.teacher_hidden, workload.spans).loss
        learnt = [workload.student_hidden[0], *loss.projections[0].parameters()]
        made.append((value.detach(), *torch.autograd.grad(value, learnt)))
    return made


def _own_time(what: str, loss: Any, workload: Workload, rounds: int, device: str) -> Entry:
    mine = functools.partial(loss_and_gradients, workload, loss)
    times = [device_seconds(mine, device) for _ in range(WARM_UP + rounds)]
    first = workload.attention_mask.shape == (SHAPES[0].batch, SHAPES[0].seq_len)
    judged = device == "cuda" and first and "H100" in torch.cuda.get_device_name()
    return milliseconds(what, times[WARM_UP:], MODELLED_MS if judged else "")


def _ratio(what: str, other: Call, ours: Call, rounds: int, device: str) -> Entry:
    ratios = [device_seconds(other, device) / device_seconds(ours, device) for _ in range(WARM_UP + rounds)]
    return entry(what, ratios[WARM_UP:], target=">= 1")
