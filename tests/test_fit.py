"""Mistakes in settings are found before any model is loaded, each in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from mta_fast.__main__ import main
from mta_fast.distill.responses.generation import GenerationSettings, encode_for
from mta_fast.distill.training import run
from mta_fast.distill.training.fit import max_positions
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs and tokenizers of models without weights, and rows."""
    place, tokenizer = tmp_path_factory.mktemp("fit"), make_tokenizer()
    size = len(tokenizer)
    for name, family, layers, vocabulary in (
        ("teacher", "gpt2", 8, size),
        ("student", "gpt2", 4, size),
        ("small", "llama", 4, size - 1),
    ):
        make_model(family, layers, vocabulary=vocabulary).config.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "rows.jsonl").write_text('{"instruction": "One two?", "output": "Three."}\n' * 4)
    (place / "empty.jsonl").write_text("")
    return place


def _settings(folder: Path, training: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "teacher": {"path": str(folder / "teacher")},
        "student": {"path": str(folder / "student")},
        "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")},
        "training": {"use_cpu": True, "max_length": 200} | training,
    } | changes


def _refusal(folder: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    from mta_fast import _yaml

    (folder / "run.yaml").write_text(_yaml.dumps(_settings(folder, {})))
    options = [part for change in changes for part in ("--override", change.replace("HERE", str(folder)))]
    assert main(["train", str(folder / "run.yaml"), *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mta-fast: ")
    return line


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"output_dir": "x"}, "training.output_dir: expected output_dir at the top level of the file"),
        ({"learning_rate": "fast"}, "training.learning_rate: expected float, got 'fast'"),
        ({"max_steps": 1.5}, "training.max_steps: expected int, got 1.5"),
        ({"bf16": "maybe"}, "training.bf16: expected bool, got 'maybe'"),
        ({"seed": "abc"}, "training.seed: expected int, got 'abc'"),
        ({"max_length": 1}, "training.max_length: expected a number >= 2, got 1"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps: expected a number >= 1, got 0"),
        ({"num_train_epochs": 0}, "training.num_train_epochs: expected a number > 0, got 0"),
        ({"report_to": "nonsense"}, "training: nonsense is not supported"),
        ({"optim": "adamw_bnb_8bit"}, "training: You need to install `bitsandbytes`"),
        ({"per_device_train_batch_size": 0}, "training: batch_size should be a positive integer"),
        ({"per_device_eval_batch_size": 0}, "training: batch_size should be a positive integer"),
        ({"adam_beta1": 2}, "training: Invalid beta parameter"),
        ({"lr_scheduler_kwargs": {"none_such": 1}}, "training: .*unexpected keyword argument 'none_such'"),
        ({"fsdp": "full_shard"}, "training: Using fsdp only works in distributed training"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "training: .*requires the save and eval strategy"),
        ({"metric_for_best_model": "bleu"}, "training.metric_for_best_model: expected one of loss, base, dsa, hid"),
    ],
)
def test_training_arguments(folder: Path, training: dict[str, Any], message: str) -> None:
    settings = _settings(folder, training)
    with pytest.raises(InputError, match=message):
        run.training_arguments(_parsed(folder, settings))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "training",
    [{"eval_strategy": "steps", "eval_steps": 1}, {"load_best_model_at_end": True, "save_strategy": "no"}],
)
def test_evaluation_without_data(folder: Path, training: dict[str, Any]) -> None:
    settings = _settings(folder, training, data={"train": "sample"})
    with pytest.raises(InputError, match=r"expected an evaluation set beside .*, data.eval is null; give one"):
        run.training_arguments(_parsed(folder, settings))


def test_a_report_without_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(InputError, match="training: WandbCallback requires wandb to be installed"):
        run.training_arguments(_parsed(folder, _settings(folder, {"report_to": "wandb"})))


def _parsed(folder: Path, values: dict[str, Any]) -> TrainSettings:
    from mta_fast import _yaml

    (folder / "one.yaml").write_text(_yaml.dumps(values))
    return TrainSettings.from_yaml(folder / "one.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.eval=HERE/empty.jsonl"], "expected at least one usable row, got none"),
        (["training.max_length=2000"], "student: expected positions for max_length = 2000 tokens, it has 1024"),
        (["student.path=HERE/small"], "student: expected embeddings for the tokenizer's"),
        (["teacher.path=HERE/small"], "teacher: expected embeddings for the tokenizer's"),
        (["mta.layer_pairs=[[4, 9]]"], "teacher layers: expected hidden-state indices 0 to 8"),
        (["base.loss=srlk"], "did you mean 'srkl'"),
        (["data.template=papre"], "did you mean 'paper'"),
    ],
)
def test_what_does_not_fit(folder: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _refusal(folder, capsys, *changes)  # there are no weights to load


def test_positions() -> None:
    assert {family: max_positions(make_model(family)) for family in ("gpt2", "opt", "gptj", "llama")} == {
        "gpt2": 1024,
        "opt": 2048,
        "gptj": 2048,
        "llama": None,
    }


def test_prompts_and_stop_texts_that_a_model_has_no_tokens_for() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
    with pytest.raises(InputError, match="stop: expected a text that the tokenizer can write, got '###'; give another"):
        encode_for(GPT2Config(), tokenizer, ["one"], GenerationSettings(max_new_tokens=2))
    settings = GenerationSettings(max_new_tokens=2, stop=None)
    assert encode_for(GPT2Config(vocab_size=2), tokenizer, ["one two"], settings) == [[0, 1]]
    with pytest.raises(InputError, match=r"prompt of row 1: expected tokens below 1 \(the model's vocabulary\), got 1"):
        encode_for(GPT2Config(vocab_size=1), tokenizer, ["one", "two"], settings)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_the_rehearsal_needs_no_lengths(folder: Path, strategy: str) -> None:
    from mta_fast import _yaml

    (folder / "run.yaml").write_text(_yaml.dumps(_settings(folder, {"train_sampling_strategy": strategy})))
    arguments = run.training_arguments(TrainSettings.from_yaml(folder / "run.yaml"))
    assert arguments.train_sampling_strategy == strategy
