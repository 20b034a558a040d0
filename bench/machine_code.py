"""Compiles variants of the kernels and reads registers, spills and instructions from the machine code.

The disassembler comes with Triton. No GPU is needed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

from bench.targets import TARGETS, gpu, occupancy
from bench.variants import Variant


@dataclass(frozen=True)
class Code:
    """What a compiler made of a variant.

    Attributes:
        error: why it made nothing.
        registers: of a thread (NVIDIA) or lane (AMD: vector registers).
        spilled: bytes of a thread's stack (NVIDIA), or of a lane's scratch memory if it is read or written (AMD).
        shared: bytes of shared memory of a program.
        products: dtypes and precision of the ``tl.dot`` in it, such as "f32 tf32x3".
        matrix: how often each tensor-core instruction occurs in its PTX or AMD assembly.
        load: bytes of the widest load from global memory.
        programs: how many fit on an SM or CU (``occupancy``).
    """

    error: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    products: tuple[str, ...] = ()
    matrix: dict[str, int] = field(default_factory=dict)
    load: int = 0
    programs: int = 0


def compile_all(found: Sequence[Variant]) -> list[Code]:
    """Compile in as many processes as there are processors; a crash of the compiler fails its own variant only."""
    context = multiprocessing.get_context("spawn")  # LLVM and torch hold threads, which do not survive a fork
    done: dict[int, Code] = {}
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        futures = [pool.submit(compile_variant, variant) for variant in found]
        for i, future in enumerate(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                done[i] = future.result()
    for i in range(len(found)):  # a process died: which variant killed it?
        if i not in done:
            with ProcessPoolExecutor(1, context) as pool:
                future = pool.submit(compile_variant, found[i])
                died = isinstance(future.exception(), BrokenProcessPool)
                done[i] = Code(error="the compiler's process died") if died else future.result()
    return [done[i] for i in range(len(found))]


def compile_variant(variant: Variant) -> Code:
    """Compile one variant, or say why it can't be."""
    import triton
    from triton.compiler import ASTSource

    module, function, signature, constants, attributes = variant.source
    kernel = getattr(importlib.import_module(module), function)
    target = TARGETS[variant.target]
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=gpu(variant.target), options=variant.settings)
    except Exception as error:  # whatever a compiler raises is what the report is about
        return Code(error=f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
    code = (_amd_code if target.backend == "hip" else _nvidia_code)(compiled)
    made = replace(code, shared=compiled.metadata.shared, products=_products(compiled.asm["ttir"]))
    columns = getattr(compiled.metadata, "tmem_size", 0)
    return replace(made, programs=occupancy(target, variant.num_warps, made.registers, made.shared, columns))


def _products(ttir: str) -> tuple[str, ...]:
    dots = re.findall(r"tt\.dot (?:.*?inputPrecision = (\w+))?.*? : tensor<[\dx]+x(\w+)> \*", ttir)
    return tuple(sorted({f"{dtype} {precision or 'ieee'}" if dtype == "f32" else dtype for precision, dtype in dots}))


def _nvidia_code(compiled: Any) -> Code:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    loads = [modifiers.split(".") for modifiers in re.findall(r"\b(?:LDG|LDGSTS)\.E([.\w]*)", text)]
    widths = [next((sizes[word] for word in words if word in sizes), 4) for words in loads]
    return Code(
        registers=usage["REG"],
        spilled=usage["STACK"],
        matrix=_nvidia_matrix(compiled.asm["ptx"]),
        load=max(widths, default=0),
    )


def _nvidia_matrix(ptx: str) -> dict[str, int]:
    """Such as {"wgmma.mma_async m64n128k16 bf16": 4}: the instruction, its shape, and the dtype of its factors."""
    found = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)([.:\w]*)", ptx)
    wanted = re.compile(r"m\d+n\d+k\d+|bf16|f16|tf32|f64|kind::\w+")
    return dict(
        Counter(
            " ".join([name, *dict.fromkeys(word for word in rest.split(".") if wanted.fullmatch(word))])
            for name, rest in found
        )
    )


def _amd_code(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]
    names = ("vgpr_count", "private_segment_fixed_size")
    usage = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names}  # type: ignore[index]
    sizes = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    loads = re.findall(r"\b(?:global|buffer)_load_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", text)
    return Code(
        registers=usage["vgpr_count"],
        spilled=usage["private_segment_fixed_size"] if re.search(r"\bscratch_(load|store)", text) else 0,
        matrix=dict(Counter(re.findall(r"\bv_s?mfma_\w+", text))),
        load=max((sizes[load] for load in loads), default=0),
    )
