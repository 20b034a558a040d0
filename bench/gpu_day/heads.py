"""The base loss through both LM heads, forward + backward, beside logits by eager torch and Liger's fused loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floor import head_flops
from bench.gpu import PARITY
from bench.gpu_day import clock
from bench.gpu_day.day import Day, Made, attempt
from bench.harness import check_parity
from bench.heads import LIGER, liger_jsd
from bench.ops.cases import results
from bench.report import skipped
from mta_fast import linear_divergence_loss
from mta_fast.ops.linear_divergence import divergence

TEXT = (
    "SRKL of counted positions, forward + backward, states and heads bfloat16. Logits: both heads by eager torch, "
    "float32 log-softmax, autograd. Peak memory: above states, heads and the returned gradients. x: the other's time "
    "over the kernels'."
)


@dataclass(frozen=True)
class HeadShape:
    """Counted positions, widths and ids of one call."""

    name: str
    positions: int
    student_dim: int
    teacher_dim: int
    ids: int


HEADS = (
    HeadShape("GPT-2 120M <- 1.5B", 2048, 768, 1600, 50_257),
    HeadShape("Qwen1.5 0.5B <- 1.8B", 8192, 1024, 2048, 151_936),
)
LIGER_PARITY = 1e-1  # how it rounds is its own; what is shown is its time
QUICK = (HeadShape("tiny", 6, 16, 24, 37),)


def measure(day: Day) -> Iterator[Made]:
    """Both shapes."""
    for shape in QUICK if day.quick else HEADS:
        yield from attempt(shape.name, partial(_of_shape, day, shape))


def _inputs(shape: HeadShape, device: str) -> list[Tensor]:
    """States and head of the student, of the teacher; logits of about unit variance times 3."""
    made = []
    for width in (shape.student_dim, shape.teacher_dim):
        made.append(torch.randn(shape.positions, width, device=device).bfloat16())
        made.append((3 * torch.randn(shape.ids, width, device=device) / width**0.5).bfloat16())
    for learnt in made[:2]:
        learnt.requires_grad_()
    return made


def _by_op(inputs: Sequence[Tensor], backend: str, kind: str = "srkl") -> Sequence[Tensor]:
    return results(linear_divergence_loss(*inputs, divergence=kind, backend=backend), inputs[:2])


def _by_logits(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    student, student_head, teacher, teacher_head = inputs
    with torch.no_grad():
        log_p = F.linear(teacher, teacher_head).float().log_softmax(-1)
    log_q = F.linear(student, student_head).float().log_softmax(-1)
    return results(divergence(log_p, log_q, "srkl").mean(), inputs[:2])


def _by_liger(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    student, student_head, teacher, teacher_head = inputs
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
    return results(liger_jsd(student, student_head, teacher, teacher_head, labels), inputs[:2])


def _of_shape(day: Day, shape: HeadShape) -> Iterator[Made]:
    inputs = _inputs(shape, day.device)
    ours, what = partial(_by_op, inputs, day.backend), f"{shape.name}, M={shape.positions:,} V={shape.ids:,}"
    if day.warm:
        ours()
        _by_op(inputs, day.backend, "jsd")
        return
    made = ours()
    yield day.time(f"{what}: through the heads, eager", ours)
    yield day.time(f"{what}: through the heads, host", ours, clock.host_seconds)
    yield day.peak(f"{what}: through the heads, peak memory", ours)
    flops = head_flops(shape.ids, shape.student_dim, shape.positions, shape.teacher_dim)
    yield {what: {"flops": flops}}
    yield from attempt(
        f"{what}: logits", partial(_beside, day, f"{what}: logits", partial(_by_logits, inputs), ours, made), fits=False
    )
    del made
    clock.free(day.device)
    yield from attempt(f"{what}: {LIGER}", partial(_liger, day, what, inputs), fits=False)


def _liger(day: Day, what: str, inputs: Sequence[Tensor]) -> Iterator[Made]:
    try:
        theirs = partial(_by_liger, inputs)
        theirs()
    except ImportError:
        yield skipped(f"{what}: {LIGER}", "liger-kernel is not installed")
        return
    ours = partial(_by_op, inputs, day.backend, "jsd")
    yield day.time(f"{what}: through the heads, JSD", ours)
    yield from _beside(day, f"{what}: {LIGER}", theirs, ours, ours(), LIGER_PARITY)


def _beside(
    day: Day, what: str, other: partial, ours: partial, made: Sequence[Tensor], limit: float = PARITY
) -> Iterator[Made]:
    check_parity(what, made, other(), limit)
    yield day.ratio(f"{what} / through the heads", other, ours)
    yield day.time(what, other)
    yield day.peak(f"{what}, peak memory", other)
