"""mta_fast._C: when it is built, what it says about itself, and when it refuses to load."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mta_fast import _extension
from mta_fast.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text()
TARGET = ".".join(re.search(r"TARGET_TORCH = \((\d+), (\d+)\)", SETUP).groups())  # type: ignore[union-attr]
BINARY = _extension._binary()
built = pytest.mark.skipif(BINARY is None, reason="the C++ kernels are not built here")


@pytest.fixture(autouse=True)
def _looked_up_anew() -> None:
    _extension.build_info.cache_clear()
    _extension.why_missing.cache_clear()


def _setup(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_it_is_built_where_it_can_be() -> None:
    reason = _setup("--name").stderr
    assert (BINARY is None) == ("installing without its C++ kernels" in reason), reason
    if BINARY is not None:
        assert _extension.why_missing() is None


@built
def test_what_it_was_built_with() -> None:
    info = _extension.build_info()
    assert info is not None
    assert info.target == TARGET
    assert importlib.import_module("mta_fast._C").BUILD.startswith(f"mta_fast._C|torch={info.torch}|target={TARGET}|")
    assert f"built with torch {info.torch} for {TARGET} and later, {info.compiler}" in str(info)
    assert str(BINARY).endswith(".abi3.so")  # one binary for every Python from 3.11 on


@built
@pytest.mark.parametrize(
    ("field", "value", "running", "message"),
    [
        ("target", "9.99", "9.98.1", "expected torch 9.99 or later of major version 9 (it was built with torch"),
        ("target", TARGET, "2.10.1+cpu", f"expected torch {TARGET} or later of major version 2"),
        (
            "torch",
            "2.13.0",
            "3.0.0a0+git1",
            "(it was built with torch 2.13.0), got torch 3.0.0a0+git1; to build it anew",
        ),
    ],
)
def test_another_torch_is_refused_before_loading(
    field: str, value: str, running: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BINARY is not None
    info = _extension.build_info()
    assert info is not None
    changed = info._replace(**{field: value, **({"torch": "9.99.0"} if value == "9.99" else {})})
    record = "mta_fast._C|torch={}|target={}|compiler={}|sanitizers=({})|".format(*changed).encode()
    copy = tmp_path / BINARY.name
    copy.write_bytes(_extension._RECORD.sub(lambda _: record, BINARY.read_bytes()))
    _extension.build_info.cache_clear()
    monkeypatch.setattr(_extension, "_binary", lambda: copy)
    monkeypatch.setattr(torch, "__version__", running)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"loads {name}"))
    reason = _extension.why_missing()
    assert reason is not None
    assert message in reason
    assert f"got torch {running}" in reason
    assert "pip install --no-build-isolation ." in reason


def test_a_later_torch_is_served() -> None:
    info = _extension.BuildInfo("2.13.0", "2.11", "GCC", "")
    for running in ("2.11.0", "2.13.0+cpu", "2.14.1", "2.15.0a0+gitabc", "2.100.0"):
        assert _extension.why_unfit(info, running) is None
    assert _extension.why_unfit(info, "2.9.1") is not None  # versions are compared as numbers
    assert _extension.why_unfit(info, "1.13.0") is not None


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_binary", lambda: None)
    assert _extension.why_missing() == f"mta_fast._C is not built; {_extension.HOW_TO_BUILD}"
    assert _extension.build_info() is None
    other = tmp_path / "_C.abi3.so"
    other.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_binary", lambda: other)
    for function in (_extension.build_info, _extension.why_missing):
        function.cache_clear()  # type: ignore[attr-defined]
    assert "mta_fast._C: it has no record of its build; to build it anew" in str(_extension.why_missing())


@built
def test_a_symbol_that_is_missing_is_a_reason(tmp_path: Path) -> None:
    """A binary whose record is fine and that the dynamic loader refuses."""
    assert BINARY is not None
    package = tmp_path / "mta_fast"
    shutil.copytree(ROOT / "mta_fast", package, ignore=shutil.ignore_patterns("__pycache__"))
    whole = BINARY.read_bytes()
    (package / BINARY.name).write_bytes(whole.replace(b"torch_parallel_for", b"torch_parallel_xxx"))
    code = "from mta_fast import _extension; print(_extension.why_missing())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=_plain_environment()
    )
    assert "mta_fast._C: it can't be loaded" in ran.stdout
    assert "torch_parallel_xxx; to build it anew" in ran.stdout.replace(")", "")


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}


def test_import_does_not_load_it() -> None:
    code = (
        "import sys, mta_fast, mta_fast.spans.batch, mta_fast.doctor; assert 'mta_fast._C' not in sys.modules; "
        "from mta_fast import SpanBatch; SpanBatch.from_char_spans([[(0, 2)]], [[[0, 2]]], backend='reference'); "
        "assert 'mta_fast._C' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_doctor_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast import doctor

    if BINARY is not None:
        report = doctor.report()
        assert f"C++ kernels {_extension.build_info()}" in report
        assert "span alignment: cpp" in report
        assert "cpp: ready for cpu tensors" in report
    for function in (_extension.build_info, _extension.why_missing):
        function.cache_clear()
    monkeypatch.setattr(_extension, "_binary", lambda: None)
    report = doctor.report()
    assert "cpp: mta_fast._C is not built; install torch and a C++ compiler, then run in the checkout: pip" in report
    assert "span alignment: reference" in report
    assert "cpp" in BACKENDS


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MTA_FAST_NO_EXTENSION": "1"}, "MTA_FAST_NO_EXTENSION is set"),
        ({"CXX": "/nowhere/c++ -O2"}, "no C++ compiler '/nowhere/c++' was found; install one, or set CXX"),
    ],
)
def test_setup_says_why_it_builds_none(variables: dict[str, str], reason: str) -> None:
    ran = _setup("--name", **variables)
    assert ran.stdout.splitlines()[-1] == "mta-fast"
    assert f"mta-fast: installing without its C++ kernels: {reason}" in ran.stderr


@built
def test_a_compile_error_is_an_error(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mta_fast").mkdir()
    shutil.copy(ROOT / "mta_fast/_version.py", tmp_path / "mta_fast")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/wrong.cpp").write_text("int f() { return wrong; }\n")
    ran = _setup("build_ext", folder=tmp_path)
    assert ran.returncode != 0
    assert "wrong" in ran.stdout + ran.stderr


def test_flags_suit_any_processor() -> None:
    assert "-march" not in SETUP
    assert "-mtune" not in SETUP
    assert "-ffast-math" not in SETUP
