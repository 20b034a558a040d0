"""What Triton's compilers make of every kernel, without a GPU: ``mta-fast bench static``.

Every op is called on tensors without data. The launches are recorded, not run, and each distinct one (kernel, dtypes,
constants, divisibility, launch parameters) is compiled for each target, specialised by Triton's own JIT code.
Registers, spills and loads are read from the machine code, with the disassembler that comes with Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mta_fast import __version__, backends
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.reference import Spans, compute_dtype

if TYPE_CHECKING:
    from mta_fast.kernels._launch import Launch

# --- targets -----------------------------------------------------------------------------------------------------

SCHEDULERS = 4  # of an SM (NVIDIA) or CU (AMD)
REGISTERS = 512  # of each lane of a scheduler: NVIDIA 16,384 for 32 lanes; AMD vector registers, AGPRs included
REGISTER_UNIT = 8  # registers of a lane that are given at a time: NVIDIA 256 for 32 lanes
TENSOR_MEMORY = 512  # columns of an SM, of which a program with tcgen05.mma takes some


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend, arch, lanes: Triton's GPUTarget; lanes of a warp (NVIDIA) or wave (AMD).
        shared: bytes of shared memory (AMD: LDS) that a program may have.
        shared_total: bytes that an SM or CU has.
        shared_reserved: bytes that the system takes of each program.
        shared_unit: bytes that are given at a time.
        warps: warps or waves that a scheduler holds.
        programs: programs (NVIDIA: CTAs, AMD: workgroups) that an SM or CU holds.
        source: where the limits are from.
    """

    backend: str
    arch: int | str
    lanes: int
    shared: int
    shared_total: int
    shared_reserved: int
    shared_unit: int
    warps: int
    programs: int
    source: str


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


# --- variants ----------------------------------------------------------------------------------------------------

LENGTHS = (256, 4096)  # tokens of a row that takes one pass, and of one that takes two
SPANS = (1000, 5000)  # of a row in pairwise form, and of one in Gram form
WIDTHS, ODD_WIDTHS = (768, 1600), (577, 1601)  # student and teacher; the odd ones allow no 16-byte loads
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Variant:
    """A kernel as the JIT compiles it for one launch. Plain values only: it goes to another process.

    Attributes:
        target: key of TARGETS.
        kernel: row name in kernels/_table.py.
        place: where in that file its row stands.
        called: (dtype, float32 matmul precision) of the ops' calls that launch it; student/teacher if they differ.
        options: what else makes it another variant.
        blocks, num_warps, num_stages: the row.
        source: (module, function, signature, constants, attributes), of which Triton makes the program.
        settings: Triton's compile options.
    """

    target: str
    kernel: str
    place: str
    called: tuple[tuple[str, str], ...]
    options: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    source: tuple[str, str, dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)


def variants(target: str) -> list[Variant]:
    """Every distinct variant that the calls of ``_calls`` launch on a target."""
    from mta_fast.kernels._launch import observe

    found: dict[str, Variant] = {}
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, precision, call in _calls():
            torch.set_float32_matmul_precision(precision)
            launches: list[Launch] = []
            with observe(launches.append, execute=False, architecture=target), torch.no_grad():
                call()
            for launch in launches:
                made = _variant(launch, target)
                key = str((made.source, made.settings))
                called = (*found.get(key, made).called, (dtype, precision))
                found[key] = replace(made, called=tuple(dict.fromkeys(called)))
    finally:
        torch.set_float32_matmul_precision(before)
    kernels = list(dict.fromkeys(variant.kernel for variant in found.values()))
    return sorted(found.values(), key=lambda variant: kernels.index(variant.kernel))


