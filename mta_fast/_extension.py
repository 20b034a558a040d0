"""Loads ``mta_fast._C``, the C++ kernels for CPUs, which registers ``torch.ops.mta_fast_cpp``; on first use only.

One binary serves every torch from its target version on (libtorch's stable ABI). A torch that it can't serve would
fail inside the dynamic loader, with a missing symbol or worse, so the binary's own record is read first.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

HOW_TO_BUILD = "install torch and a C++ compiler, then run in the checkout: pip install --no-build-isolation ."
_RECORD = re.compile(rb"mta_fast\._C\|torch=([^|]+)\|target=([^|]+)\|compiler=([^|]+)\|sanitizers=\(([^|]*)\)\|")


class BuildInfo(NamedTuple):
    """What ``mta_fast._C`` was built with."""

    torch: str  # version of the headers
    target: str  # the oldest torch it serves
    compiler: str
    sanitizers: str  # as in -fsanitize=; empty in what is installed

    def __str__(self) -> str:
        sanitized = f", sanitizers {self.sanitizers}" if self.sanitizers else ""
        return f"built with torch {self.torch} for {self.target} and later, {self.compiler}{sanitized}"


@cache
def build_info() -> BuildInfo | None:
    """What the C++ kernels were built with, read without loading them; None where there are none."""
    path = _binary()
    found = _RECORD.search(path.read_bytes()) if path else None
    return BuildInfo(*(value.decode() for value in found.groups())) if found else None


@cache
def why_missing() -> str | None:
    """None where the C++ kernels are loaded, else why they are not and what to do."""
    if _binary() is None:
        return f"mta_fast._C is not built; {HOW_TO_BUILD}"
    info = build_info()
    reason = "it has no record of its build" if info is None else why_unfit(info, torch.__version__)
    if reason is None:
        try:
            importlib.import_module("mta_fast._C")
            return None
        except ImportError as error:
            reason = f"it can't be loaded ({error})"
    return f"mta_fast._C: {reason}; to build it anew, {HOW_TO_BUILD}"


def why_unfit(info: BuildInfo, running: str) -> str | None:
    """Why a binary can't serve the torch of version ``running``, or None.

    What is built for one version of libtorch's stable ABI runs on later ones; a new major version may end that.
    """
    target, built, version = (_version(text) for text in (info.target, info.torch, running))
    if target <= version and version[0] == built[0]:
        return None
    return (
        f"expected torch {info.target} or later of major version {built[0]} (it was built with torch {info.torch}), "
        f"got torch {running}"
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _binary() -> Path | None:
    spec = importlib.util.find_spec("mta_fast._C")
    return Path(spec.origin) if spec and spec.origin else None
