"""Hid: the projected student states of the covered tokens against the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.floor import hid_flops
from bench.harness import Tensors
from bench.ops.cases import BOTH, Op, Shape, Work, results
from bench.workload import standard_spans
from mta_fast import SpanBatch, hidden_alignment_loss


@dataclass(frozen=True)
class Inputs:
    """What a call reads."""

    student: Tensor  # [B, S, d_S]
    teacher: Tensor  # [B, S, d_T]
    weights: Tensor  # [B, S], 0 where no span covers the token
    projection: nn.Linear
    spans: SpanBatch


def _make(shape: Shape) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    size = shape.batch, shape.seq_len
    spans = standard_spans(*size).spans["word"]
    weights = torch.zeros(shape.batch * shape.seq_len)
    weights[spans.covered] = torch.rand(len(spans.covered), generator=generator) + 0.1
    student, teacher = (torch.randn(*size, dim, generator=generator) for dim in shape.dims)
    return Inputs(student.requires_grad_(), teacher, weights.reshape(size), nn.Linear(*shape.dims), spans)


def _results(inputs: Inputs, loss: object) -> Tensors:
    return results(loss, [inputs.student, *inputs.projection.parameters()])


def _run(inputs: Inputs, backend: str, mode: str) -> Tensors:
    linear, states = inputs.projection, (inputs.student, inputs.teacher, inputs.weights)
    loss = hidden_alignment_loss(*states, linear.weight, linear.bias, spans=inputs.spans, backend=backend)
    return _results(inputs, loss)


def _cosine_similarity(inputs: Inputs, mode: str) -> Tensors:
    """All tokens projected; the uncovered ones weigh nothing."""
    projected = F.linear(inputs.student, inputs.projection.weight, inputs.projection.bias)
    distance = 1 - F.cosine_similarity(projected, inputs.teacher, dim=-1)
    return _results(inputs, (inputs.weights * distance).sum() / inputs.weights.sum())


def _work(inputs: Inputs, mode: str) -> Work:
    return Work(flops=hid_flops(len(inputs.spans.covered), inputs.student.shape[-1], inputs.teacher.shape[-1]))


OP = Op("hidden_alignment", (BOTH,), _make, _run, {"cosine_similarity(F.linear)": _cosine_similarity}, _work)
