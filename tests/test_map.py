"""CONTRIBUTING's map names every source file once, and its walk names functions that are where it says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = ("mta_fast", "kernels", "csrc", "bench", "tests")


def _section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def _mapped() -> list[str]:
    """Every file that the map names."""
    found = []
    for part in _section("Map of the house").split("\n### ")[1:]:
        heading = re.match(r"`([\w/]+)/`\n", part)
        assert heading, part[:40]
        for names in re.findall(r"^- (`[^:]+`): \S", part, re.MULTILINE):
            found += [f"{heading[1]}/{name}" for name in re.findall(r"`([^`]+)`", names)]
    return found


def _sources() -> set[str]:
    """Every source file with something in it; mta_fast/kernels is a link to kernels/."""
    files = (path for name in FOLDERS for kind in ("py", "cpp", "h") for path in (ROOT / name).rglob(f"*.{kind}"))
    kept = (path for path in files if path.stat().st_size and ROOT / "mta_fast/kernels" not in path.parents)
    return {path.relative_to(ROOT).as_posix() for path in kept}


def test_the_map_names_every_file_once() -> None:
    mapped = _mapped()
    assert {name: count for name, count in Counter(mapped).items() if count > 1} == {}
    assert sorted(_sources() - set(mapped)) == []  # not on the map
    assert sorted(set(mapped) - _sources()) == []  # not in the folders


def test_the_walk_passes_what_there_is() -> None:
    steps = re.split(r"^\d+\. ", _section("One row, from YAML to the kernel"), flags=re.MULTILINE)[1:]
    assert len(steps) >= 10
    passed = 0
    for step in steps:
        text = " ".join(step.split())
        for name in re.findall(r"`([\w./]+\.(?:py|cpp))`", text):
            assert _files(name), name
        for name, functions in re.findall(r"`([\w./]+\.py)`,((?:(?: and(?: its)?)? `\w+(?:\.\w+)?`,?)+)", text):
            for function in re.findall(r"`(?:\w+\.)?(\w+)`", functions):
                passed += 1
                found = [re.search(rf"^ *(?:def|class) {function}\b", file, re.MULTILINE) for file in _files(name)]
                assert any(found), f"{function} in {name}"
    assert passed >= 12


def _files(name: str) -> list[str]:
    """The text of the package's files with this end of a path."""
    paths = [path for path in _sources() if not path.startswith(("tests/", "bench/"))]
    return [(ROOT / path).read_text(encoding="utf-8") for path in paths if f"/{path}".endswith(f"/{name}")]
