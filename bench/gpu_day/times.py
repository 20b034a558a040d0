"""The loss, forward + backward, at the model's shapes: eager, host and device time, and beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import PARITY, PUBLIC_PAIRS, first_pair
from bench.gpu_day import clock
from bench.gpu_day.day import Day, Made, attempt
from bench.gpu_model.model import Shape
from bench.harness import Call, check_parity
from bench.report import skipped
from bench.workload import Workload, loss_and_gradients, public_loss_and_gradients
from mta_fast import token_importance

TEXT = (
    "Forward + backward of all layer pairs, bfloat16. Eager: from one CUDA event to the next, launches included. Host: "
    "the time of Python and launches alone, nothing waits. Device: a captured graph's replay, so that the host costs "
    "nothing; a step takes about the larger of the two. x: the other's eager time over this one's, in turn."
)
TEXT_COMPILED = (
    "torch.compile(fullgraph=True) of the loss by the reference, its compilation left out. x: over the kernels."
)
LONGEST_REFERENCE = 8192  # tokens a row: beyond, it would take an hour


def measure(day: Day) -> Iterator[Made]:
    """Every shape, and importance beside flash-colreduce."""
    for shape in day.shapes:
        yield from attempt(shape.name, partial(_of_shape, day, shape))
    yield from attempt("flash-colreduce", partial(_column_sums, day))


def compiled_reference(day: Day) -> Iterator[Made]:
    """The shapes that the reference takes; the longest is left out."""
    for shape in day.shapes[:3]:
        what = f"{shape.name}: compiled reference"
        yield from attempt(what, partial(_compiled, day, shape, what), fits=False)


def _of_shape(day: Day, shape: Shape) -> Iterable[Made]:
    workload = day.workload(shape)
    ours = partial(loss_and_gradients, workload, workload.loss)
    if day.warm:
        ours()
        loss_and_gradients(workload, workload.public_loss)
        return
    short = shape.seq_len <= LONGEST_REFERENCE
    if not short:
        first, expected = first_pair(workload)
        check_parity(f"{shape.name}: reference, one layer pair", first, expected, PARITY)
        del first, expected
    yield day.time(f"{shape.name}: eager", ours)
    yield day.time(f"{shape.name}: host", ours, clock.host_seconds)
    yield from attempt(f"{shape.name}: device", partial(_device, day, shape, ours))
    yield day.peak(f"{shape.name}: peak memory", ours)
    if short:
        reference = workload.with_backend("reference")
        call = partial(loss_and_gradients, reference, reference.loss)
        what = f"{shape.name}: eager reference"
        yield from attempt(what, partial(_beside, day, what, call, ours), fits=False)
    else:
        yield skipped(f"{shape.name}: eager reference", "an hour for a row of this length; one layer pair is checked")
    yield from _public(day, shape, workload)


def _device(day: Day, shape: Shape, ours: Call) -> Iterator[Made]:
    replay, _ = clock.captured(ours, day.device)
    yield day.time(f"{shape.name}: device", replay)


def _public(day: Day, shape: Shape, workload: Workload) -> Iterator[Made]:
    what = f"{shape.name}: public algorithm"
    if max(spans.num_spans for spans in workload.spans.values()) >= PUBLIC_PAIRS:
        yield skipped(what, "its matrices of (spans of the batch)^2 don't fit")
        return
    ours = partial(loss_and_gradients, workload, workload.public_loss)
    yield from attempt(
        what, partial(_beside, day, what, partial(public_loss_and_gradients, workload), ours), fits=False
    )


def _beside(day: Day, what: str, other: Callable[[], Sequence[Tensor]], ours: Call) -> Iterator[Made]:
    check_parity(what, ours(), other(), PARITY)
    yield day.ratio(f"{what} / triton", other, ours)
    yield day.time(what, other)
    yield day.peak(f"{what}, peak memory", other)


def _compiled(day: Day, shape: Shape, what: str) -> Iterator[Made]:
    workload = day.workload(shape)
    reference = workload.with_backend("reference")
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager"} if day.device == "cpu" else {}
    compiled = torch.compile(reference.loss, fullgraph=True, dynamic=False, **options)
    call = partial(loss_and_gradients, reference, compiled)
    if day.warm:
        call()
        return
    yield from _beside(day, what, call, partial(loss_and_gradients, workload, workload.loss))


def _column_sums(day: Day) -> Iterator[Made]:
    """Importance at a width that its kernel takes; its mean keeps the diagonal, so that it is checked alone."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        yield skipped("importance, flash-colreduce / triton", "flash-colreduce is not installed")
        return
    for batch, seq_len in ((2, 32),) if day.quick else ((16, 256), (32, 512), (1, 8192)):
        states = torch.randn(batch, seq_len, 128, device=day.device, dtype=torch.bfloat16)
        ours = partial(token_importance, states, backend=day.backend)
        if day.warm:
            ours()
            continue
        heads = states[:, None]
        theirs = partial(flash_colreduce, heads, heads, reduction="mean")
        scores = heads.float() @ heads.float().mT / 128**0.5
        check_parity("flash-colreduce", [theirs()[:, 0]], [scores.softmax(-1).mean(2)[:, 0]], PARITY)
        what = f"importance, B={batch} S={seq_len} d=128: flash-colreduce / triton"
        yield day.ratio(what, theirs, ours)
