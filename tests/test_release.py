"""The workflows, which can't run here: they parse, and they name what setup.py and the Makefile name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text()


def _workflow(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    return made


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return _workflow("release")


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


# --- tests of changes --------------------------------------------------------------------------------------------


def test_changes_are_tested(settings: dict[str, Any]) -> None:
    tests, release = _workflow("test"), _workflow("release")
    assert tests[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    assert tests["permissions"] == {"contents": "read"}
    (job,) = tests["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    assert len(pythons) == 2
    assert f">={pythons[0]}" == settings["project"]["requires-python"]
    used = {step["uses"] for step in job["steps"] if "uses" in step}
    assert used <= {step["uses"] for part in release["jobs"].values() for step in part["steps"] if "uses" in step}
    asked = [re.fullmatch(r"make (\S+) PYTHON=python", step["run"]) for step in job["steps"] if "run" in step]
    assert [found and found[1] for found in asked] == ["install", "lint", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"install", "lint", "test"} <= set(targets)
    (cached,) = [step["with"]["cache-dependency-path"] for step in job["steps"] if "cache" in step.get("with", {})]
    assert all((ROOT / name).is_file() for name in cached.split())


def test_lint_and_the_hooks_run_the_same_tools(settings: dict[str, Any]) -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    linted = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[1]))
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert linted == {hook["entry"].split()[0].rpartition("/")[2] for hook in local["hooks"]}
    packages = {"lint-imports": "import-linter"}
    wanted = {packages.get(tool, tool) for tool in linted}
    assert wanted <= {re.split("[>=]", name)[0] for name in settings["project"]["optional-dependencies"]["dev"]}
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert wanted <= {line.partition("==")[0] for line in pinned}
