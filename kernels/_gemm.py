"""The vendor's GEMMs: sums of halves that are kept in float32, and sizes that fit no vector of a load.

A GEMM whose columns or summed features are no multiple of a few elements runs several times as long (GPT-2's 50,257
ids: by kernels of the generation before last). What is left over is multiplied apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 8  # elements: 16 bytes of halves


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left [M, K] @ right [K, N] in ``dtype``: sums of half-precision products are not rounded to half precision.

    ``out``: [M, N] of ``dtype``, where it goes; its rows best start at multiples of ``ALIGNED``.
    """
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    columns, depth = (size // ALIGNED * ALIGNED for size in (right.shape[1], left.shape[1]))
    if 0 < columns < right.shape[1]:
        product(left, right[:, :columns], dtype, out[:, :columns])
        product(left, right[:, columns:], dtype, out[:, columns:])
    elif 0 < depth < left.shape[1]:
        product(left[:, :depth], right[:depth], dtype, out)
        add_product(out, left[:, depth:], right[depth:])
    elif left.dtype == dtype:
        torch.mm(left, right, out=out)
    elif _multiplies_into(left, dtype):
        torch.mm(left, right, out_dtype=dtype, out=out)
    else:
        torch.mm(left.to(dtype), right.to(dtype), out=out)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in the dtype of ``total``: by the GEMM itself."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _multiplies_into(left, total.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _multiplies_into(left: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a GEMM of these halves that leaves ``dtype``: only CUDA's does, into float32."""
    return dtype == torch.float32 and left.device.type != "cpu" and not torch.version.hip
