"""What a user installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_the_package_and_only_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for name in ("mta_fast", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(tree)], check=True)
    (wheel,) = tmp_path.glob("mta_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mta_fast", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert {
        "mta_fast/py.typed",
        "mta_fast/data/sample.jsonl",
        "mta_fast/ops/importance.py",
        "mta_fast/kernels/importance.py",
    } <= set(names)
    code = (
        "from mta_fast.distill.data import load_sample; import mta_fast; print(mta_fast.__file__, len(load_sample()))"
    )
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    assert str(tmp_path) in ran.stdout
