"""The GPUs that kernels are compiled for, their limits, and how many programs of a kernel fit on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEDULERS = 4  # of an SM (NVIDIA) or CU (AMD)
REGISTERS = 512  # of each lane of a scheduler: NVIDIA 16,384 for 32 lanes; AMD vector registers, AGPRs included
REGISTER_UNIT = 8  # registers of a lane that are given at a time: NVIDIA 256 for 32 lanes
TENSOR_MEMORY = 512  # columns of an SM, of which a program with tcgen05.mma takes some


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    backend: str  # of Triton's GPUTarget, as arch and lanes
    arch: int | str
    lanes: int  # of a warp (NVIDIA) or wave (AMD)
    shared: int  # bytes of shared memory (AMD: LDS) that a program may have
    shared_total: int  # bytes that an SM or CU has
    shared_reserved: int  # bytes that the system takes of each program
    shared_unit: int  # bytes that are given at a time
    warps: int  # or waves that a scheduler holds
    programs: int  # CTAs (AMD: workgroups) that an SM or CU holds
    source: str  # where the limits are from


_CUDA = "CUDA C++ Programming Guide, table of technical specifications per compute capability"
_CDNA3 = "AMD Instinct MI300 (CDNA3) ISA reference guide; LLVM's AMDGPU user guide for waves and workgroups"
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 1024, 128, 16, 32, _CUDA),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 228 << 10, 1024, 128, 16, 32, _CUDA),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 228 << 10, 1024, 128, 16, 32, _CUDA),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 0, 512, 8, 16, _CDNA3),
}


def occupancy(target: Target, num_warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many programs an SM or CU holds at once, by registers, warps, shared memory and tensor memory."""
    warps = min(target.warps, REGISTERS // _round_up(max(registers, 1), REGISTER_UNIT))
    limits = [target.programs, SCHEDULERS * warps // num_warps]
    taken = _round_up(shared + target.shared_reserved, target.shared_unit)
    if taken:
        limits.append(target.shared_total // taken)
    if tensor_memory:
        limits.append(TENSOR_MEMORY // tensor_memory)
    return min(limits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    made = TARGETS[target]
    return GPUTarget(made.backend, made.arch, made.lanes)
