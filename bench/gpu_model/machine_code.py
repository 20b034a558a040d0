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

from bench.gpu_model.targets import TARGETS, gpu, occupancy
from bench.gpu_model.variants import Variant
from mta_fast.cli import load_bench


@dataclass(frozen=True)
class Code:
    """What a compiler made of a variant."""

    error: str = ""  # why it made nothing
    registers: int = 0  # of a thread (NVIDIA) or lane (AMD: vector registers)
    spilled: int = 0  # bytes of a thread's stack, or of a lane's scratch memory if it is read or written (AMD)
    shared: int = 0  # bytes of shared memory of a program
    products: tuple[str, ...] = ()  # dtypes and precision of the ``tl.dot`` in it, such as "f32 tf32x3"
    matrix: dict[str, int] = field(default_factory=dict)  # tensor-core instructions in the PTX or assembly
    load: int = 0  # bytes of the widest load from global memory
    programs: int = 0  # how many fit on an SM or CU (``occupancy``)


def compile_all(found: Sequence[Variant]) -> list[Code]:
    """Compile in as many processes as there are processors; a crash of the compiler fails its own variant only."""
    context = multiprocessing.get_context("spawn")  # LLVM and torch hold threads, which do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), context, load_bench) as pool:
        futures = [pool.submit(compile_variant, variant) for variant in found]
    crashed = [isinstance(future.exception(), BrokenProcessPool) for future in futures]
    return [  # which of them killed it?
        _compile_alone(variant, context) if again else future.result()
        for variant, future, again in zip(found, futures, crashed, strict=True)
    ]


def _compile_alone(variant: Variant, context: Any) -> Code:
    with ProcessPoolExecutor(1, context, load_bench) as pool:
        try:
            return pool.submit(compile_variant, variant).result()
        except BrokenProcessPool:
            return Code(error="the compiler's process died")


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
    dots = re.findall(r"tt\.dot (?:.*?inputPrecision = (\w+))?.*? : tensor<[\dx]+x(\w+)> \*", compiled.asm["ttir"])
    products = {f"{dtype} {precision or 'ieee'}" if dtype == "f32" else dtype for precision, dtype in dots}
    made = replace(code, shared=compiled.metadata.shared, products=tuple(sorted(products)))
    columns = getattr(compiled.metadata, "tmem_size", 0)
    return replace(made, programs=occupancy(target, variant.num_warps, made.registers, made.shared, columns))


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
    # such as "wgmma.mma_async m64n128k16 bf16": the instruction, its shape, and the dtype of its factors
    found = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)([.:\w]*)", compiled.asm["ptx"])
    wanted = re.compile(r"m\d+n\d+k\d+|bf16|f16|tf32|f64|kind::\w+")
    products = [" ".join([name, *dict.fromkeys(filter(wanted.fullmatch, rest.split(".")))]) for name, rest in found]
    return Code("", usage["REG"], usage["STACK"], matrix=dict(Counter(products)), load=max(widths, default=0))


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
