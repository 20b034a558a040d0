"""Entropy weights: how certain the teacher is of each next token."""

from __future__ import annotations

import torch
from torch import Tensor

from mta_fast import contract, reference
from mta_fast.layout import compute_dtype
from mta_fast.ops._common import check_float
from mta_fast.ops._operator import fake, operator


def entropy_weights(logits: Tensor) -> Tensor:
    """e_j = 1 - H(softmax(logits_j)) / ln V with H = -sum p log(p + 1e-8): 1 certain, 0 uniform. Detached.

    From the authors' public code; they replace the importances in Hid and DSA with ``weighting="entropy"``. A
    bounded number of logits is turned to float32 at a time.

    Args:
        logits: [B, S, V] (or [T, V]) teacher logits, V >= 2; any floating dtype.

    Returns:
        [B, S] (or [T]): float64 for float64 logits, else float32.

    Raises:
        InputError: shape or dtype.
    """
    check_float("logits", logits, (2, 3))
    return _entropy_weights(logits.detach())


@operator("entropy_weights")
def _entropy_weights(logits: Tensor) -> Tensor:
    contract.entropy_weights(logits)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        return reference.entropy_weights(logits)


@fake(_entropy_weights)
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits))
