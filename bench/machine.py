"""What a run was measured on: processor, threads, versions, and how the C++ kernels were built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mta_fast import __version__
from mta_fast._extension import build_info, why_missing


def machine(*packages: str, **more: Any) -> dict[str, Any]:
    """Processor, threads, memory and versions of this process.

    Args:
        packages: further distributions whose version matters.
        more: further facts.
    """
    found = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory": f"{total_memory() / 2**30:.0f} GB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mta_fast": __version__,
    }
    built = str(build_info()) if why_missing() is None else ""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return found | ({"C++ kernels": built} if built else {}) | versions | more


def texts_name(texts: Path | None) -> str:
    """The text file as a report names it: the last two parts of its path."""
    return "bundled sample" if texts is None else "/".join(texts.parts[-2:])


def total_memory() -> int:
    """Bytes of this machine (0 where the system does not say)."""
    return _proc("/proc/meminfo", "MemTotal") * 1024


def _proc(path: str, name: str) -> int:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
