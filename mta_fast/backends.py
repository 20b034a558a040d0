"""Which backend runs a call, and why the others refused.

A backend is a module with one function per op, named and called as in ``mta_fast.reference``. ``BACKENDS`` holds
them in order of preference; "auto" takes the first one that has neither a reason against the call nor one to avoid
it. A backend that is asked for by name either runs or raises: nothing falls back silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mta_fast import _extension, contract
from mta_fast.choices import check_choice
from mta_fast.errors import BackendUnavailableError

OLDEST_TRITON = (3, 6)
OLDEST_CUDA = (8, 0)  # compute capability: bfloat16 and TF32 tensor cores
AMD = ("gfx90a", "gfx942", "gfx950")  # matrix instructions of float32, waves of 64
Reasons = Callable[[str, Sequence[Tensor]], list[str]]
# Asked once: Dynamo can't trace the question in torch 2.11
AUTOCAST_DEVICES = frozenset(
    d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(d)
)

_LAUNCH = "mta_fast.kernels._launch"  # not imported here: it needs Triton

OPS = (
    "token_importance",
    "span_weights",
    "pool_spans",
    "pool_spans_gradient",
    "span_pairs",
    "span_pairs_gradient",
    "hidden_alignment",
    "hidden_alignment_gradient",
    "linear_divergence",
    "linear_divergence_gradient",
)


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``backend=`` calls it.
        module: import path of the module with the op functions, imported on first use.
        reasons_against: (op, tensors) -> why it can't run the call; empty when it can.
        reasons_to_avoid: (op, tensors) -> why another backend is faster for the call; heeded by "auto" only.
        checks_arguments: its functions check what they are given (``contract``); else ``run`` does.
    """

    name: str
    module: str
    reasons_against: Reasons
    reasons_to_avoid: Reasons = lambda op, tensors: []
    checks_arguments: bool = False


def _reasons_against_triton(op: str, tensors: Sequence[Tensor]) -> list[str]:
    device = tensors[0].device
    kind = device.type
    if kind == "cpu" and not _interpreted():
        return ["CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before the first call; slow, for tests)"]
    if kind == "cuda" and _interpreted():
        return ["TRITON_INTERPRET=1 is set, which interprets the kernels on the CPU; unset it and start again"]
    if kind not in ("cpu", "cuda") and not (kind == "meta" and _dry_run()):
        return [f"expected CUDA or ROCm tensors, got {kind}"]
    reason = _triton_is_missing() or (_device_is_unfit(device) if kind == "cuda" else None)
    return [] if reason is None else [reason]


@cache
def _triton_is_missing() -> str | None:
    """Why Triton can't be used; looked up once, as every op asks."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; CUDA and ROCm builds of torch bring their own)"
    version: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"expected triton >= {'.'.join(map(str, OLDEST_TRITON))}, got {version}"
    return None


@cache
def _device_is_unfit(device: torch.device) -> str | None:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if name in AMD else f"expected one of {', '.join(AMD)}, got {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        return f"expected compute capability 8.0 or later, got {'.'.join(map(str, capability))}"
    return None


def _reasons_against_cpp(op: str, tensors: Sequence[Tensor]) -> list[str]:
    device = tensors[0].device
    if device.type != "cpu":
        return [f"expected CPU tensors, got {device.type}"]
    reason = _extension.why_missing()
    return [] if reason is None else [reason]


def _reasons_to_avoid_triton(op: str, tensors: Sequence[Tensor]) -> list[str]:
    if tensors[0].device.type != "cuda":
        return ["the interpreter is for tests"]
    if torch.float64 in [tensor.dtype for tensor in tensors]:
        return ["its float64 products use no tensor cores"]
    return []


def _interpreted() -> bool:
    """Whether the kernels are (or, not yet imported, would be) decorated for the interpreter."""
    launch = sys.modules.get(_LAUNCH)
    if launch is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    interpreted: bool = launch.INTERPRETED
    return interpreted


def _dry_run() -> bool:
    """Whether an observer watches the launches without executing them: tensors may then be without data."""
    return _LAUNCH in sys.modules and sys.modules[_LAUNCH].dry_run()


BACKENDS: dict[str, Backend] = {
    "triton": Backend("triton", "mta_fast.kernels", _reasons_against_triton, _reasons_to_avoid_triton, True),
    "cpp": Backend("cpp", "mta_fast.cpp", _reasons_against_cpp, checks_arguments=True),
    "reference": Backend("reference", "mta_fast.reference", lambda op, tensors: []),
}


def register(backend: Backend) -> None:
    """Add a backend, preferred to all that are registered; one of the same name is replaced."""
    others = {name: other for name, other in BACKENDS.items() if name != backend.name}
    BACKENDS.clear()
    BACKENDS.update({backend.name: backend, **others})


@dataclass(frozen=True)
class Choice:
    """What runs a call: the backend's name, and the reasons of those that were preferred but refused."""

    name: str
    refused: dict[str, list[str]]


