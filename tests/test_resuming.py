"""Going on with a run: checkpoints of earlier versions, damaged files, settings that were changed since."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from safetensors.torch import load_file

from mta_fast.__main__ import main

# runs of this config at version 0.1 (max_steps 4, saved at step 2; LoRA: student.lora.r=2), stopped after step 2;
# expected.safetensors: the model file of their checkpoint-4
EARLIER = Path(__file__).parent / "fixtures/earlier"


@pytest.fixture
def earlier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of an earlier version in the working directory, with its teacher, student and rows; its kind."""
    kind: str = request.param
    if kind == "lora":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(300)
    for name, layers, width in (("teacher", 4, 16), ("student", 2, 8)):
        make_model("llama", layers, width, vocabulary=len(tokenizer)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copytree(EARLIER / kind, "run")
    return kind


@pytest.mark.parametrize("earlier", ["full", "lora"], indirect=True)
def test_a_run_of_an_earlier_version_goes_on(earlier: str) -> None:
    assert main(["train", "run/config.yaml", "--resume"]) == 0
    name = "adapter_model" if earlier == "lora" else "model"
    final, expected = load_file(f"run/checkpoint-4/{name}.safetensors"), load_file("run/expected.safetensors")
    assert final.keys() == expected.keys()
    for key, value in final.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
