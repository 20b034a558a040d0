"""Base losses through the LM head: SRKL of states and heads against the same of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.floor import head_flops
from bench.harness import Tensors
from bench.ops.cases import BOTH, Op, Shape, Work, results
from mta_fast import linear_divergence_loss
from mta_fast.ops.linear_divergence import divergence

IDS_OF_A_FEATURE = 8  # of the student: 6,144 ids at 768


@dataclass(frozen=True)
class Inputs:
    """What a call reads: the counted positions, half of the tokens."""

    student: Tensor  # [M, d_S]
    student_head: Tensor  # [V, d_S]
    teacher: Tensor  # [M, d_T]
    teacher_head: Tensor  # [V, d_T]


def _make(shape: Shape) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    positions, ids = shape.batch * shape.seq_len // 2, IDS_OF_A_FEATURE * shape.dims[0]
    states = [torch.randn(positions, dim, generator=generator) for dim in shape.dims]
    heads = [torch.randn(ids, dim, generator=generator) / dim**0.5 for dim in shape.dims]
    return Inputs(states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1])


def _results(inputs: Inputs, loss: object) -> Tensors:
    return results(loss, [inputs.student, inputs.student_head])


def _run(inputs: Inputs, backend: str, mode: str) -> Tensors:
    sides = (inputs.student, inputs.student_head, inputs.teacher, inputs.teacher_head)
    return _results(inputs, linear_divergence_loss(*sides, backend=backend))


def _logits(inputs: Inputs, mode: str) -> Tensors:
    """All logits at once, and autograd."""
    log_p = (inputs.teacher @ inputs.teacher_head.T).log_softmax(-1)
    log_q = (inputs.student @ inputs.student_head.T).log_softmax(-1)
    return _results(inputs, divergence(log_p, log_q, "srkl").mean())


def _work(inputs: Inputs, mode: str) -> Work:
    ids, width = inputs.student_head.shape
    return Work(flops=head_flops(ids, width, len(inputs.student), inputs.teacher.shape[1]))


OP = Op("linear_divergence", (BOTH,), _make, _run, {"logits": _logits}, _work)
