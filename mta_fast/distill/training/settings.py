"""What a YAML file for ``mta-fast train`` holds: every key, its type and its default."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from mta_fast import _yaml
from mta_fast.choices import check_choice, nearest
from mta_fast.config import PRESETS, MTAConfig, default_granularity
from mta_fast.errors import InputError
from mta_fast.files import user_path, user_source
from mta_fast.layers import LayerMap
from mta_fast.spans.extract import DEFAULT_MODEL


def _folder(path: str) -> str:
    user_path(path)  # an empty one would be the current folder
    return user_source(path)


Source = Annotated[StrictStr, AfterValidator(user_source)]  # ``~`` replaced, so that every reader means the same place
Folder = Annotated[StrictStr, AfterValidator(_folder)]
Dtype = Literal["float32", "bfloat16", "float16"]
_OF_A_RUN = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=_OF_A_RUN)
class LoraSettings:
    """A LoRA (or DoRA) adapter on the student, by PEFT."""

    r: StrictInt = 16
    """Rank."""
    alpha: StrictInt = 64
    """Scale."""
    dropout: StrictFloat = 0.1
    """Share of the adapter's inputs that is dropped."""
    target_modules: list[StrictStr] | None = None
    """Names of linear layers; null: PEFT's choice for the architecture."""
    dora: StrictBool = False
    """Weight-decomposed."""


@dataclass(frozen=True, config=_OF_A_RUN)
class ModelSettings:
    """A model."""

    path: Source
    """Folder, hub name, or package:NAME (``models.load_model``)."""
    tokenizer: Source | None = None
    """Where its tokenizer is, if elsewhere."""
    dtype: Dtype = "float32"
    """A half-precision teacher saves memory."""
    options: dict[StrictStr, Any] = field(default_factory=dict)
    """Passed to ``from_pretrained``, such as {attn_implementation: flash_attention_2, revision: ...}."""


@dataclass(frozen=True, config=_OF_A_RUN)
class TeacherSettings(ModelSettings):
    """The teacher."""

    cache: Folder | None = None
    """Folder of its states (``mta-fast teach``): rows that are there are read, others run and added; null: it runs at
    every step."""
    cache_dtype: Literal["int8", "bfloat16", "float16", "float32"] = "int8"
    """What its layers are stored in; int8 in groups of 32 features, the last state then in bfloat16."""


@dataclass(frozen=True, config=_OF_A_RUN)
class StudentSettings(ModelSettings):
    """The student."""

    lora: LoraSettings | None = None
    """Train an adapter instead of all weights."""
    compile: StrictBool = False
    """Run ``student.compile()``."""


@dataclass(frozen=True, config=_OF_A_RUN)
class DataSettings:
    """Text."""

    train: Source
    """"sample", a .jsonl file, or a data set (``data.load_rows``); for distillm2 the pairs that ``mta-fast generate``
    makes."""
    eval: Source | None = None
    """Likewise; null: no evaluation."""
    train_split: StrictStr = "train"
    """Split of a data set to train on."""
    eval_split: StrictStr = "test"
    """Split of a data set to evaluate on."""
    columns: dict[StrictStr, StrictStr] = field(default_factory=dict)
    """The data's own names where they are not prompt, output, instruction or input."""
    template: StrictStr = "paper"
    """paper, plain, chat, or a text with {instruction} and {input}."""
    max_prompt_length: StrictInt | None = None
    """Tokens; rows with longer prompts are left out and counted. null: room for one token."""
    max_rows: StrictInt | None = None
    """Read at most so many rows of each."""
    skip_bad_rows: StrictBool = False
    """Leave out and count rows that can't be read."""


@dataclass(frozen=True, config=_OF_A_RUN)
class SpanSettings:
    """Where spans come from."""

    model: Source = DEFAULT_MODEL
    """A spaCy pipeline."""
    cache: Source | None = None
    """Folder of the span cache; null: ``$MTA_FAST_CACHE`` or ``~/.cache/mta_fast/spans``."""
    n_process: StrictInt = 1
    """Processes that parse."""
    skip_unparsable: StrictBool = False
    """Leave a text over which these die again and again without spans, and say so."""
    truncate: StrictBool = False
    """Don't parse what training.max_length cuts off; 500 characters of it are, as a parse looks ahead."""


@dataclass(frozen=True, config=_OF_A_RUN)
class BaseSettings:
    """The base method."""

    loss: StrictStr = "srkl"
    """srkl, skl, forward_kl, reverse_kl, jsd, cross_entropy, distillm, distillm2, fdd, none, or module:Class."""
    options: dict[StrictStr, Any] = field(default_factory=dict)
    """Such as {alpha: 0.1}, or {schedule: decreasing, generation: {max_new_tokens: 128}} of distillm."""


