"""How far a result may be from float64: the contract of the ops, for tests and for a GPU day."""

from __future__ import annotations

import torch
from torch import Tensor

# What rounding alone may cost where the eager result happens to be exact
FLOOR = {torch.float64: 1e-15, torch.float32: 3e-7}


# A tensor core cuts off what does not fit a sum of 16 products, always towards 0: the error grows with the width
CUT_OFF = 2.0**-30


def error_and_bound(
    ours: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0, width: int = 0
) -> tuple[float, float]:
    """Error against float64, and twice that of plain PyTorch in the same dtype plus rounding.

    Args:
        terms: the size of what a result is the sum of, where these cancel.
        width: of the products that tensor cores sum, where they are what the result depends on.
    """
    compute = torch.float64 if ours.dtype == torch.float64 else torch.float32
    rounding = FLOOR[compute] if ours.dtype == compute else torch.finfo(ours.dtype).eps
    if ours.is_cuda and compute == torch.float32:
        rounding = max(rounding, CUT_OFF * width)
    error, allowed = ((x.double() - exact.double()).norm().item() for x in (ours, eager))
    return error, 2 * allowed + rounding * (exact.double().norm().item() + terms)
