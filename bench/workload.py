"""The standard workload of every benchmark, and the sides that are compared on it.

Three layer pairs, widths of GPT-2 120M <- 1.5B. Pair 1 aligns one-token spans on the first 80% of each row's tokens,
pairs 2 and 3 two-token spans on the same tokens. No padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import Call
from bench.public_algorithm import public_loss
from mta_fast import MTAConfig, MTALoss, SpanBatch, backends

STUDENT_DIM, TEACHER_DIM = 768, 1600
COVERED_SHARE = 0.8


@dataclass(frozen=True)
class Workload:
    """Inputs of one loss call, and the loss in the paper's and in the public scripts' settings.

    Both hold the same projections; ``public_loss`` computes what the public algorithm computes.
    """

    loss: MTALoss
    public_loss: MTALoss
    student_hidden: dict[int, Tensor]
    teacher_hidden: dict[int, Tensor]
    attention_mask: Tensor
    offset_mapping: Tensor  # one character a token
    char_spans: dict[str, list[list[tuple[int, int]]]]
    spans: dict[str, SpanBatch]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Workload:
        """The same workload with states and projections in ``dtype`` on ``device``."""
        loss, public_loss = (copy.deepcopy(x).to(device, dtype) for x in (self.loss, self.public_loss))
        public_loss.projections = loss.projections
        student, teacher = (
            {i: h.detach().to(device, dtype) for i, h in side.items()}
            for side in (self.student_hidden, self.teacher_hidden)
        )
        for hidden in student.values():
            hidden.requires_grad_()
        mask, offsets = self.attention_mask.to(device), self.offset_mapping.to(device)
        spans = {kind: spans.to(device) for kind, spans in self.spans.items()}
        return Workload(loss, public_loss, student, teacher, mask, offsets, self.char_spans, spans)

    def with_backend(self, backend: str) -> Workload:
        """The same tensors, computed by another backend."""
        made = []
        for loss in (self.loss, self.public_loss):
            other = copy.copy(loss)
            other.config = replace(loss.config, backend=backend)
            made.append(other)
        return replace(self, loss=made[0], public_loss=made[1])

    def learnt(self) -> list[Tensor]:
        """The tensors that receive a gradient."""
        return [*self.student_hidden.values(), *self.loss.parameters()]

    def pair_spans(self) -> list[list[list[tuple[int, int]]]]:
        """The character spans of each layer pair."""
        return [self.char_spans[kind] for kind in self.loss.config.granularity]


def loss_and_gradients(workload: Workload, loss: Any) -> tuple[Tensor, ...]:
    """One loss call of ``loss`` (MTALoss, or compiled): the loss, and the gradients of ``workload.learnt()``."""
    value = loss(workload.student_hidden, workload.teacher_hidden, workload.spans).loss
    return value.detach(), *torch.autograd.grad(value, workload.learnt())


def public_loss_and_gradients(workload: Workload) -> tuple[Tensor, ...]:
    """The same of the public algorithm."""
    value = public_loss(
        workload.loss.projections if workload.loss.config.lambda_hid > 0 else None,
        workload.attention_mask,
        workload.student_hidden,
        workload.teacher_hidden,
        workload.offset_mapping,
        workload.pair_spans(),
    )
    return value.detach(), *torch.autograd.grad(value, workload.learnt())


class StandardSpans(NamedTuple):
    """Spans of a batch without padding, as characters and as tokens."""

    mask: Tensor
    offsets: Tensor
    char_spans: dict[str, list[list[tuple[int, int]]]]
    spans: dict[str, SpanBatch]


def standard_spans(batch: int, seq_len: int) -> StandardSpans:
    """One-token words and two-token phrases on the first tokens of each row."""
    covered = int(COVERED_SHARE * seq_len)
    words = [(j, j + 1) for j in range(covered)]
    phrases = [(j, j + 2) for j in range(0, covered - 1, 2)]
    # one character a token, with a gap after each so that the forgiven leading character adds no token
    offsets = torch.stack([torch.arange(seq_len) * 3, torch.arange(seq_len) * 3 + 1], -1).expand(batch, -1, -1)
    char_spans = {
        kind: [[(3 * start, 3 * end - 2) for start, end in rows]] * batch
        for kind, rows in (("word", words), ("phrase", phrases))
    }
    mask = torch.ones(batch, seq_len, dtype=torch.long)
    spans = {kind: SpanBatch.from_char_spans(rows, offsets, mask) for kind, rows in char_spans.items()}
    return StandardSpans(mask, offsets, char_spans, spans)


def standard_workload(
    batch: int,
    seq_len: int,
    dims: tuple[int, int] = (STUDENT_DIM, TEACHER_DIM),
    pairs: int = 3,
    hid: bool = True,
    device: str = "cpu",
) -> Workload:
    """Make the inputs: random hidden states, float32, on the CPU; without ``hid`` both losses leave Hid out.

    Args:
        device: where the states are drawn: a CPU takes half a minute for the largest of a GPU's.
    """
    generator = torch.Generator(device).manual_seed(0)
    settings: dict[str, Any] = {
        "layer_pairs": [(i, i) for i in range(pairs)],
        "granularity": ["word", *["phrase"] * (pairs - 1)],
        "lambda_dsa": 1.0,
        "lambda_hid": 0.1 if hid else 0.0,
    }
    loss, public_loss = (MTALoss(make(**settings), *dims) for make in (MTAConfig.paper, MTAConfig.public))
    public_loss.projections = loss.projections
    student, teacher = (
        {layer: torch.randn(batch, seq_len, dim, generator=generator, device=device) for layer in range(pairs)}
        for dim in dims
    )
    for hidden in student.values():
        hidden.requires_grad_()
    made = standard_spans(batch, seq_len)
    return Workload(loss, public_loss, student, teacher, made.mask, made.offsets, made.char_spans, made.spans)


PUBLIC, REFERENCE = "public algorithm", "reference"
# The public algorithm holds about ten float32 matrices of (spans of the batch)^2 (measured: 6.9 GB for 13,056 spans)
PUBLIC_MATRICES = 10


def cpu_backends(asked: Sequence[str] | None = None) -> list[str]:
    """Backends for CPU tensors in their order of preference: those asked for, or all that "auto" would take.

    Raises:
        InputError: no backend has that name.
        BackendUnavailableError: it can't run, with the reason.
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


_cached_workload = lru_cache(maxsize=1)(standard_workload)


def loss_call(
    side: str, batch: int, seq_len: int, dims: Sequence[int], hid: bool = True, preset: str = "paper"
) -> Call:
    """The same from numbers and names, for ``bench.peak``; sides of one shape share the inputs."""
    student_dim, teacher_dim = dims
    return loss_side(_cached_workload(batch, seq_len, (student_dim, teacher_dim), hid=hid), side, preset)