def _variant(launch: Launch, target: str) -> Variant:
    """A launch specialised as ``JITFunction.run`` would: divisors of 16, ones, 64-bit numbers, do_not_specialize."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_gpu(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, launch.options
    )
    odd = any(name.endswith("width") and not attributes.get((i,)) for i, name in enumerate(signature))
    words = {"CAUSAL": "causal", "COUNT_PADDING": "count_padding", "WITH_GRADIENT": "gradient"}
    options = [word for name, word in words.items() if launch.arguments.get(name)]
    return Variant(
        target,
        launch.name,
        launch.place,
        called=(),
        options=", ".join([*options, *(["odd width"] if odd else [])]),
        blocks={name: launch.arguments[name] for name in launch.row.blocks if name in launch.arguments},
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        source=(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes),
        settings=launch.options,
    )


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    made = TARGETS[target]
    return GPUTarget(made.backend, made.arch, made.lanes)


# --- the calls whose launches are compiled -----------------------------------------------------------------------


def _calls() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(dtype, float32 matmul precision, call) of every op in every dtype.

    Only in bfloat16: options of the importance, odd widths of everything but span pairs. Span pairs see float32
    whatever the hidden states are, unless somebody pools in half precision: their odd widths are float32. Products of
    two halves don't depend on the matmul precision; the gradient of span pairs multiplies float32 in any case.
    """
    half, single = torch.bfloat16, torch.float32
    for name, dtype in DTYPES.items():
        for precision in ("highest", "high") if dtype == single else ("highest",):
            yield name, precision, partial(_importance, dtype)
            yield name, precision, partial(_pooling, dtype)
            yield name, precision, partial(_pairs, dtype, dtype, False)
            yield name, precision, partial(_alignment, dtype, dtype)
        for precision in ("highest",) if dtype == torch.float64 else ("highest", "high"):
            yield name, precision, partial(_pairs, dtype, dtype, True)
    for causal, count_padding in ((True, False), (False, True), (True, True)):
        yield "bfloat16", "highest", partial(_importance, half, causal=causal, count_padding=count_padding)
    yield "bfloat16", "highest", partial(_importance, half, width=ODD_WIDTHS[1])
    yield "bfloat16", "highest", partial(_pooling, half, width=ODD_WIDTHS[0])
    yield "bfloat16", "highest", partial(_alignment, half, half, widths=ODD_WIDTHS)
    yield "bfloat16/float32", "highest", partial(_alignment, half, single)
    for with_gradient in (False, True):
        yield "float32", "highest", partial(_pairs, single, single, with_gradient, ODD_WIDTHS)
        yield "bfloat16/float32", "highest", partial(_pairs, half, single, with_gradient)


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _spans() -> Spans:
    """Spans of two rows: one in pairwise form, one in Gram form."""
    count, covered = sum(SPANS), 3000
    return Spans(
        ranges=_empty(count, 2),
        span_rows=_empty(count),
        span_splits=_empty(3),
        covered=_empty(covered),
        covered_rows=_empty(covered),
        covered_splits=_empty(3),
        cover_splits=_empty(covered + 1),
        cover_spans=_empty(count),
        token_splits=_empty(sum(LENGTHS) + 1),
        host=torch.tensor([[0, 0], [SPANS[0], SPANS[0]], [count, count]], dtype=torch.int32),
    )


def _importance(dtype: torch.dtype, width: int = WIDTHS[1], causal: bool = False, count_padding: bool = False) -> None:
    from mta_fast.kernels import token_importance

    for length in LENGTHS:
        rows = torch.tensor([[0, length]], dtype=torch.int32)
        token_importance(_empty(length, width, dtype=dtype), rows.to("meta"), rows, length, causal, count_padding)


def _pooling(dtype: torch.dtype, width: int = WIDTHS[0]) -> None:
    from mta_fast.kernels import pool_spans, pool_spans_gradient, span_weights

    spans, tokens = _spans(), sum(LENGTHS)
    rows = torch.tensor([[0, LENGTHS[0]], LENGTHS], dtype=torch.int32)
    weights, _, _ = span_weights(_empty(tokens, dtype=dtype), spans)
    pooled, span_weight, _ = pool_spans(_empty(tokens, width, dtype=dtype), weights, spans, rows.to("meta"), rows)
    pool_spans_gradient(pooled, span_weight, weights, spans, dtype)


