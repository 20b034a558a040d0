"""Shared pieces of the tests: ragged batches in three layouts, fixtures, seeds."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; read when they are decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` has a worker a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)

LONGEST = ("test_bench_static", "test_distributed", "test_kernels_contract", "test_kernels_memory")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Interpreted kernels in half the time: device functions don't patch Triton's language again at every call.

    The first call of a module's functions does, and the kernel that calls them keeps it so.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import InterpretedFunction

    patched, original = set(), InterpretedFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn.__module__)
        return original(function, *args, **kwargs)

    InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: begun last, one process would be at them long after the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts this process and those that it starts, also where the tests were started to ignore it.

    So are ``command &`` of a script, cron's jobs and some CI runners, and children inherit it.
    """
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What backend="auto" takes for CPU tensors; modules that ask for it run once with each."""
    from mta_fast import _extension, backends

    if request.param == "cpp" and (reason := _extension.why_missing()):
        pytest.skip(reason)
    if request.param == "reference":
        avoided = replace(
            backends.BACKENDS["cpp"], reasons_to_avoid=lambda op, tensors: ["the test asks for reference"]
        )
        monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "cpp": avoided})
    return request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and expected numbers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no expected numbers beside the checkout ({SHARED.name}/ is absent)")
    return SHARED
