"""The release workflow, which can't run here: it parses, and it names what setup.py and the Makefile name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text()


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_workflow_is_whole(workflow: dict[str, Any]) -> None:
    assert workflow[True] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}  # YAML reads "on" as true
    jobs = workflow["jobs"]
    assert set(jobs) == {"sdist", "wheel", "publish"}
    for job in jobs.values():
        assert set(job) <= {"needs", "if", "strategy", "runs-on", "environment", "permissions", "steps"}
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    assert jobs["publish"]["needs"] == ["sdist", "wheel"]
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_a_wheel_for_each_platform(workflow: dict[str, Any]) -> None:
    platforms = {row["platform"]: row["runner"] for row in workflow["jobs"]["wheel"]["strategy"]["matrix"]["include"]}
    assert set(platforms) == {"linux-x86_64", "linux-aarch64", "macos-arm64"}
    assert platforms["linux-aarch64"].endswith("-arm")
    count = re.search(r"wc -l\)\" -eq (\d+)", str(workflow["jobs"]["publish"]["steps"]))
    assert count
    assert int(count[1]) == len(platforms)


def test_wheels_are_built_as_setup_says(workflow: dict[str, Any], settings: dict[str, Any]) -> None:
    build = settings["tool"]["cibuildwheel"]
    python = re.search(r'PYTHON_TAG = "(cp3\d+)"', SETUP)
    assert python
    oldest = f"{python[1][2]}.{python[1][3:]}"
    assert build["build"] == f"{python[1]}-*"  # the oldest Python: the wheel serves the later ones
    for job in ("sdist", "wheel"):
        made_with = [
            step["with"]["python-version"] for step in workflow["jobs"][job]["steps"] if "setup-python" in str(step)
        ]
        assert made_with == [oldest]
    torch = re.search(r"TARGET_TORCH = \((\d+), (\d+)\)", SETUP)
    assert torch
    assert f"torch>={torch[1]}.{torch[2]}" in settings["project"]["dependencies"]
    assert settings["project"]["requires-python"] == f">={oldest}"
    assert {"torch", "ninja", "setuptools"} <= set(build["before-build"].split())
    assert build["test-command"] == "python -I {project}/tests/smoke.py"
    assert (ROOT / "tests/smoke.py").is_file()


def test_torch_libraries_stay_outside(settings: dict[str, Any]) -> None:
    from mta_fast import _extension

    binary = _extension._binary()
    if binary is None:
        pytest.skip("the C++ kernels are not built here")
    needed = set(re.findall(rb"lib(?:torch|c10)\w*\.so", binary.read_bytes()))
    excluded = re.findall(r"--exclude (\S+)", settings["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"])
    assert needed
    assert {name.decode() for name in needed} == set(excluded)
