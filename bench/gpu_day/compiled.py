"""MTALoss whole under torch.compile's modes: the same numbers, and its time beside eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import PARITY
from bench.gpu_day.day import Day, Made, attempt
from bench.harness import check_parity
from bench.workload import loss_and_gradients

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
TEXT = "torch.compile(MTALoss, fullgraph=True, mode=...), forward + backward, first shape; x: eager over compiled."


def measure(day: Day) -> Iterator[Made]:
    """Every mode; a dry run traces and compiles nothing."""
    workload = day.workload(day.shapes[0])
    eager = partial(loss_and_gradients, workload, workload.loss)
    for mode in MODES:
        torch._dynamo.reset()
        options: dict[str, Any] = {"backend": "eager"} if day.device == "cpu" else {"mode": mode}
        compiled = torch.compile(workload.loss, fullgraph=True, **options)

        def call(compiled: Callable = compiled) -> Sequence[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()  # what a captured step returned may be written over
            return loss_and_gradients(workload, compiled)

        yield from attempt(mode, partial(_of_mode, day, mode, call, eager))


def _of_mode(day: Day, mode: str, call: Callable[[], Sequence[Tensor]], eager: Callable) -> Iterator[Made]:
    made = [tensor.clone() for tensor in call()]
    if day.warm:
        return
    check_parity(f"compiled, {mode}", made, eager(), PARITY)
    yield day.time(f"{mode}: forward + backward", call)
    yield day.ratio(f"{mode}: eager / compiled", eager, call, target="")
    check_parity(f"compiled, {mode}, later calls", [tensor.clone() for tensor in call()], eager(), PARITY)
