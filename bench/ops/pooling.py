"""Pooling of the student's states over two-token spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Tensors
from bench.ops.cases import BOTH, FORWARD, Op, Shape, Work
from bench.workload import standard_spans
from mta_fast import SpanBatch, pool_spans
from mta_fast.ops.pooling import normalize_weights
from mta_fast.reference import span_incidences


@dataclass(frozen=True)
class Inputs:
    """What a call reads, and the gradient that arrives in the backward pass."""

    hidden: Tensor  # [B, S, d]
    weights: Tensor  # [B, S]
    spans: SpanBatch
    arriving: Tensor  # [N, d]


def _make(shape: Shape) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.batch, shape.seq_len, shape.dims[0], generator=generator, requires_grad=True)
    spans = standard_spans(shape.batch, shape.seq_len).spans["phrase"]
    values = torch.rand(shape.batch, shape.seq_len, generator=generator) + 0.1
    arriving = torch.randn(spans.num_spans, shape.dims[0], generator=generator)
    return Inputs(hidden, normalize_weights(values, spans, backend="reference").token, spans, arriving)


def _states(inputs: Inputs, mode: str) -> Tensor:
    """The states, without a graph where only the forward pass is timed."""
    return inputs.hidden if mode == BOTH else inputs.hidden.detach()


def _results(inputs: Inputs, pooled: Tensor, mode: str) -> Tensors:
    if mode == FORWARD:
        return [pooled]
    return [pooled.detach(), *torch.autograd.grad(pooled, inputs.hidden, inputs.arriving)]


def _run(inputs: Inputs, backend: str, mode: str) -> Tensors:
    pooled, _ = pool_spans(_states(inputs, mode), inputs.weights, inputs.spans, backend=backend)
    return _results(inputs, pooled, mode)


def _incidences(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and weights of all spans one after the other, and the spans' lengths."""
    tokens, lengths = span_incidences(inputs.spans.ranges, int(inputs.spans.host[-1, 1]))
    return tokens, inputs.weights.reshape(-1)[tokens], lengths


def _embedding_bag(inputs: Inputs, mode: str) -> Tensors:
    tokens, weights, lengths = _incidences(inputs)
    states, starts = _states(inputs, mode).flatten(0, 1), lengths.cumsum(0) - lengths
    sums = F.embedding_bag(tokens, states, starts, mode="sum", per_sample_weights=weights)
    return _results(inputs, sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None], mode)


def _segment_reduce(inputs: Inputs, mode: str) -> Tensors:
    tokens, weights, lengths = _incidences(inputs)
    states = _states(inputs, mode).flatten(0, 1)[tokens] * weights[:, None]
    total = torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]
    return _results(inputs, torch.segment_reduce(states, "sum", lengths=lengths) / total, mode)


def _membership(inputs: Inputs, mode: str) -> Tensors:
    """A product with [B, spans of a row, S], which every row here has as many of."""
    batch, seq_len, _ = inputs.hidden.shape
    counts = inputs.spans.num_spans // batch
    tokens, weights, lengths = _incidences(inputs)
    rows = torch.repeat_interleave(torch.arange(inputs.spans.num_spans), lengths)
    dense = torch.zeros(inputs.spans.num_spans, seq_len)
    dense[rows, tokens % seq_len] = weights
    dense = dense.reshape(batch, counts, seq_len)
    pooled = (dense @ _states(inputs, mode)) / dense.sum(2, keepdim=True)
    return _results(inputs, pooled.flatten(0, 1), mode)


def _work(inputs: Inputs, mode: str) -> Work:
    """Every input once, every output once: covered tokens and pooled spans; backward, their gradients."""
    width, spans = inputs.hidden.shape[-1], inputs.spans
    moved = len(spans.covered) + spans.num_spans
    if mode == BOTH:
        moved += spans.num_spans + inputs.weights.numel()
    return Work(bytes=4 * width * moved)


PEERS = {"embedding_bag": _embedding_bag, "segment_reduce": _segment_reduce, "dense membership": _membership}
OP = Op("pooling", (FORWARD, BOTH), _make, _run, PEERS, _work)
