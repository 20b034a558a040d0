"""Which backends are compared, and the loss as each side computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch

from bench.harness import Call
from bench.workload import STUDENT_DIM, TEACHER_DIM, Workload, loss_and_gradients, public_loss_and_gradients
from bench.workload import standard_workload as make_workload
from mta_fast import backends

PUBLIC, REFERENCE = "public algorithm", "reference"
# The public algorithm holds about ten float32 matrices of (spans of the batch)^2 (measured: 6.9 GB for 13,056 spans)
PUBLIC_MATRICES = 10


def cpu_backends(asked: Sequence[str] | None = None) -> list[str]:
    """Backends for CPU tensors in their order of preference: those asked for, or all that "auto" would take.

    Raises:
        InputError: no backend has that name. BackendUnavailableError: it can't run, with the reason.
    """
    sample = [torch.empty(0)]
    if asked:
        return list(dict.fromkeys(backends.choose(op, sample, name).name for name in asked for op in backends.OPS[:1]))
    return [
        name
        for name, backend in backends.BACKENDS.items()
        if not any(backend.reasons_against(op, sample) or backend.reasons_to_avoid(op, sample) for op in backends.OPS)
    ]


def loss_side(workload: Workload, side: str, preset: str = "paper") -> Call:
    """Loss, forward + backward, by a backend in a preset, or by the public algorithm."""
    if side == PUBLIC:
        return partial(public_loss_and_gradients, workload)
    made = workload.with_backend(side)
    return partial(loss_and_gradients, made, made.loss if preset == "paper" else made.public_loss)


def public_gigabytes(workload: Workload) -> float:
    """What the public algorithm needs for the largest of the layer pairs."""
    spans = max(batch.num_spans for batch in workload.spans.values())
    return PUBLIC_MATRICES * 4 * spans**2 / 1e9


_cached_workload = lru_cache(maxsize=1)(make_workload)


def loss_call(
    side: str,
    batch: int,
    seq_len: int,
    dims: Sequence[int] = (STUDENT_DIM, TEACHER_DIM),
    hid: bool = True,
    preset: str = "paper",
) -> Call:
    """The same from numbers and names, for ``bench.peak``; sides of one shape share the inputs."""
    student_dim, teacher_dim = dims
    return loss_side(_cached_workload(batch, seq_len, (student_dim, teacher_dim), hid=hid), side, preset)
