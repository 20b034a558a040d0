"""DSA of one-token spans: all pairs of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floor import pair_flops
from bench.harness import Call, Tensors
from bench.ops.cases import BOTH, Op, Shape, Work, results
from bench.workload import COVERED_SHARE, standard_spans
from mta_fast import SpanBatch, span_pair_loss


@dataclass(frozen=True)
class Inputs:
    """What a call reads."""

    student: Tensor  # [N, d_S]
    teacher: Tensor  # [N, d_T]
    weights: Tensor  # [N]
    spans: SpanBatch


def make_inputs(batch: int, seq_len: int, dims: tuple[int, int]) -> Inputs:
    """Random pooled spans of the standard workload's words."""
    generator = torch.Generator().manual_seed(0)
    spans = standard_spans(batch, seq_len).spans["word"]
    student, teacher = (torch.randn(spans.num_spans, dim, generator=generator) for dim in dims)
    weights = torch.rand(spans.num_spans, generator=generator) + 0.1
    return Inputs(student.requires_grad_(), teacher, weights * batch / weights.sum(), spans)


def _make(shape: Shape) -> Inputs:
    return make_inputs(shape.batch, shape.seq_len, shape.dims)


def call(backend: str, method: str, spans: int, dims: Sequence[int]) -> Call:
    """Forward + backward of one row with so many spans."""
    student_dim, teacher_dim = dims
    inputs = _one_row(spans, (student_dim, teacher_dim))
    return partial(run, inputs, backend, BOTH, method)


@lru_cache(maxsize=1)
def _one_row(spans: int, dims: tuple[int, int]) -> Inputs:
    inputs = make_inputs(1, math.ceil(spans / COVERED_SHARE), dims)
    assert inputs.spans.num_spans == spans
    return inputs


def run(inputs: Inputs, backend: str, mode: str, method: str = "auto") -> Tensors:
    """One call by a backend."""
    states = inputs.student, inputs.teacher, inputs.weights
    return results(span_pair_loss(*states, inputs.spans, method=method, backend=backend), [inputs.student])


def _dense(inputs: Inputs, mode: str) -> Tensors:
    """Cosine matrices of all spans of the batch, masked to the pairs of a row."""
    unit_s, unit_t = F.normalize(inputs.student, dim=-1), F.normalize(inputs.teacher, dim=-1)
    rows = inputs.spans.span_rows
    pairs = inputs.weights[:, None] * inputs.weights * (rows[:, None] == rows)
    pairs.fill_diagonal_(0)
    return results((pairs * (unit_s @ unit_s.T - unit_t @ unit_t.T) ** 2).sum() / pairs.sum(), [inputs.student])


def _work(inputs: Inputs, mode: str) -> Work:
    counts, dims = inputs.spans.host[:, 0].diff().tolist(), (inputs.student.shape[1], inputs.teacher.shape[1])
    return Work(flops=pair_flops(counts, *dims))


OP = Op("span_pairs", (BOTH,), _make, run, {"dense masked cosines": _dense}, _work)
