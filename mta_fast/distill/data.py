"""Instruction rows to prompts."""

from __future__ import annotations

import json
from importlib import resources
from typing import TypedDict

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class PromptRow(TypedDict):
    """A prompt and its response."""

    prompt: str
    output: str


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt template of the paper's experiments; it ends where the response begins."""
    template = _WITH_INPUT if context else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def load_sample() -> list[PromptRow]:
    """The bundled sample: instruction and response rows written for this project, as prompts."""
    lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [PromptRow(prompt=format_prompt(row["instruction"], row["input"]), output=row["output"]) for row in rows]
