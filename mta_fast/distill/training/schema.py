"""``mta-fast schema``: the JSON schema of a run's YAML file, by which editors complete and check it."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from mta_fast.config import PRESETS, MTAConfig
from mta_fast.distill.methods.registry import METHODS
from mta_fast.distill.training.arguments import FOR_SCRIPTS, REFUSED, MTATrainingArguments
from mta_fast.distill.training.settings import ModelSettings, TrainSettings

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of ``TrainSettings``, with the fields of MTAConfig, MTATrainingArguments and the base losses' names.

    Fields that MTATrainingArguments has but refuses are left out. What holds between fields is checked by
    ``mta-fast train`` alone.
    """
    schema = TypeAdapter(TrainSettings).json_schema()
    definitions, parts = schema["$defs"], schema["properties"]
    model = TypeAdapter(ModelSettings).json_schema()["properties"]
    for side in ("StudentSettings", "TeacherSettings"):  # pydantic inherits no description
        for name, field in definitions[side]["properties"].items():
            field.setdefault("description", model.get(name, {}).get("description"))
    parts["mta"]["anyOf"][0] = _mta(definitions)
    parts["training"] |= {"properties": _training(definitions), "additionalProperties": False}
    definitions["BaseSettings"]["properties"]["loss"]["anyOf"] = [{"enum": list(METHODS)}, {"pattern": "^[^:]+:[^:]+$"}]
    return {"$schema": DIALECT, **schema}


def _mta(definitions: dict[str, Any]) -> dict[str, Any]:
    config = TypeAdapter(MTAConfig).json_schema()
    definitions |= config.pop("$defs", {})
    properties = config["properties"]
    properties["preset"] = {"enum": list(PRESETS), "description": "The paper's settings of a model pair."}
    properties["granularity"] = {"anyOf": [properties["granularity"], properties["granularity"]["items"]]}
    # layers are a preset's, or mapped proportionally, where none are given
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _training(definitions: dict[str, Any]) -> dict[str, Any]:
    hints, properties = typing.get_type_hints(MTATrainingArguments), {}
    for described in fields(MTATrainingArguments):
        if described.init and described.name not in (*REFUSED, *FOR_SCRIPTS, "output_dir"):
            field = TypeAdapter(hints[described.name]).json_schema()
            definitions |= field.pop("$defs", {})
            properties[described.name] = field | {"description": " ".join(described.metadata.get("help", "").split())}
    return properties
