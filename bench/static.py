"""What the compilers make of the Triton kernels, without a GPU: ``mta-fast bench static``.

A forward and a backward pass on tensors without data records every launch; each distinct variant (kernel, dtypes,
constants, launch parameters) is then compiled for each target. Registers, spills and instructions are read from the
machine code, with the disassemblers that come with Triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mta_fast import MTAConfig, MTALoss, SpanBatch
from mta_fast.kernels import _launch
from mta_fast.kernels._launch import Launch, observe


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. Limits from the vendors' architecture manuals.

    Attributes:
        shared_memory: bytes a program may have (CUDA programming guide, table of technical specifications; CDNA3 ISA).
        registers: 32-bit registers of a multiprocessor; None: not counted by threads (AMD).
        threads: threads a multiprocessor holds.
        programs: programs (CTAs) a multiprocessor holds.
        shared_total: bytes of shared memory of a multiprocessor, of which each program reserves ``shared_reserved``.
        matrix_instruction: pattern of a tensor-core instruction in the machine code or PTX.
    """

    gpu: GPUTarget
    shared_memory: int
    shared_total: int
    shared_reserved: int
    threads: int
    programs: int
    matrix_instruction: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, 167_936, 1024, 2048, 32, r"\b(mma\.sync)"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, 233_472, 1024, 2048, 32, r"\b(wgmma|mma\.sync)"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, 233_472, 1024, 2048, 32, r"\b(tcgen05|mma\.sync)"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, 65_536, 0, 2048, 16, r"\b(v_s?mfma)"),
}
