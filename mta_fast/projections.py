"""The projections of Hid, and where they start: nn.Linear's random numbers, the identity, or ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mta_fast.errors import InputError
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator, ridge_projection, ridge_sums

STARTS = ("default", "identity", "ridge")
RIDGE = 0.1  # r; bench/results/projections.md has it and others on held-out text


class Compared(NamedTuple):
    """What Hid compares: tokens that spans cover, or the spans themselves where there are two tokenizers."""

    student: Tensor  # [T, d_S]
    teacher: Tensor  # [T, d_T]
    tokens: Tensor  # [C] which of them


class Projection(nn.Linear):
    """P_l of Hid: student width to teacher width. ``forward`` runs the op, so that FSDP and ZeRO gather it."""

    def forward(  # type: ignore[override]  # the op needs the teacher's states beside the input
        self, student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor, backend: str
    ) -> Tensor:
        """sum_c g_c (1 - cos(P h^S + bias, h^T)) over the listed tokens; see ``hidden_alignment_numerator``."""
        return hidden_alignment_numerator(student, teacher, tokens, weights, self.weight, self.bias, backend=backend)

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Take ``weight`` [d_T, d_S], and a bias of 0."""
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.zero_()

    def start_at_identity(self) -> None:
        """Ones on the diagonal: the features that both have, in their order, are copied; further ones get 0."""
        self.start_at(torch.eye(self.out_features, self.in_features, dtype=self.weight.dtype))


class RidgeFit:
    """Sums over batches, and the projections that ridge regression makes of them.

    Args:
        projections: one a layer pair.

    Raises:
        InputError: no projections.
    """

    def __init__(self, projections: Iterable[Projection]) -> None:
        self._projections = list(projections)
        if not self._projections:
            raise InputError("lambda_hid: expected a number > 0, as only Hid has projections, got 0")
        self._sums = [
            tuple(
                torch.zeros(p.in_features, width, dtype=torch.float64, device=p.weight.device)
                for width in (p.in_features, p.out_features)
            )
            for p in self._projections
        ]

    def add(self, layer_pair: int, compared: Compared, weights: Tensor) -> None:
        """What Hid compares in a batch at a layer pair, and its weights [C]."""
        for total, own in zip(self._sums[layer_pair], ridge_sums(*compared, weights), strict=True):
            total.add_(own)

    def finish(self, strength: float, reduce: Callable[[Tensor], Tensor] = lambda own: own) -> None:
        """Start every projection at its solution. More may be added afterwards, and this called again.

        Args:
            strength: r of ``ridge_projection``; reduce: sums a tensor over the ranks.

        Raises:
            InputError: a layer pair without states to fit, or with some that are NaN or infinite.
        """
        made = []
        for i, sums in enumerate(self._sums):
            gram, cross = (reduce(each) for each in sums)
            if not (gram.isfinite().all() and cross.isfinite().all()):
                raise InputError(
                    f"fit_projections: expected finite hidden states, got NaN or infinite ones at layer pair {i} of "
                    f"{len(self._sums)}; leave out the batch that has them"
                )
            if not gram.trace() > 0:
                raise InputError(
                    f"fit_projections: expected tokens that spans cover, with states other than 0, got none for layer "
                    f"pair {i} of {len(self._sums)}; give more rows (projection_init_rows), or rows with spans"
                )
            made.append(ridge_projection(gram, cross, strength))
        for projection, weight in zip(self._projections, made, strict=True):
            projection.start_at(weight)


def check_strength(name: str, strength: float) -> None:
    """Refuse an r that is not a finite number above 0; below 1e-9 float64 would not tell it from none."""
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 1e-9 <= strength < float("inf"):
        raise InputError(f"{name}: expected a finite number >= 1e-9, got {strength!r}")
