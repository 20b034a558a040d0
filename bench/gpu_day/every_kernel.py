"""Every kernel once, at small sizes, for compute-sanitizer: ``python -m bench.gpu_day.every_kernel DEVICE``."""

from __future__ import annotations

import sys

import torch

from bench.workload import loss_and_gradients, standard_workload
from mta_fast import linear_divergence_loss
from mta_fast.kernels._launch import observe


def run(device: str, long: int = 300) -> list[str]:
    """The names of the kernels that ran.

    Args:
        long: tokens of the rows that take importance's two passes.
    """
    names: dict[str, None] = {}
    with observe(lambda launch: names.setdefault(launch.name)):
        for seq_len in (20, long):  # of whose spans the first take all pairs, the others the Gram form
            workload = standard_workload(1, seq_len, (16, 32), 1, device=device)
            workload = workload.to(device, torch.bfloat16).with_backend("triton")
            loss_and_gradients(workload, workload.loss)
        sides = [torch.randn(size, device=device) for size in ((5, 16), (33, 16), (5, 24), (33, 24))]
        for learnt in sides[:2]:
            learnt.requires_grad_()
        linear_divergence_loss(*sides, backend="triton").backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return list(names)


if __name__ == "__main__":
    print("kernels:", *run(sys.argv[1]))