def _pairs(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, gradient: bool, widths: tuple[int, int] = WIDTHS
) -> None:
    from mta_fast.kernels import span_pairs

    spans, count = _spans(), sum(SPANS)
    student, teacher = _empty(count, widths[0], dtype=student_dtype), _empty(count, widths[1], dtype=teacher_dtype)
    weights = _empty(count, dtype=compute_dtype(student, teacher))
    method = "pairwise" if student.element_size() == 2 else "auto"  # the Gram form turns halves to float32 beforehand
    span_pairs(student, teacher, weights, weights, weights, spans.span_splits, spans.host, method, gradient)


def _alignment(student_dtype: torch.dtype, teacher_dtype: torch.dtype, widths: tuple[int, int] = WIDTHS) -> None:
    from mta_fast.kernels import hidden_alignment

    spans, tokens = _spans(), sum(LENGTHS)
    student, teacher = _empty(tokens, widths[0], dtype=student_dtype), _empty(tokens, widths[1], dtype=teacher_dtype)
    weights = _empty(spans.covered.shape[0], dtype=compute_dtype(student, teacher))
    matrix, bias = _empty(widths[1], widths[0], dtype=student_dtype), _empty(widths[1], dtype=student_dtype)
    for gradient in (False, True):
        hidden_alignment(student, teacher, spans.covered, weights, matrix, bias, student_dtype, gradient)


# --- compiling and reading the machine code ----------------------------------------------------------------------


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
        compiled = triton.compile(source, target=_gpu(variant.target), options=variant.settings)
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


# --- the report --------------------------------------------------------------------------------------------------

# dtype of the factors, as tensor-core instructions name it (tcgen05 has one kind for both halves)
FACTORS = {"bf16": {"bf16", "kind::f16"}, "f16": {"f16", "kind::f16"}, "f32": {"tf32", "kind::tf32", "xf32", "f32"}}


def faults(code: Code, target: Target) -> list[str]:
    """Why a variant must not stay as it is, each with the mend; empty when it is fine."""
    if code.error:
        return [f"does not compile ({code.error})"]
    found = []
    if code.spilled:
        found.append(f"spills {code.spilled} bytes a thread: take smaller blocks or more warps")
    if code.shared > target.shared:
        found.append(
            f"needs {code.shared} bytes of shared memory where a program may have {target.shared}: take smaller blocks "
            f"or fewer stages"
        )
    used = {re.split("[ _]", name)[-1] for name in code.matrix}
    for product in code.products:
        exact = product == "f64" or (product == "f32 ieee" and target.backend == "cuda")  # not every GPU has them
        if not exact and not used & FACTORS[product.split()[0]]:
            found.append(f"its {product} products use no tensor cores: take blocks of at least 16 x 16 x 16")
    return found


def main(targets: list[str] | None, out: Path | None) -> int:
    """Compile every variant for the targets (None: all), print the report, and write OUT.json and OUT.md.

    Returns:
        1 if a variant does not compile, spills, does not fit the shared memory, or leaves tensor cores unused; else 0.

    Raises:
        InputError: an unknown target, or the kernels are interpreted.
        MissingPackageError: triton is not installed.
    """
    names = list(dict.fromkeys(targets or TARGETS))
    for name in names:
        if name not in TARGETS:
            raise InputError(f"--target: expected one of {', '.join(TARGETS)}, got {name!r}")
    if importlib.util.find_spec("triton") is None:
        raise MissingPackageError(
            "bench static: expected the package triton, got none; pip install '.[triton]' in the checkout"
        )
    if backends._interpreted():
        raise InputError(
            f"bench static: expected kernels to compile, got TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}, "
            f"with which they are interpreted; unset it and start again"
        )
    import triton

    found = [variant for name in names for variant in variants(name)]
    rows = [_row(variant, code) for variant, code in zip(found, compile_all(found), strict=True)]
    versions = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mta_fast": __version__,
    }
    report = {"versions": versions, "targets": {name: asdict(TARGETS[name]) for name in names}, "rows": rows}
    text = _markdown(report)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 1 if any(row["faults"] for row in rows) else 0


