"""int8 in groups of 32 features, one float16 scale a group: 1.06 bytes a feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # features
LARGEST = 127


def quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [n, d] and scales float16 [n, ceil(d / 32)]; the last group may be short.

    A group's scale is its largest magnitude / 127, rounded to float16 before the codes are taken; what is too small for
    float16 (7e-6) becomes 0. NaN and infinity, and magnitudes beyond 8e6, give a scale that is not finite.

    Args:
        states: [n, d] of any floating dtype.
    """
    grouped = _grouped(states.float())
    scales = (grouped.abs().amax(-1) / LARGEST).half()
    codes = (grouped / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    codes = codes.clamp(-LARGEST, LARGEST).nan_to_num().to(torch.int8)
    return codes.flatten(1)[:, : states.shape[1]].contiguous(), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The states [n, d] in float32."""
    return (_grouped(codes.float()) * scales.float()[..., None]).flatten(1)[:, : codes.shape[1]]


def _grouped(values: Tensor) -> Tensor:
    """[n, groups, 32], the last group filled with 0."""
    missing = -values.shape[1] % GROUP
    return (F.pad(values, (0, missing)) if missing else values).unflatten(1, (-1, GROUP))
