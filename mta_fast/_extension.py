"""Loads ``mta_fast._C``, the C++ kernels for CPUs, which registers ``torch.ops.mta_fast_cpp``."""

from __future__ import annotations

import importlib
from functools import cache


@cache
def why_missing() -> str | None:
    """None where the C++ kernels are loaded, else why they are not and what to do."""
    try:
        importlib.import_module("mta_fast._C")
    except ImportError as error:
        return f"mta_fast._C is not built ({error})"
    return None
