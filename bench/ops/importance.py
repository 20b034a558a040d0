"""Token importance of the teacher's states; it has no backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.floor import importance_flops
from bench.harness import Tensors
from bench.ops.cases import FORWARD, Op, Shape, Work
from mta_fast import token_importance


def _make(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.batch, shape.seq_len, shape.dims[1], generator=generator)


def _run(hidden: Tensor, backend: str, mode: str) -> Tensors:
    return [token_importance(hidden, backend=backend)]


def _attention_map(hidden: Tensor, mode: str) -> Tensors:
    """softmax(z z^T).mean with the whole [B, S, S] map."""
    z = hidden / (hidden.std(-1, keepdim=True) + 1e-5)
    scores = z @ z.transpose(1, 2) / hidden.shape[-1] ** 0.5
    scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return [scores.softmax(-1).mean(1)]


def _work(hidden: Tensor, mode: str) -> Work:
    batch, seq_len, width = hidden.shape
    return Work(flops=importance_flops([seq_len] * batch, width))


OP = Op("importance", (FORWARD,), _make, _run, {"softmax(zz^T).mean": _attention_map}, _work)
