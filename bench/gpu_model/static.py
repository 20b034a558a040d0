"""What Triton's compilers make of every kernel, without a GPU: ``python -m bench static``.

``variants`` finds what is launched, ``machine_code`` compiles it; here it is judged and reported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from bench.gpu_model.machine_code import Code, compile_all
from bench.gpu_model.targets import REGISTERS, SCHEDULERS, TARGETS, Target
from bench.gpu_model.variants import Variant, variants
from bench.report import Report, Section, entry
from mta_fast import __version__, backends
from mta_fast.errors import InputError, MissingPackageError

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


def measure(targets: list[str] | None = None, reuse: Path | None = None) -> Report:
    """Compile every variant for the targets (None: all).

    No variant may fail to compile, spill, overflow the shared memory, or leave tensor cores unused.

    Args:
        reuse: an earlier report; what it holds of the same code, options and Triton is not compiled again.

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

    made = {} if reuse is None else _earlier(reuse, triton.__version__)
    found = [variant for name in names for variant in variants(name)]
    new = [variant for variant in found if variant.digest not in made]
    made |= {variant.digest: code for variant, code in zip(new, compile_all(new), strict=True)}
    lines = [_line(variant, made[variant.digest]) for variant in found]
    versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    versions["mta_fast"] = __version__
    by_target = {name: [line for line in lines if line["target"] == name] for name in names}
    content = {"versions": versions, "targets": {name: asdict(TARGETS[name]) for name in names}, "rows": lines}
    judged = [
        entry(f"{name}: variants with a fault", [sum(bool(line["faults"]) for line in of)], "", "<= 0")
        for name, of in by_target.items()
    ]
    text = _markdown(versions, by_target)
    return Report("mta-fast bench static", versions, [Section("Faults", judged)], content=content, text=text)


def _earlier(report: Path, triton: str) -> dict[str, Code]:
    """By the digest of its variant, the code of an earlier report from the same Triton."""
    try:
        read = json.loads(report.read_text(encoding="utf-8"))
        rows = read["rows"] if read["versions"]["triton"] == triton else []
        codes = {row["digest"]: {item.name: row[item.name] for item in fields(Code)} for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--reuse: expected a report of bench static in {report}, got {error!r}") from None
    return {digest: Code(**code | {"products": tuple(code["products"])}) for digest, code in codes.items()}


def _line(variant: Variant, code: Code) -> dict[str, Any]:
    line = asdict(variant) | asdict(code)
    del line["source"], line["settings"], line["called"]
    return line | {"dtype": _dtype(variant, code), "faults": faults(code, TARGETS[variant.target])}


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


def _markdown(versions: dict[str, str], by_target: dict[str, list[dict[str, Any]]]) -> str:
    broken = [line for of in by_target.values() for line in of if line["faults"]]
    lines = [
        f"`mta-fast bench static`: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "Compiled, not run: nothing here is measured. dtype: of the op's call (student/teacher if they differ), with",
        "torch's float32 matmul precision where it matters. Registers and spilled bytes: of a thread (AMD: a lane).",
        "Shared memory: bytes of a program. Tensor cores: instructions in the code. Load: bytes of the widest load of",
        "global memory. Programs: how many fit on an SM (AMD: workgroups on a CU) at once, computed from registers,",
        "warps, shared memory and tensor memory.",
        "",
        "| target | variants | most registers | most shared memory | most spilled | faults |",
        "|---|---|---|---|---|---|",
        *(_summary(name, of) for name, of in by_target.items()),
        "",
        f"## Faults: {len(broken) or 'none'}",
        "",
    ]
    for line in broken:
        place = f"(kernels/_table.py, {line['place']})"
        lines.append(f"- {line['target']} {_name(line)}: {'; '.join(line['faults'])} {place}")
    for name, of in by_target.items():
        lines += ["", f"## {name}", "", _limits(TARGETS[name]), ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(_cells, of)]
    return "\n".join([*lines, ""])


def _summary(target: str, lines: list[dict[str, Any]]) -> str:
    worst = {key: max(lines, key=lambda line: line[key]) for key in ("registers", "shared", "spilled")}
    cells = [f"{line[key]}: {_name(line)}" if line[key] else "none" for key, line in worst.items()]
    return f"| {target} | {len(lines)} | {' | '.join(cells)} | {sum(bool(line['faults']) for line in lines)} |"


def _limits(target: Target) -> str:
    return (
        f"Shared memory: {target.shared} bytes a program, {target.shared_total} an SM or CU, of which each program "
        f"reserves {target.shared_reserved}; {SCHEDULERS} schedulers of {target.warps} warps and {REGISTERS} registers "
        f"a lane; {target.programs} programs ({target.source})."
    )


def _name(line: dict[str, Any]) -> str:
    return f"{line['kernel']} {line['dtype']}" + (f" ({line['options']})" if line["options"] else "")


def _cells(line: dict[str, Any]) -> str:
    blocks = ", ".join(f"{name} {count}" for name, count in line["blocks"].items())
    matrix = ", ".join(f"{count} {name}" for name, count in line["matrix"].items())
    numbers = [line[name] for name in ("num_warps", "num_stages", "registers", "spilled", "shared")]
    cells = [line["kernel"], line["dtype"], line["options"], blocks, *numbers, matrix, line["load"], line["programs"]]
    return "| " + " | ".join(map(str, cells)) + " |"
