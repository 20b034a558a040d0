"""What a YAML file for ``mta-fast train`` holds: every key, its type and its default."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mta_fast import _yaml
from mta_fast.config import PRESETS, MTAConfig, nearest
from mta_fast.errors import InputError
from mta_fast.files import user_path, user_source
from mta_fast.layers import LayerMap
from mta_fast.spans.extract import DEFAULT_MODEL


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA (or DoRA) adapter on the student, by PEFT.

    Attributes:
        r, alpha, dropout: rank, scale and dropout.
        target_modules: names of linear layers; None: PEFT's choice for the architecture.
        dora: weight-decomposed.
    """

    r: int = 16
    alpha: int = 64
    dropout: float = 0.1
    target_modules: list[str] | None = None
    dora: bool = False


@dataclass(frozen=True)
class ModelSettings:
    """A model.

    Attributes:
        path: folder, hub name, or package:NAME (``models.load_model``).
        tokenizer: where its tokenizer is, if elsewhere.
        dtype: float32, bfloat16 or float16; a half-precision teacher saves memory.
        options: passed to ``from_pretrained``, such as {attn_implementation: flash_attention_2, revision: ...}.
    """

    path: str
    tokenizer: str | None = None
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _open_paths(self, "path", "tokenizer")


@dataclass(frozen=True)
class StudentSettings(ModelSettings):
    """The student.

    Attributes:
        lora: train an adapter instead of all weights.
        compile: run ``student.compile()``.
    """

    lora: LoraSettings | None = None
    compile: bool = False


@dataclass(frozen=True)
class DataSettings:
    """Text.

    Attributes:
        train: "sample", a .jsonl file, or a data set (``data.load_rows``); for distillm2 the pairs that
            ``mta-fast generate`` makes (``pairs.load_pairs``).
        eval: likewise; None: no evaluation.
        train_split, eval_split: splits of a data set.
        columns: the data's own names where they are not prompt, output, instruction or input.
        template: paper, plain, chat, or a text with {instruction} and {input}.
        max_prompt_length: tokens; rows with longer prompts are left out and counted. None: room for one token.
        max_rows: read at most so many rows of each.
        skip_bad_rows: leave out and count rows that can't be read.
    """

    train: str
    eval: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    columns: dict[str, str] = field(default_factory=dict)
    template: str = "paper"
    max_prompt_length: int | None = None
    max_rows: int | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        _open_paths(self, "train", "eval")


@dataclass(frozen=True)
class SpanSettings:
    """Where spans come from.

    Attributes:
        model: a spaCy pipeline.
        cache: folder of the span cache; None: ``$MTA_FAST_CACHE`` or ``~/.cache/mta_fast/spans``.
        n_process: processes that parse.
        skip_unparsable: leave a text over which these die again and again without spans, and say so.
    """

    model: str = DEFAULT_MODEL
    cache: str | None = None
    n_process: int = 1
    skip_unparsable: bool = False

    def __post_init__(self) -> None:
        _open_paths(self, "model", "cache")


@dataclass(frozen=True)
class BaseSettings:
    """The base method.

    Attributes:
        loss: srkl, skl, forward_kl, reverse_kl, jsd, cross_entropy, distillm, distillm2, fdd, or none.
        options: such as {alpha: 0.1}, or {schedule: decreasing, generation: {max_new_tokens: 128}} of distillm.
    """

    loss: str = "srkl"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """A whole run.

    Attributes:
        student: what is trained.
        teacher: what it learns from; null to learn from the data alone (base cross_entropy, mta false).
        output_dir: checkpoints, logs, pictures and the exported student go here.
        mta: fields of MTAConfig and, if wanted, ``preset``; false: the base loss alone. Without ``layer_pairs`` and
            ``preset`` the layers are mapped proportionally, words at the first.
        training: fields of MTATrainingArguments, such as learning_rate.
    """

    student: StudentSettings
    data: DataSettings
    output_dir: str
    teacher: ModelSettings | None = None
    spans: SpanSettings = field(default_factory=SpanSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    mta: dict[str, Any] | bool = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        user_path(self.output_dir)  # an empty one would be the current folder
        _open_paths(self, "output_dir")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
        """Read a file; ``overrides`` are "key=value" with dotted keys and YAML values, such as "mta.lambda_hid=0".

        Raises:
            InputError: no YAML, an unknown key (names the nearest), a missing one, a value of another type.
        """
        values = _yaml.read(path)
        for override in overrides:
            _override(values, override)
        settings: TrainSettings = _build(cls, values, "")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return asdict(self)

    def mta_config(self, student_layers: int, teacher_layers: int | None) -> MTAConfig | None:
        """The MTAConfig for models of these depths; None when MTA is off.

        Raises:
            InputError: an unknown preset or field, or no teacher.
        """
        if self.mta is False:
            return None
        if teacher_layers is None:
            raise InputError("teacher: expected a model, as MTA compares two, got none; give one, or mta: false")
        changes = dict(self.mta) if isinstance(self.mta, dict) else {}
        preset = changes.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                raise InputError(f"mta.preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
            return MTAConfig.paper(preset, **changes)
        if "layer_pairs" not in changes:
            changes["layer_pairs"] = LayerMap.proportional(student_layers, teacher_layers).pairs
        count = len(changes["layer_pairs"])
        return MTAConfig.from_dict({"granularity": ("word", *("phrase",) * (count - 1))} | changes)


def _open_paths(settings: Any, *names: str) -> None:
    """Replace ``~`` in fields that may hold a path, so that every reader of the settings means the same place."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            object.__setattr__(settings, name, user_source(value))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: expected key=value, such as training.learning_rate=1e-4")
    *path, last = key.split(".")
    place = values
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise InputError(f"override {override!r}: expected {part!r} to hold further keys, it is {place!r}")
    place[last] = _yaml.loads(text, f"override {override!r}")


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind``: a settings class, a plain type, or a union of these."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return _build_settings(option, value, where)
        plain = typing.get_origin(option) or option
        if is_dataclass(option) or not _is_a(value, plain):
            continue
        return float(value) if plain is float else value
    names = " or ".join("a mapping" if is_dataclass(o) else getattr(o, "__name__", str(o)) for o in options)
    raise InputError(f"{where}: expected {names.replace('NoneType', 'null')}, got {value!r}")


def _is_a(value: Any, plain: Any) -> bool:
    if plain is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, plain)


def _build_settings(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {prefix}{key}{nearest(key, known)}; expected {', '.join(known)}")
    for name, described in known.items():
        if name not in values and described.default is MISSING and described.default_factory is MISSING:
            raise InputError(f"{prefix}{name}: expected a value, got none")
    return kind(**{key: _build(hints[key], value, f"{prefix}{key}") for key, value in values.items()})
