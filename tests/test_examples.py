"""Every recipe of examples/: a few steps of it, with tiny random models of its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from mta_fast.config import PRESETS, MTAConfig
from mta_fast.distill.data import load_sample
from mta_fast.distill.methods.fdd import FDD
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.training.checkpoints import load_loss
from mta_fast.distill.training.run import train
from mta_fast.distill.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [f"{name}.yaml" for name in PRESETS]
TEACHERS = ["teacher-gpt2.yaml", "teacher-qwen1.5.yaml", "teacher-opt.yaml"]
FAMILIES = {"gpt2": "gpt2", "qwen1.5": "qwen2", "opt": "opt"}


def _family(name: str) -> str:
    base = name.removeprefix("teacher-").removesuffix(".yaml")
    return FAMILIES[base.removesuffix("-fdd").removesuffix("-distillm2")]


def _model(folder: Path, family: str, layers: int, width: int) -> Path:
    make_model(family, layers, width, vocabulary=len(make_tokenizer())).save_pretrained(folder)
    return folder


def _rows(folder: Path, pairs: bool) -> Path:
    rows = load_sample()[:12]
    names = ("chosen", "rejected") if pairs else ("output",)
    written = [
        {"prompt": row["prompt"]} | {name: rows[i - k]["output"] for k, name in enumerate(names)}
        for i, row in enumerate(rows)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return file


def _changed(tmp_path: Path, name: str, **changes: Any) -> list[str]:
    """Overrides that make a recipe small; what it says of method, layers and optimiser stays."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = _rows(tmp_path, "distillm2" in name)
    small = {
        "output_dir": tmp_path / "out",
        "student.tokenizer": tmp_path / "tokenizer",
        "data.train": rows,
        "data.columns": "{}",
        "data.max_prompt_length": 250,
        "spans.cache": tmp_path / "cache",
        "spans.n_process": 1,
        "training.max_length": 300,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.logging_steps": 1,
        "training.save_strategy": "no",
        "training.bf16": "false",
        "training.use_cpu": "true",
        "training.report_to": "none",
        "training.disable_tqdm": "true",
    }
    return [f"{key}={value}" for key, value in (small | changes).items()]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(tmp_path: Path, name: str) -> None:
    preset, family = PRESETS[name.removesuffix(".yaml")], _family(name)
    changes = {
        "student.path": _model(tmp_path / "student", family, max(preset.student), 32),
        "teacher.path": _model(tmp_path / "teacher", family, max(preset.teacher), 48),
        "teacher.tokenizer": tmp_path / "tokenizer",
        "teacher.dtype": "float32",
    }
    changes["data.eval"] = tmp_path / "rows.jsonl"
    if "-" not in name:  # DistiLLM: let the student write at once
        changes |= {"base.options.threshold": 1, "base.options.generation.max_new_tokens": 8}
    settings = TrainSettings.from_yaml(ROOT / "examples" / name, _changed(tmp_path, name, **changes))
    config = settings.mta_config(max(preset.student), max(preset.teacher))
    assert config is not None
    assert config.layer_pairs == tuple(zip(preset.student, preset.teacher, strict=True))
    assert train(settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 2
    assert (tmp_path / "out" / "student" / "config.json").is_file()
    assert load_loss(tmp_path / "out" / "student") is None  # nothing of MTA in it


@pytest.mark.parametrize("name", RECIPES + TEACHERS)
def test_base_methods_are_made_as_written(name: str) -> None:
    """Its own options, and all it needs without MTA: the baseline is the same file with mta: false."""
    settings = TrainSettings.from_yaml(ROOT / "examples" / name)
    method = base_method(settings.base.loss, **settings.base.options)
    if isinstance(method, FDD):
        assert method.layer_pairs == MTAConfig.paper(name.removesuffix(".yaml")).layer_pairs


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_trains_without_a_teacher(tmp_path: Path, name: str) -> None:
    student = _model(tmp_path / "student", _family(name), 4, 32)
    changes = {"student.path": student, "data.eval": tmp_path / "rows.jsonl"}
    settings = TrainSettings.from_yaml(ROOT / "examples" / name, _changed(tmp_path, name, **changes))
    assert settings.teacher is None
    assert train(settings) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["eval_base"] > 0
