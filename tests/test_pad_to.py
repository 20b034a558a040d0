"""What rows are padded to, and the public preset, whose values depend on it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from training import CONFIG, make_rows, make_trainer

from mta_fast import MTAConfig, MTALoss, SpanBatch, SpanCollator, capture_layers
from mta_fast.compat import compute_overall_span_loss
from mta_fast.distill import MTATrainingArguments
from mta_fast.errors import InputError
from mta_fast.inputs import model_inputs

PUBLIC = MTAConfig.public(layer_pairs=[(2, 4), (4, 8)], granularity=["word", "phrase"])
MAX_LENGTH = 80


def test_sizes() -> None:
    tokenizer, rows = make_tokenizer(), make_rows()[:2]
    options: dict[str, Any] = {"teacher_tokenizer": make_tokenizer(300), "max_length": 100}
    batch = SpanCollator(tokenizer, pad_to="max_length", **options)(rows)
    assert batch["input_ids"].shape == batch["teacher_input_ids"].shape == batch["spans"]["word"].shape == (2, 100)
    rounded = SpanCollator(tokenizer, pad_to="max_length", pad_to_multiple_of=64, **options)(rows)
    assert rounded["labels"].shape[1] == 128
    assert SpanCollator(tokenizer, max_length=1000)(rows)["labels"].shape[1] < 1000
    with pytest.raises(InputError, match="pad_to: expected one of longest, max_length, got 'max'"):
        SpanCollator(tokenizer, pad_to="max")


@torch.no_grad()
def _run(rows: list[dict[str, Any]], pad_to: str) -> tuple[Any, torch.Tensor]:
    """What MTALoss and the public scripts' call say about a batch."""
    tokenizer = make_tokenizer()
    student, teacher = (
        make_model("gpt2", layers, width, len(tokenizer)).eval() for layers, width in ((4, 32), (8, 48))
    )
    torch.manual_seed(3)
    mta = MTALoss.for_models(student, teacher, PUBLIC)
    collator = SpanCollator(tokenizer, max_length=MAX_LENGTH, pad_to=pad_to)
    tokenized = collator.tokenize(rows)
    batch = collator(rows)
    with capture_layers(student, [2, 4]) as own, capture_layers(teacher, [4, 8]) as other:
        for model in (student, teacher):
            model(**model_inputs(model, batch))
    offsets, mask = tokenized.sides[0][0], batch["attention_mask"]
    spans = {  # without texts, as the scripts have them: any character before a span is forgiven
        kind: SpanBatch.from_char_spans([row[f"{kind}_spans"] for row in rows], offsets, mask)
        for kind in ("word", "phrase")
    }
    output = mta(own, other, spans)
    call = compute_overall_span_loss(
        list(mta.projections),
        mask,
        None,
        None,
        own,
        other,
        offsets,
        [row["phrase_spans"] for row in rows],
        [row["word_spans"] for row in rows],
        SimpleNamespace(student_layer_mapping=[2, 4], teacher_layer_mapping=[4, 8], split_layer_mapping=[0, 1, 2, 0]),
    )
    return output, call


def test_the_public_preset_does_not_depend_on_the_rest_of_the_batch() -> None:
    rows = sorted(make_rows(), key=lambda row: len(row["prompt"] + row["output"]))[:3]
    together = {pad_to: _run(rows, pad_to) for pad_to in ("max_length", "longest")}
    alone = {pad_to: [_run([row], pad_to)[0] for row in rows] for pad_to in together}
    for pad_to, (output, call) in together.items():
        torch.testing.assert_close(output.loss, 2 * call, rtol=1e-5, atol=1e-7)
        sums = [sum(row.per_layer[i] for row in alone[pad_to]) for i in range(4)]
        same = [
            torch.allclose(whole.double(), part.double(), rtol=1e-4)
            for whole, part in zip(output.per_layer, sums, strict=True)
        ]
        assert all(same) == (pad_to == "max_length")


def test_the_trainer_pads_as_its_preset_needs(tmp_path: Path) -> None:
    def pads_to(mta: MTAConfig, **arguments: Any) -> str:
        return str(make_trainer(tmp_path, mta=mta, **arguments).data_collator.pad_to)

    assert pads_to(PUBLIC) == "max_length"
    assert pads_to(PUBLIC, pad_to="longest") == "longest"
    assert pads_to(CONFIG) == "longest"
    assert pads_to(CONFIG, pad_to="max_length") == "max_length"
    with pytest.raises(InputError, match="pad_to: expected one of longest, max_length, or none, got 'both'"):
        MTATrainingArguments(output_dir=str(tmp_path), pad_to="both")
