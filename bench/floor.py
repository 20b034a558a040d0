"""The time a machine can't go below: products of the formulas at the best rate of its matrix multiplication.

Per layer pair (design: one importance a pair, the teacher's): importance 2 S^2 d_T a row; DSA the fewer of
2 N^2 (2 d_S + d_T) and 2 N (2 d_S^2 + 2 d_S d_T + d_T^2) a row; Hid 6 T d_S d_T, T distinct covered tokens. Forward
and backward together. Not counted: anything that reads memory or takes an exponential.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch

from bench.harness import seconds
from mta_fast import MTALoss
from mta_fast.spans.batch import SpanBatch

# rows, inner, columns: squares, and a projection of Hid
SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (3072, 768, 1600))
TRIES = 2  # of each size in a round


def importance_flops(lengths: Sequence[int], width: int) -> int:
    """Of rows of these lengths."""
    return sum(2 * n * n * width for n in lengths)


def pair_flops(counts: Sequence[int], student_dim: int, teacher_dim: int, method: str = "best") -> int:
    """Of rows with these numbers of spans, forward and backward; "best": the method with fewer products per row."""
    pairwise = [2 * n * n * (2 * student_dim + teacher_dim) for n in counts]
    gram = [2 * n * (2 * student_dim**2 + 2 * student_dim * teacher_dim + teacher_dim**2) for n in counts]
    chosen = {"pairwise": pairwise, "gram": gram, "best": [min(two) for two in zip(pairwise, gram, strict=True)]}
    return sum(chosen[method])


def hid_flops(tokens: int, student_dim: int, teacher_dim: int) -> int:
    """Of so many distinct covered tokens, forward and backward."""
    return 6 * tokens * student_dim * teacher_dim


def head_flops(ids: int, student_dim: int, positions: int, teacher_dim: int) -> int:
    """Of a base loss through both LM heads: their logits, and the student's two gradients."""
    return 2 * positions * ids * (student_dim + teacher_dim) + 4 * positions * ids * student_dim


def loss_flops(loss: MTALoss, spans: dict[str, SpanBatch]) -> int:
    """Of one call of ``loss``, forward and backward."""
    total = 0
    for i, kind in enumerate(loss.config.granularity):
        batch, (student_dim, teacher_dim) = spans[kind], (loss.student_dims[i], loss.teacher_dims[i])
        total += importance_flops(batch.rows.host[:, 1].tolist(), teacher_dim)
        total += pair_flops(batch.host[:, 0].diff().tolist(), student_dim, teacher_dim)
        if loss.config.lambda_hid > 0:
            total += hid_flops(len(batch.covered), student_dim, teacher_dim)
    return total


SYMMETRY = 0.5  # the products that tell the same twice, of which a kernel may leave out one half


def check_floor(what: str, ratios: Sequence[float]) -> None:
    """End the run where a side takes less time than its products can: then the benchmark is wrong.

    Args:
        ratios: time / floor of each round.
    """
    least = statistics.median(ratios)
    if least < SYMMETRY:
        sys.exit(f"bench: {what}: expected at least {SYMMETRY:g} of the floor, got {least:.2f}: the benchmark is wrong")


class Rate:
    """A side of ``alternate`` that measures the machine: each call adds the best rate of a few tries to ``rates``."""

    keeps_its_own = True

    def __init__(self) -> None:
        self.rates: list[float] = []

    def last(self, rounds: int) -> list[float]:
        """The rates of the last rounds; those of the warm-up lie before."""
        return self.rates[-rounds:]


class GemmRate(Rate):
    """Operations a second of torch.mm, float32, at the best of several sizes."""

    def __init__(self, sizes: Sequence[tuple[int, int, int]] = SIZES) -> None:
        super().__init__()
        self._products = [(torch.randn(n, k), torch.randn(k, m), torch.empty(n, m)) for n, k, m in sizes]

    def __call__(self) -> None:
        best = 0.0
        for left, right, out in self._products:
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            fastest = min(seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c)) for _ in range(TRIES))
            best = max(best, flops / fastest)
        self.rates.append(best)


class CopyRate(Rate):
    """Bytes read and written a second by a copy that no cache holds."""

    def __init__(self, megabytes: int = 256) -> None:
        super().__init__()
        self._from = torch.ones(megabytes * 2**18)
        self._to = torch.empty_like(self._from)

    def __call__(self) -> None:
        fastest = min(seconds(self._to.copy_, self._from) for _ in range(TRIES))
        self.rates.append(2 * 4 * self._from.numel() / fastest)
