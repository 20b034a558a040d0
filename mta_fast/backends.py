"""Which backend runs a call, and why the others refused.

A backend is a module with one function per op, named and called as in ``mta_fast.reference``. ``BACKENDS`` holds
them in order of preference; "auto" takes the first one without a reason against the call. A backend that is
asked for by name either runs or raises: nothing falls back silently.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mta_fast.errors import BackendUnavailableError, InputError

OPS = ("token_importance", "span_weights", "pool_spans", "pool_spans_gradient", "span_pairs", "hidden_alignment")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``backend=`` calls it.
        module: import path of the module with the op functions, imported on first use.
        reasons_against: (op, tensors) -> why it can't run the call; empty when it can.
    """

    name: str
    module: str
    reasons_against: Callable[[str, Sequence[Tensor]], list[str]]


BACKENDS: dict[str, Backend] = {
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
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(
            f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}; "
            f"`mta-fast doctor` lists the backends of this installation"
        )


def choose(op: str, tensors: Sequence[Tensor], backend: str = "auto") -> Choice:
    """The backend that runs ``op`` on these tensors.

    Raises:
        InputError: no backend has that name.
        BackendUnavailableError: the named backend, or every backend, refuses; the message holds all reasons.
    """
    check_name(backend)
    refused: dict[str, list[str]] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reasons = BACKENDS[name].reasons_against(op, tensors)
        if not reasons:
            return Choice(name, refused)
        refused[name] = reasons
    inputs = ", ".join(f"{t.dtype}{list(t.shape)} on {t.device}" for t in tensors)
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    mend = "use backend='auto'" if backend != "auto" else "see `mta-fast doctor`"
    raise BackendUnavailableError(f"{op} ({inputs}): expected a backend that can run it, got {why}; {mend}")


def run(op: str, backend: str, tensors: Sequence[Tensor], /, *args: Any, **options: Any) -> Any:
    """Run ``op`` on the chosen backend, outside of autocast: the ops choose their own precision.

    Args:
        tensors: the floating-point inputs, by which the backend is chosen.
        args, options: what the backend's function takes.
    """
    chosen = BACKENDS[choose(op, tensors, backend).name]
    function = getattr(importlib.import_module(chosen.module), op)
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        return function(*args, **options)