def _row(variant: Variant, code: Code) -> dict[str, Any]:
    row = asdict(variant) | asdict(code)
    del row["source"], row["settings"], row["called"]
    return row | {"dtype": _dtype(variant, code), "faults": faults(code, TARGETS[variant.target])}


def _dtype(variant: Variant, code: Code) -> str:
    """The dtypes a variant is launched for, with the float32 matmul precision if that makes it another one."""
    matters = code.error or any(product.startswith("f32") for product in code.products)
    labels = []
    for name in dict.fromkeys(name for name, _ in variant.called):
        precisions = [precision for dtype, precision in variant.called if dtype == name]
        labels.append(f"{name} {precisions[0]}" if matters and len(precisions) == 1 else name)
    return ", ".join(labels)


COLUMNS = (
    "kernel", "dtype", "options", "blocks", "warps", "stages", "registers", "spilled", "shared", "tensor cores", "load",
    "programs",
)  # fmt: skip


def _markdown(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"`mta-fast bench static`: {versions}.",
        "",
        "Compiled, not run: nothing here is measured. dtype: of the op's call (student/teacher if they differ), with",
        "torch's float32 matmul precision where it matters. Registers and spilled bytes: of a thread (AMD: a lane).",
        "Shared memory: bytes of a program. Tensor cores: instructions in the code. Load: bytes of the widest load of",
        "global memory. Programs: how many fit on an SM (AMD: workgroups on a CU) at once, computed from registers,",
        "warps, shared memory and tensor memory.",
        "",
        "| target | variants | most registers | most shared memory | most spilled | faults |",
        "|---|---|---|---|---|---|",
    ]
    by_target = {name: [row for row in report["rows"] if row["target"] == name] for name in report["targets"]}
    lines += [_summary(name, rows) for name, rows in by_target.items()]
    broken = [row for row in report["rows"] if row["faults"]]
    lines += ["", f"## Faults: {len(broken) or 'none'}", ""] + [_fault(row) for row in broken]
    for name, rows in by_target.items():
        lines += ["", f"## {name}", "", _limits(TARGETS[name]), ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(_line, rows)]
    return "\n".join(lines)


def _summary(target: str, rows: list[dict[str, Any]]) -> str:
    worst = {key: max(rows, key=lambda row: row[key]) for key in ("registers", "shared", "spilled")}
    cells = [f"{row[key]}: {_name(row)}" if row[key] else "none" for key, row in worst.items()]
    return f"| {target} | {len(rows)} | {' | '.join(cells)} | {sum(bool(row['faults']) for row in rows)} |"


def _limits(target: Target) -> str:
    return (
        f"Shared memory: {target.shared} bytes a program, {target.shared_total} an SM or CU, of which each program "
        f"reserves {target.shared_reserved}; {SCHEDULERS} schedulers of {target.warps} warps and {REGISTERS} registers "
        f"a lane; {target.programs} programs ({target.source})."
    )


def _fault(row: dict[str, Any]) -> str:
    return f"- {row['target']} {_name(row)}: {'; '.join(row['faults'])} (kernels/_table.py, {row['place']})"


def _name(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['dtype']}" + (f" ({row['options']})" if row["options"] else "")


def _line(row: dict[str, Any]) -> str:
    blocks = ", ".join(f"{name} {count}" for name, count in row["blocks"].items())
    matrix = ", ".join(f"{count} {name}" for name, count in row["matrix"].items())
    numbers = [row[name] for name in ("num_warps", "num_stages", "registers", "spilled", "shared")]
    cells = [row["kernel"], row["dtype"], row["options"], blocks, *numbers, matrix, row["load"], row["programs"]]
    return "| " + " | ".join(map(str, cells)) + " |"
