"""A CUDA graph's replay is the eager call bit by bit, also of values that were written into its inputs later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.gpu_day import clock
from bench.gpu_day.day import Day, Made, attempt
from bench.report import entry
from bench.workload import loss_and_gradients
from mta_fast import linear_divergence_loss

TEXT = (
    "Tensors (the loss, every gradient) of which a bit differs between the replay of a captured call and the eager "
    "call. New values: written into the captured inputs before the replay, rows and spans as they were."
)
HEAD = (300, 96, 160, 1000)  # positions, widths and ids of the base loss
QUICK_HEAD = (5, 8, 12, 20)


def measure(day: Day) -> Iterator[Made]:
    """Both presets of MTALoss, and the base loss through the heads."""
    workload = day.workload(day.shapes[0])
    states = [*workload.student_hidden.values(), *workload.teacher_hidden.values()]
    for name, loss in (("paper preset", workload.loss), ("public preset", workload.public_loss)):
        call = partial(loss_and_gradients, workload, loss)
        yield from attempt(f"MTALoss, {name}", partial(_replays, f"MTALoss, {name}", call, states, day))
    positions, student_dim, teacher_dim, ids = QUICK_HEAD if day.quick else HEAD
    sizes = ((positions, student_dim), (ids, student_dim), (positions, teacher_dim), (ids, teacher_dim))
    inputs = [torch.randn(size, device=day.device).to(torch.bfloat16) for size in sizes]
    for learnt in inputs[:2]:
        learnt.requires_grad_()

    def base() -> Sequence[Tensor]:
        loss = linear_divergence_loss(*inputs, backend=day.backend)
        return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]

    yield from attempt("base loss", partial(_replays, "base loss, SRKL", base, inputs, day))


def _replays(what: str, call: Callable[[], Sequence[Tensor]], states: Sequence[Tensor], day: Day) -> Iterator[Made]:
    expected = [tensor.clone() for tensor in call()]
    replay, made = clock.captured(call, day.device)
    replay()
    yield entry(f"{what}: the same batch", [_different(made, expected)], "tensors", "<= 0")
    with torch.no_grad():
        for state in states:
            state.copy_(torch.randn(state.shape, device=day.device))
    replay()
    kept = [tensor.clone() for tensor in made]
    yield entry(f"{what}: new values", [_different(kept, call())], "tensors", "<= 0")


def _different(made: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    return sum(not torch.equal(mine, other) for mine, other in zip(made, expected, strict=True))
