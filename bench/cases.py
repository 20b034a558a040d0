"""What a benchmark of a single op consists of. bench/NAME.py holds each op's, under the op's file name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bench.harness import Call
from bench.workload import STUDENT_DIM, TEACHER_DIM

Tensors = Sequence[Tensor]


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
    """One op's benchmark.

    Attributes:
        name: the op's file name.
        modes: "forward", "forward + backward".
        make: inputs of a shape.
        run: (inputs, backend, mode) -> result and, with a backward pass, gradients.
        peers: other ways to the same tensors, by name: (inputs, mode) -> the same as ``run``.
        work: (inputs, mode) -> the floor.
    """

    name: str
    modes: Sequence[str]
    make: Callable[[Shape], Any]
    run: Callable[[Any, str, str], Tensors]
    peers: Mapping[str, Callable[[Any, str], Tensors]]
    work: Callable[[Any, str], Work]

    def side(self, inputs: Any, name: str, mode: str) -> Call:
        """The call of a peer or a backend."""
        if name in self.peers:
            return partial(self.peers[name], inputs, mode)
        return partial(self.run, inputs, name, mode)


FORWARD, BOTH = "forward", "forward + backward"
