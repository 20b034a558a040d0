"""What a benchmark of a single op consists of. bench/ops/NAME.py holds each op's, under the op's file name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Call, Tensors
from bench.workload import STUDENT_DIM, TEACHER_DIM

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Shape:
    """Rows, tokens a row and widths of one call."""

    batch: int
    seq_len: int
    dims: tuple[int, int] = (STUDENT_DIM, TEACHER_DIM)

    @property
    def name(self) -> str:
        return f"B={self.batch} S={self.seq_len}"


SHAPES = (Shape(16, 256), Shape(1, 2048))


@dataclass(frozen=True)
class Work:
    """What a call can't do without: products, or bytes where it only moves them."""

    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True, eq=False)
class Op:
    """One op's benchmark."""

    name: str  # the op's file name
    modes: Sequence[str]  # of ``FORWARD`` and ``BOTH``
    make: Callable[[Shape], Any]  # inputs of a shape
    run: Callable[[Any, str, str], Tensors]  # (inputs, backend, mode) -> result and, with a backward pass, gradients
    peers: Mapping[str, Callable[[Any, str], Tensors]]  # other ways to the same, by name: (inputs, mode)
    work: Callable[[Any, str], Work]  # (inputs, mode) -> the floor

    def side(self, inputs: Any, name: str, mode: str) -> Call:
        """The call of a peer or a backend."""
        if name in self.peers:
            return partial(self.peers[name], inputs, mode)
        return partial(self.run, inputs, name, mode)


def results(loss: Any, learnt: Sequence[Tensor]) -> Tensors:
    """A loss and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, learnt)]
