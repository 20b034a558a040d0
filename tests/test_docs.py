"""Every Python example of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

from mta_fast.backends import BACKENDS
from mta_fast.distill.data import load_sample

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]


def _examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mta_fast.backends.BACKENDS", dict(BACKENDS))
    tokenizer = make_tokenizer()
    names: dict[str, Any] = {
        "student": make_model("gpt2", vocabulary=len(tokenizer)),
        "teacher": make_model("gpt2", layers=8, width=48, vocabulary=len(tokenizer)),
        "tokenizer": tokenizer,
        "rows": [dict(row) for row in load_sample()[:4]],
    }
    before = [parameter.detach().clone() for parameter in names["student"].parameters()]
    examples = _examples(page)
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), names)
    if page == "README.md":
        assert names["loss"].isfinite()
        moved = [not torch.equal(a, b) for a, b in zip(before, names["student"].parameters(), strict=True)]
        assert any(moved)


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page: str) -> None:
    assert not re.findall(r"^[A-Z_]{5,}$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_figures_are_those_of_the_results_file() -> None:
    rows = [line for line in (ROOT / "bench/results/reference.md").read_text().splitlines() if line.startswith("|")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(rows) > 3
    assert all(row in readme for row in rows)


def test_options_named_in_the_docs_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= set(targets)
    for path in re.findall(r"`((?:mta_fast|bench|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
