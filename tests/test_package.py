"""What a user installs: the source distribution, and the wheel that is built from it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in ("mta_fast", "kernels", "csrc", "tests", "bench"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    _run("setup.py", "--quiet", "sdist", cwd=tree)
    (made,) = (tree / "dist").glob("mta_fast-*.tar.gz")
    return made


def _run(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"MTA_FAST_NO_EXTENSION": "1"}  # `make smoke` builds and runs the compiled wheel
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, check=True, capture_output=True, text=True, env=environment
    )
    return ran.stdout


def test_sdist_holds_what_the_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = [member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isfile()]
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= set(files)
    assert {f"mta_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= set(files)
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"} <= set(files)
    folders = {file.split("/")[0] for file in files if "/" in file}
    assert folders == {"csrc", "mta_fast", "mta_fast.egg-info", "tests"}
    assert [file for file in files if file.startswith("tests/")] == ["tests/smoke.py"]  # tries the wheel
    assert not [file for file in files if file.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_only_it(sdist: Path, tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    _run(*build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("mta_fast-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")  # without the extension it is pure Python
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mta_fast", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert {
        "mta_fast/py.typed",
        "mta_fast/data/sample.jsonl",
        "mta_fast/ops/importance.py",
        "mta_fast/kernels/importance.py",
        *(f"mta_fast/inspection/templates/{path.name}" for path in (ROOT / "mta_fast/inspection/templates").iterdir()),
    } <= set(names)
    code = (
        "from mta_fast.distill.data import load_sample; import mta_fast; print(mta_fast.__file__, len(load_sample()))"
    )
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    assert str(tmp_path) in _run("-c", code, cwd=tmp_path / "site")


def test_modules_of_distill_are_found_under_their_earlier_names() -> None:
    """As pages, scripts and pickled arguments name them; each is the module itself."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from mta_fast.distill._moved import MOVED

    for earlier, now in MOVED.items():
        module = importlib.import_module(earlier)
        assert module is importlib.import_module(now)
        assert module.__name__ == now
        assert module.__spec__ is not None
        assert module.__spec__.name == now
    assert {"mta_fast.distill.losses", "mta_fast.distill.arguments"} <= MOVED.keys()
