"""How far a backend may be from the float64 reference."""

from __future__ import annotations

from torch import Tensor

from bench.accuracy import error_and_bound


def check(ours: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0, width: int = 0) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus rounding.

    Args:
        terms: the size of what a result is the sum of, where these cancel.
        width: of the products that tensor cores sum, where they are what the result depends on.
    """
    assert ours.shape == exact.shape
    error, bound = error_and_bound(ours, eager, exact, terms, width)
    assert error <= bound, f"{error:.2e} against {bound:.2e}"