@dataclass(frozen=True, config=_OF_A_RUN)
class TrainSettings:
    """A whole run.

    ``from_yaml`` checks in the package's words (InputError); in Python a wrong type is a pydantic ValidationError.
    """

    student: StudentSettings
    """What is trained."""
    data: DataSettings
    """The text that it is trained and evaluated on."""
    output_dir: Folder
    """Checkpoints, logs, pictures and the exported student go here."""
    teacher: TeacherSettings | None = None
    """What it learns from; null to learn from the data alone (base cross_entropy, mta false)."""
    spans: SpanSettings = field(default_factory=SpanSettings)
    """Where words and phrases come from."""
    base: BaseSettings = field(default_factory=BaseSettings)
    """The loss beside MTA."""
    mta: dict[StrictStr, Any] | StrictBool = field(default_factory=dict)
    """Fields of MTAConfig and, if wanted, ``preset``; false: the base loss alone. Without ``layer_pairs`` and
    ``preset`` the layers are mapped proportionally, words at the first."""
    training: dict[StrictStr, Any] = field(default_factory=dict)
    """Fields of MTATrainingArguments, such as learning_rate."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
        """Read a file; ``overrides`` are "key=value" with dotted keys and YAML values, such as "mta.lambda_hid=0".

        Raises:
            InputError: no YAML, an unknown key (names the nearest), a missing one, a value of another type.
        """
        return cls._made(_yaml.read(path), overrides)

    def overridden(self, overrides: Sequence[str]) -> TrainSettings:
        """These settings with overrides as in ``from_yaml``.

        Raises:
            InputError: as ``from_yaml`` does.
        """
        return self._made(self.to_dict(), overrides)

    @classmethod
    def _made(cls, values: dict[str, Any], overrides: Sequence[str]) -> TrainSettings:
        for override in overrides:
            _override(values, override)
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(_message(cls, error)) from None

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
            check_choice("mta.preset", preset, PRESETS)
            return MTAConfig.paper(preset, **changes)
        if "layer_pairs" not in changes:
            changes["layer_pairs"] = LayerMap.proportional(student_layers, teacher_layers).pairs
        count = len(changes["layer_pairs"])
        return MTAConfig.from_dict({"granularity": default_granularity(count)} | changes)


def with_defaults(values: Mapping[str, Any], kind: Any = TrainSettings) -> dict[str, Any]:
    """Settings that an earlier version wrote, ``TrainSettings.to_dict``, with today's keys that it didn't know."""
    made, hints = dict(values), typing.get_type_hints(kind)
    for each in fields(kind):
        inner = _settings_class(hints[each.name])
        if each.name not in made:
            value = each.default if each.default_factory is MISSING else each.default_factory()
            if value is not MISSING:
                made[each.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        elif inner is not None and isinstance(made[each.name], Mapping):
            made[each.name] = with_defaults(made[each.name], inner)
    return made


def same_settings(file: Path, settings: TrainSettings) -> bool:
    """Whether a file that ``to_dict`` was written to holds these settings; one of an earlier version too.

    One that is damaged holds others.
    """
    try:
        held = _yaml.read(file)
    except InputError:
        return False
    return with_defaults(held) == _yaml.loads(_yaml.dumps(settings.to_dict()), "settings")


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


# --- errors ------------------------------------------------------------------------------------------------------


def _message(kind: Any, error: ValidationError) -> str:
    """What pydantic found first, unknown keys before missing ones before wrong values, in the package's words."""
    order = {"unexpected_keyword_argument": 0, "missing": 1}
    found = min(error.errors(include_url=False), key=lambda each: order.get(each["type"], 2))
    names, annotation, owner = _place(kind, found["loc"])
    where = ".".join(names)
    if found["type"] == "invalid_key" or found["loc"][-1] == "[key]":
        where = "".join(f"{name}." for name in names)
        return f"{where}{found['input']}: expected a name as key, got {found['input']!r}; put it in quotes"
    if found["type"] == "unexpected_keyword_argument":
        key, known = str(found["loc"][-1]), [f.name for f in fields(owner)]
        where = ".".join([*names, key])
        return f"unknown key {where}{nearest(key, known)}; expected {', '.join(known)}"
    if found["type"] == "missing":
        return f"{where}: expected a value, got none"
    if "ctx" in found and isinstance(found["ctx"].get("error"), InputError):  # of a validator
        return f"{where}: {str(found['ctx']['error']).removeprefix('path: ')}"
    return f"{where}: expected {type_name(annotation)}, got {found['input']!r}"


def _place(kind: Any, location: Sequence[int | str]) -> tuple[list[str], Any, Any]:
    """The keys of an error's location, the type expected there, and the settings class that the last key is of.

    pydantic's location also names the branch of a union and the item of a list, which are no keys.
    """
    names: list[str] = []
    annotation, owner = kind, kind
    for part in location:
        inner = _settings_class(annotation)
        hints = typing.get_type_hints(inner) if inner is not None else {}
        if inner is not None:
            owner = inner
        if part in hints:
            names.append(str(part))
            annotation = hints[str(part)]
        elif (item := _item(annotation, part)) is not None:
            names[-1] += f"[{part}]" if isinstance(part, int) else f".{part}"
            annotation = item
        else:
            break
    return names, annotation, owner


def _item(annotation: Any, key: int | str) -> Any:
    """The type of a list's or mapping's values; None where it has no such key."""
    kind = list if isinstance(key, int) else dict
    found = next((option for option in _options(annotation) if typing.get_origin(option) is kind), None)
    named = found is not None and "[" not in str(key)  # pydantic's name of a branch, such as dict[str,any], has one
    return typing.get_args(found)[-1] if named else None


def _options(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _settings_class(annotation: Any) -> Any:
    return next((option for option in _options(annotation) if is_dataclass(option)), None)


def type_name(annotation: Any) -> str:
    """A type as a user writes it: "int or null", "one of a, b", "a mapping"."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(map(type_name, typing.get_args(annotation)))
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if is_dataclass(annotation) or typing.get_origin(annotation) is dict:
        return "a mapping"
    if typing.get_origin(annotation) is list:
        return f"a list of {type_name(typing.get_args(annotation)[0])}"
    if annotation in (None, types.NoneType):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
