"""Metadata stands in pyproject.toml; this builds the C++ kernels where torch and a compiler are present."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

# The oldest torch whose stable ABI the kernels use: one binary serves it and every later one, and Python 3.11 on
TARGET_TORCH = (2, 11)
PYTHON_TAG = "cp311"
# -fno-wrapv undoes Python's own flag, which hides overflows from the sanitizer; -g0 undoes its -g
FLAGS = "-O3 -g0 -fno-wrapv -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wextra"
SANITIZE = "-g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all"  # with MTA_FAST_SANITIZE=address,undefined


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _reason_against() -> str | None:
    """Why the C++ kernels are not built, or None."""
    if os.environ.get("MTA_FAST_NO_EXTENSION"):
        return "MTA_FAST_NO_EXTENSION is set"
    if sys.platform == "win32":
        return "they are written for GCC and Clang, not for Windows"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "they use Python's stable ABI, which a free-threaded Python lacks"
    try:
        import torch
        import torch.utils.cpp_extension  # build isolation hides an installed torch
    except ImportError:
        return "torch can't be imported here; install torch, then: pip install --no-build-isolation ."
    if tuple(map(int, torch.__version__.split(".")[:2])) < TARGET_TORCH:
        return f"expected torch {_dotted(TARGET_TORCH)} or later, got {torch.__version__}"
    if shutil.which(_compiler()[0]) is None:
        return f"no C++ compiler {_compiler()[0]!r} was found; install one, or set CXX"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _extension() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    # ninja as a wheel lies beside this Python, which need not be on the path
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    major, minor = TARGET_TORCH
    flags = [
        *FLAGS.split(),
        *(f"-isystem{path}" for path in include_paths()),  # no warnings from torch's own headers
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-DMTA_FAST_TARGET_TORCH={major}.{minor}",
    ]
    links = []
    if sanitizers := os.environ.get("MTA_FAST_SANITIZE"):
        links = [f"-fsanitize={sanitizers}"]
        flags += [*links, *SANITIZE.split(), f"-DMTA_FAST_SANITIZERS={sanitizers}"]
    extension = CppExtension(
        "mta_fast._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        extra_compile_args={"cxx": flags},
        extra_link_args=links,
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
