"""Which backend runs a call."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mta_fast import backends, reference, token_importance
from mta_fast.errors import BackendUnavailableError, InputError


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backend that computes as the reference does, refuses float64, and notes its calls."""
    calls: list[str] = []
    module = ModuleType("spy_backend")
    for op in backends.OPS:

        def run(*args: Any, op: str = op, **options: Any) -> Any:
            calls.append(op)
            return getattr(reference, op)(*args, **options)

        setattr(module, op, run)

    def reasons_against(op: str, tensors: Sequence[Tensor]) -> list[str]:
        return ["it has no float64"] if any(t.dtype == torch.float64 for t in tensors) else []

    monkeypatch.setitem(sys.modules, "spy_backend", module)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    backends.register(backends.Backend("spy", "spy_backend", reasons_against))
    return calls


def test_auto_prefers_what_was_registered_last(spy: list[str]) -> None:
    hidden = torch.randn(1, 3, 4)
    token_importance(hidden)
    assert spy == ["token_importance"]
    token_importance(hidden, backend="reference")
    token_importance(hidden.double())  # refused: the next one runs
    assert spy == ["token_importance"]
    choice = backends.choose("token_importance", [hidden.double()])
    assert choice.name in ("cpp", "reference")
    assert choice.refused["spy"] == ["it has no float64"]


def test_an_explicit_choice_never_falls_back(spy: list[str]) -> None:
    with pytest.raises(BackendUnavailableError, match="got spy: it has no float64; use backend='auto'"):
        token_importance(torch.randn(1, 3, 4).double(), backend="spy")
    assert spy == []


def test_a_module_without_an_op_refuses_that_op(spy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["spy_backend"], "token_importance")
    hidden = torch.randn(1, 3, 4)
    reason = "its module spy_backend has no function token_importance"
    with pytest.raises(BackendUnavailableError, match=f"got spy: {reason}; use backend='auto'"):
        token_importance(hidden, backend="spy")
    assert torch.equal(token_importance(hidden), token_importance(hidden, backend=_next(hidden)))
    assert backends.choose("token_importance", [hidden]).refused["spy"] == [reason]
    backends.register(backends.Backend("gone", "no_such_module_of_ops", lambda op, tensors: []))
    with pytest.raises(BackendUnavailableError, match="got gone: its module no_such_module_of_ops can't be imported"):
        token_importance(hidden, backend="gone")


def _next(hidden: Tensor) -> str:
    return backends.choose("token_importance", [hidden]).name


@pytest.mark.parametrize("name", ["triton", "cpp", "reference"])
def test_every_backend_has_every_op_with_the_reference_signature(name: str) -> None:
    module = importlib.import_module(backends.BACKENDS[name].module)
    for op in backends.OPS:
        defined = inspect.signature(getattr(reference, op))
        assert list(inspect.signature(getattr(module, op)).parameters) == list(defined.parameters), op


def test_unknown_names_are_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"expected one of auto, triton, cpp, reference, got 'gpu'; .mta-fast doctor"):
        token_importance(torch.randn(1, 3, 4), backend="gpu")