def check_name(backend: str) -> None:
    """Raise InputError unless ``backend`` is "auto" or the name of a backend of this installation."""
    hint = "`mta-fast doctor` lists the backends of this installation"
    if backend != "auto" and backend not in BACKENDS:
        check_choice("backend", backend, ("auto", *BACKENDS), hint=hint)


def choose(op: str, tensors: Sequence[Tensor], backend: str = "auto") -> Choice:
    """The backend that runs ``op`` on these tensors.

    Raises:
        InputError: no backend has that name.
        BackendUnavailableError: the named backend, or every backend, refuses; the message holds all reasons.
    """
    name, refused = _choose(op, tensors, backend)
    return Choice(name, refused)


def _choose(op: str, tensors: Sequence[Tensor], backend: str) -> tuple[str, dict[str, list[str]]]:
    check_name(backend)
    refused: dict[str, list[str]] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        own = BACKENDS[name]
        reasons = own.reasons_against(op, tensors) or _reasons_in_module(op, own.module)
        if reasons and backend == "auto" and tensors[0].device.type == "cuda":
            _warn_of_slower(name, reasons[0])
        if not reasons and backend == "auto":
            reasons = own.reasons_to_avoid(op, tensors)
        if not reasons:
            return name, refused
        refused[name] = reasons
    inputs = ", ".join(f"{t.dtype}{list(t.shape)} on {t.device}" for t in tensors)
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    mend = "use backend='auto'" if backend != "auto" else "see `mta-fast doctor`"
    raise BackendUnavailableError(f"{op} ({inputs}): expected a backend that can run it, got {why}; {mend}")


def _reasons_in_module(op: str, module: str) -> list[str]:
    """Why a backend's module can't give the op: it can't be imported, or has no such function."""
    try:
        found = _module(module)
    except ImportError as error:
        return [f"its module {module} can't be imported ({error})"]
    return [] if callable(getattr(found, op, None)) else [f"its module {module} has no function {op}"]


def _module(name: str) -> ModuleType:
    """Imported on first use, and looked up by every call."""
    return sys.modules.get(name) or importlib.import_module(name)


@cache
def _warn_of_slower(name: str, reason: str) -> None:
    """Once a reason: on a GPU "auto" is meant to take the kernels."""
    warnings.warn(f"backend 'auto' expected {name} on a GPU and takes a slower one: {reason}", stacklevel=4)


def run(op: str, backend: str, tensors: Sequence[Tensor], /, *args: Any, **options: Any) -> Any:
    """Run ``op`` on the chosen backend, outside of autocast: the ops choose their own precision.

    Args:
        tensors: the floating-point inputs, by which the backend is chosen.
        args, options: what the backend's function takes.

    Raises:
        InputError: an argument is not what the op takes.
    """
    contract.check_given(op, args)
    chosen = BACKENDS[_choose(op, tensors, backend)[0]]
    function = getattr(_module(chosen.module), op)
    if not chosen.checks_arguments:
        contract.CHECKS[op](*args, **options)
    with ready(tensors[0].device):
        return function(*args, **options)


def unchecked(op: str, backend: str, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """The chosen backend's function, for a caller that has checked what it gives, and calls it within ``ready``."""
    function = getattr(_module(BACKENDS[_choose(op, tensors, backend)[0]].module), op)
    return getattr(function, "unchecked", function)


def ready(device: torch.device) -> AbstractContextManager[Any]:
    """No gradients, no autocast, and launches on ``device``."""
    kind = device.type
    in_autocast = kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    if not in_autocast and not elsewhere:
        return torch.no_grad()
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if in_autocast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))  # where Triton launches
    return stack
