"""Metadata stands in pyproject.toml; this builds the C++ kernels where torch and a compiler are present."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

# The oldest torch whose stable ABI the kernels use: one binary serves it and every later one, and Python 3.11 on
TARGET_TORCH = (2, 11)
PYTHON_TAG = "cp311"


def _reason_against() -> str | None:
    """Why the C++ kernels are not built, or None."""
    if os.environ.get("MTA_FAST_NO_EXTENSION"):
        return "MTA_FAST_NO_EXTENSION is set"
    if sys.platform == "win32":
        return "they are written for GCC and Clang, not for Windows"
    try:
        import torch.utils.cpp_extension  # noqa: F401  # build isolation hides an installed torch
    except ImportError:
        return "torch can't be imported here; install torch, then: pip install --no-build-isolation ."
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} was found; install one, or set CXX"
    return None


def _extension() -> dict[str, Any]:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    major, minor = TARGET_TORCH
    flags = [
        "-O3",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
    ]
    extra = os.environ.get("MTA_FAST_SANITIZE", "")
    sanitize = [f"-fsanitize={extra}", "-fno-omit-frame-pointer", "-g"] if extra else []
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    extension = CppExtension(
        "mta_fast._C",
        sources,
        extra_compile_args={"cxx": flags + sanitize},
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


reason = _reason_against()
if reason:
    print(f"mta-fast: installing without its C++ kernels: {reason}", file=sys.stderr)
setup(**({} if reason else _extension()))
