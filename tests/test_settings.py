"""The YAML of a run: types, overrides, nearest names, the MTAConfig it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

from mta_fast.config import MTAConfig
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = """
output_dir: out
teacher: {path: big}
student: {path: small}
data: {train: sample}
"""


def _settings(folder: Path, text: str, *overrides: str) -> TrainSettings:
    path = folder / "run.yaml"
    path.write_text(text)
    return TrainSettings.from_yaml(path, overrides)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    settings = _settings(
        tmp_path,
        MINIMAL,
        "training.learning_rate=1e-4",
        "mta.lambda_hid=0",
        "student.lora.dropout=0",
        "spans.n_process=2",
        "data.columns={output: response}",
    )
    assert settings.training == {"learning_rate": 1e-4}
    assert isinstance(settings.training["learning_rate"], float)
    assert settings.student.lora is not None
    assert (settings.student.lora.r, settings.student.lora.dropout) == (16, 0.0)
    assert settings.spans.n_process == 2
    assert settings.data.columns == {"output": "response"}
    assert settings.base.loss == "srkl"
    config = settings.mta_config(10, 30)
    assert config is not None
    assert config.layer_pairs == ((5, 15), (8, 24), (10, 30))
    assert config.granularity == ("word", "phrase", "phrase")
    assert config.lambda_hid == 0


def test_a_run_leaves_settings_that_read_the_same(tmp_path: Path) -> None:
    from mta_fast import _yaml

    settings = _settings(tmp_path, MINIMAL, "training.learning_rate=5e-5", "student.lora.r=4")
    (tmp_path / "again.yaml").write_text(_yaml.dumps(settings.to_dict()))
    assert TrainSettings.from_yaml(tmp_path / "again.yaml") == settings


def test_mta_presets_layers_and_off(tmp_path: Path) -> None:
    preset = _settings(tmp_path, MINIMAL, "mta={preset: opt, lambda_hid: 0.5}").mta_config(24, 32)
    assert preset == MTAConfig.paper("opt", lambda_hid=0.5)
    own = _settings(tmp_path, MINIMAL, "mta={layer_pairs: [[1, 2]], granularity: word}").mta_config(4, 8)
    assert own == MTAConfig(((1, 2),), ("word",))
    assert _settings(tmp_path, MINIMAL, "mta=false").mta_config(4, 8) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig={}", "unknown key trainig, did you mean 'training'"),
        ("student.lora.rank=4", "unknown key student.lora.rank"),
        ("data.max_rows=many", "data.max_rows: expected int or null, got 'many'"),
        ("student.compile=1", "student.compile: expected bool, got 1"),
        ("spans=2", "spans: expected a mapping, got 2"),
        ("output_dir=3", "output_dir: expected str, got 3"),
        ("mta=3", "mta: expected a mapping or bool, got 3"),
        ("data.columns={output: 3}", r"data.columns.output: expected str, got 3"),
        ("data.columns={3: a}", "data.columns.3: expected a name as key, got 3; put it in quotes"),
        ("data.columns=[a]", r"data.columns: expected a mapping, got \['a'\]"),
        ("mta={1: 2}", "mta.1: expected a name as key, got 1; put it in quotes"),
        ("data={train: a, 1: 2}", "data.1: expected a name as key, got 1; put it in quotes"),
        ("student.lora.target_modules=[a, 2]", r"student.lora.target_modules\[1\]: expected str, got 2"),
        ("student.lora.target_modules=a", "student.lora.target_modules: expected a list of str or null, got 'a'"),
        ("output_dir=''", "^output_dir: expected the name of a file or folder, got ''"),
        ("nothing", "expected key=value, such as training.learning_rate=1e-4"),
        ("output_dir.x=1", "expected 'output_dir' to hold further keys, it is 'out'"),
        ("data.train=[", "expected YAML, got a text that is none"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _settings(tmp_path, MINIMAL, override)


def test_missing_and_wrong_values(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher.path: expected a value, got none"):
        _settings(tmp_path, MINIMAL.replace("{path: big}", "{dtype: float32}"))
    with pytest.raises(InputError, match="expected a mapping of names to values, got list"):
        _settings(tmp_path, "- 1")
    with pytest.raises(InputError, match="mta.preset: expected one of gpt2, .* got 'gpt3'"):
        _settings(tmp_path, MINIMAL, "mta.preset=gpt3").mta_config(4, 8)
    with pytest.raises(InputError, match="unknown key 'lambda_dsaa', did you mean 'lambda_dsa'"):
        _settings(tmp_path, MINIMAL, "mta.lambda_dsaa=1").mta_config(4, 8)


@pytest.mark.parametrize("text", ["1e-4", "1E5", "-1e-4", "1.5", ".5", "1_000.5", "1.", "-.inf"])
def test_numbers_as_people_write_them(text: str) -> None:
    from mta_fast import _yaml

    assert isinstance(_yaml.loads(text, "here"), float)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("e5", "e5"),
        ("1e", "1e"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("v1.2", "v1.2"),
    ],
)
def test_what_is_no_float(text: str, value: Any) -> None:
    from mta_fast import _yaml

    assert _yaml.loads(text, "here") == value


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    pytest.importorskip("transformers")
    from mta_fast.distill.training.run import training_arguments

    settings = TrainSettings.from_yaml(
        path, ["training.use_cpu=true", "training.bf16=false", "training.report_to=none"]
    )
    assert (settings.mta_config(24, 24) is None) == (settings.teacher is None)
    assert training_arguments(settings).projection_learning_rate == 5e-4


@pytest.mark.parametrize(
    ("name", "rate", "batch", "steps_in_one", "epochs", "decay", "warmup"),
    [  # the table of the maths; with DistiLLM-2 a warm-up and no weight decay
        ("gpt2", 1e-4, 16, 1, 5, 0.01, 0),
        ("qwen1.5", 1e-4, 8, 2, 5, 0.01, 0),
        ("opt", 5e-4, 8, 2, 5, 0.01, 0),
        ("gpt2-fdd", 1e-4, 16, 1, 5, 0.01, 0),
        ("qwen1.5-fdd", 1e-4, 8, 2, 5, 0.01, 0),
        ("qwen1.5-distillm2", 5e-5, 4, 2, 5, 0.0, 0.1),
        ("opt-distillm2", 5e-4, 4, 2, 3, 0.0, 0.1),
    ],
)
def test_recipes_have_the_paper_s_settings(
    name: str, rate: float, batch: int, steps_in_one: int, epochs: int, decay: float, warmup: float
) -> None:
    settings = TrainSettings.from_yaml(ROOT / "examples" / f"{name}.yaml")
    training = {"gradient_accumulation_steps": 1, "warmup_steps": 0} | settings.training
    expected = {
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps_in_one,
        "num_train_epochs": epochs,
        "weight_decay": decay,
        "warmup_steps": warmup,
        "max_length": 256,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "projection_learning_rate": 5e-4,
        "seed": 42,
    }
    assert {key: training[key] for key in expected} == expected
    assert settings.data.max_prompt_length == 128
    scripts: dict[str, Any] = {"distillm": {"validation_loss": "cross_entropy", "count_step": True}, "fdd": {"tau": 2}}
    for option, value in scripts.get(settings.base.loss, {}).items():
        assert settings.base.options[option] == value


# --- the schema for editors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    pytest.importorskip("transformers")
    jsonschema = pytest.importorskip("jsonschema")
    from mta_fast.distill.training.schema import json_schema

    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_follow_the_schema(validator: Any, path: Path) -> None:
    from mta_fast import _yaml

    assert not [error.message for error in validator.iter_errors(_yaml.read(path))]


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("trainig={}", ""),
        ("student.lora.rank=4", "student.lora"),
        ("student.dtype=float8", "student.dtype"),
        ("mta.weighting=heavy", "mta"),
        ("mta.lambda_dsaa=1", "mta"),
        ("training.learning_rat=1", "training"),
        ("training.max_steps=many", "training.max_steps"),
        ("training.lr_scheduler_type=[1]", "training.lr_scheduler_type"),
        ("base.loss=distilm", "base.loss"),
    ],
)
def test_the_schema_finds_what_is_wrong(validator: Any, override: str, place: str) -> None:
    from mta_fast import _yaml

    values = _yaml.loads(MINIMAL, "here")
    assert not list(validator.iter_errors(values))
    key, _, value = override.partition("=")
    inner = values
    *path, last = key.split(".")
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = _yaml.loads(value, "here")
    assert {".".join(error.absolute_path) for error in validator.iter_errors(values)} == {place}


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from mta_fast.__main__ import main

    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"student", "teacher", "mta", "training"} <= schema["properties"].keys()
    described = [field for part in schema["$defs"].values() for field in part.get("properties", {}).values()]
    assert all(field.get("description") for field in described)
