"""How kernels are launched: their row of the table, the precision of float32 products, and who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from mta_fast.errors import InputError
from mta_fast.kernels._table import DOUBLE, HALF, SINGLE, Row, find_row, table_row

INTERPRETED: bool = knobs.runtime.interpret  # decided when the kernels were decorated
# enable_fp_fusion is set because its default differs between versions of Triton; fused sums round once, not twice
FP_FUSION = True


class Launch(NamedTuple):
    """One launch, as observers see it."""

    name: str  # row name in the table
    kernel: Any  # the JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # pointers, numbers and constants by parameter name
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion
    place: str  # of its row in kernels/_table.py
    row: Row


Observer = Callable[[Launch], None]


class _Watch(NamedTuple):
    observer: Observer
    execute: bool
    architecture: str | None


_watches: list[_Watch] = []


@contextmanager
def observe(observer: Observer, *, execute: bool = True, architecture: str | None = None) -> Iterator[None]:
    """Show every launch to ``observer``; with ``execute=False`` nothing runs, and tensors may be without data.

    For tests, launch counts and the compiler report, which takes the rows of an ``architecture`` that is not here. Not
    for several threads at once.
    """
    _watches.append(_Watch(observer, execute, architecture))
    try:
        yield
    finally:
        _watches.pop()


def dry_run() -> bool:
    """Whether launches are shown to an observer without being executed."""
    return any(not watch.execute for watch in _watches)


class _Plan(NamedTuple):
    kernel: Any
    row: Row
    place: str
    constants: dict[str, Any]  # blocks, and those of ``Numerics``, that the kernel takes
    options: dict[str, Any]


@dataclass(frozen=True)
class Numerics:
    """Row of the table and compile-time constants of a kernel that reads tensors of one dtype.

    Attributes:
        kind: "half", "single" or "double".
        architecture: what the kernel is compiled for.
        aligned: whether all widths are multiples of 16.
        dtype: what is accumulated and stored in.
        constants: ACC, PRECISION and UPCAST of ``_device``.
    """

    kind: str
    architecture: str
    aligned: bool
    dtype: torch.dtype
    constants: dict[str, Any]
    _plans: dict[str, _Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def row(self, name: str) -> Row:
        """The table's row for a kernel."""
        return find_row(name, self.kind, self.architecture, self.aligned)

    def plan(self, name: str, kernel: Any) -> _Plan:
        """What a kernel is launched with beside its arguments; made again where the table's row is another."""
        row = self.row(name)
        plan = self._plans.get(name)
        if plan is None or plan.row is not row or plan.kernel is not kernel:
            place, _ = table_row(name, self.kind, self.architecture, self.aligned)
            constants = {key: value for key, value in (row.blocks | self.constants).items() if key in kernel.arg_names}
            options = {"num_warps": row.num_warps, "num_stages": row.num_stages, "enable_fp_fusion": FP_FUSION}
            plan = self._plans[name] = _Plan(kernel, row, place, constants, options)
        return plan


def numerics(*tensors: Tensor, exact: bool = False, dtype: torch.dtype | None = None) -> Numerics:
    """How a kernel that reads these tensors computes; tensors of several dtypes are loaded as ACC.

    float32 products follow torch's float32 matmul precision, and with ``exact`` are those of "highest" whatever it is.
    ``dtype``: of kernels that read what was made of the tensors in it, in rows that start at whole vectors.
    """
    dtypes = frozenset([tensor.dtype for tensor in tensors] if dtype is None else [dtype])
    exact = exact or torch.backends.cuda.matmul.fp32_precision != "tf32"  # says what either of torch's settings is
    aligned = True
    for tensor in tensors:
        if dtype is None and tensor.ndim == 2 and tensor.shape[1] % 16:
            aligned = False
    return _numerics(dtypes, _architecture(tensors[0].device), aligned, exact)


@cache
def _numerics(dtypes: frozenset[torch.dtype], architecture: str, aligned: bool, exact: bool) -> Numerics:
    half = dtypes <= {torch.bfloat16, torch.float16}
    kind = DOUBLE if torch.float64 in dtypes else HALF if half and len(dtypes) == 1 else SINGLE
    constants = {
        "ACC": tl.float64 if kind == DOUBLE else tl.float32,
        "PRECISION": "ieee" if kind == DOUBLE else float32_precision(architecture, exact),
        "UPCAST": len(dtypes) > 1 or (INTERPRETED and half),
    }
    return Numerics(kind, architecture, aligned, torch.float64 if kind == DOUBLE else torch.float32, constants)


def launch(name: str, kernel: Any, grid: tuple[int, ...], num: Numerics, **arguments: Any) -> None:
    """Launch ``kernel`` with its row of the table and the constants it takes; nothing happens for an empty grid."""
    if 0 in grid:
        return
    for key, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_contiguous():  # as results are, which stay themselves
            arguments[key] = _readable(key, value)
    plan = num.plan(name, kernel)
    arguments |= plan.constants
    if _watches:
        made = Launch(name, kernel, grid, arguments, plan.options, plan.place, plan.row)
        for watch in _watches:
            watch.observer(made)
        if dry_run():
            return
    kernel[grid](**arguments, **plan.options)


def float32_precision(architecture: str, exact: bool) -> str:
    """What ``tl.dot`` makes of float32 factors.

    NVIDIA: one TF32 product, or for exactness three of the factors' high and low parts. AMD: its compiler refuses that
    split, and its float32 matrix instructions are exact.
    """
    if architecture.startswith("gfx"):
        return "ieee"
    return "tf32x3" if exact else "tf32"


def _architecture(device: torch.device) -> str:
    """Whose rows of the table are taken; in a dry run what the observer asks for, in the interpreter an H100's."""
    for watch in _watches:
        if watch.architecture is not None:
            return watch.architecture
    if device.type != "cuda":
        return "sm_90"
    return _device_architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _device_architecture(index: int) -> str:
    """The table's architecture that a device's compiler and shared memory are most like."""
    if torch.version.hip:
        return "gfx942"  # the others (backends.AMD) have as much shared memory or more
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # 8.6, 8.9 and 12.x have mma.sync and less shared memory


def writable(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a buffer that a kernel writes: the interpreter truncates bfloat16, so there torch rounds."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def _readable(name: str, value: Tensor) -> Tensor:
    """A tensor as the kernels address it: vectors and index tensors contiguous, features within 2^31 elements."""
    if value.ndim == 1 or not value.is_floating_point():
        return value.contiguous()
    if value.ndim == 2 and (value.shape[1] - 1) * value.stride(1) >= 2**31:
        raise InputError(
            f"{name}: expected fewer than 2^31 elements from a row's first feature to its last, got a stride of "
            f"{value.stride(1)} for {value.shape[1]} features; give .contiguous()"
        )
    return value
