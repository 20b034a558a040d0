"""Texts of every kind and their inspections, for the tests of the numbers and of the views."""

from __future__ import annotations

import io
import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

from mta_fast import (
    MTAConfig,
    SpanExtractor,
    capture_layers,
)

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")


from rich.console import Console

from mta_fast.inspection import Inspection, inspect_text, render_terminal

VOCABULARY = 512
PAIRS = ((1, 2), (3, 6))  # the second: both after the final norm
TEXT = "The old keeper climbed the stairs, because a storm broke the lamp."
LONG = " ".join(f"{TEXT} Number {i} and naïve tea." for i in range(14))
EDGE_TEXTS = {
    "two words": "Hello world",
    "code": "Fix:\n\n```python\n\tdef mean(xs):  # $a_1^2$ <b>&amp;</b>\n```\r\n",
    "control characters": "bell \x07 and \x1b[31mred\x1b[0m\x7f \u202eoverride [bold]x[/bold]",
    "emoji": "Die Katze 🐈 trinkt 日本 tea 👩‍👩‍👧 in Zürich 🙂🙂.",
    "right to left": "مرحبا بالعالم، القطة تشرب الحليب.",
    "combining": "a\u0301 \u0301 e\u0301te\u0301 हिन्दी",
    "no spans": "... !!!",
    "special token": "one<|endoftext|>two three",
    "long": LONG,
}


def char_spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """Words, and every two neighbouring words as a phrase (these overlap)."""
    words = [(m.start(), m.end()) for m in re.finditer(r"[^\W\d]+", text)]
    return {"word": words, "phrase": [(a, d) for (a, _), (_, d) in itertools.pairwise(words)]}


EXTRACTOR = SpanExtractor(char_spans)


@cache
def models() -> tuple[Any, Any]:
    return make_model("gpt2", 6, 48, VOCABULARY).eval(), make_model("gpt2", 3, 32, VOCABULARY).eval()


def make_config(**changes: Any) -> MTAConfig:
    return MTAConfig(**({"layer_pairs": PAIRS, "granularity": ("word", "phrase")} | changes))


def inspect(text: str = TEXT, config: MTAConfig | None = None, **options: Any) -> Inspection:
    teacher, student = models()
    return inspect_text(
        text, teacher, student, make_tokenizer(VOCABULARY), config or make_config(), EXTRACTOR, **options
    )


@cache
def inspected(name: str) -> Inspection:
    return inspect(TEXT if name == "ordinary" else EDGE_TEXTS[name])


def run(model: Any, tokenizer: Any, layers: list[int], text: str = TEXT) -> tuple[Any, Any, torch.Tensor]:
    """Hidden states, offsets and logits, without the inspection's code."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad(), capture_layers(model, layers) as hidden:
        logits = model(input_ids=encoded["input_ids"]).logits
    return hidden, encoded["offset_mapping"], logits


def printed(inspection: Inspection, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    render_terminal(inspection, Console(file=file, width=width, **options))
    return file.getvalue()
