"""Shared pieces of the tests: ragged batches in three layouts, fixtures, seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; read when they are decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and expected numbers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no expected numbers beside the checkout ({SHARED.name}/ is absent)")
    return SHARED
