"""SpanCollator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import make_tokenizer

from mta_fast import SpanBatch, SpanCollator
from mta_fast.errors import InputError
from mta_fast.spans.collate import IGNORED_LABEL

pytest.importorskip("transformers")

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "Name a river.\n",
        "output": "The Danube — it flows.",
        "word_spans": [[0, 4], [14, 17], [18, 24]],
        "phrase_spans": [[5, 12], [14, 24]],
    },
    {"prompt": "Hi\n", "output": "Yo", "word_spans": [[3, 5]], "phrase_spans": []},
]


def _texts(batch: dict[str, Any], spans: SpanBatch, prefix: str = "", vocabulary: int = 512) -> list[str]:
    ids = batch[f"{prefix}input_ids"].flatten()
    decode = make_tokenizer(vocabulary).decode
    return [decode(ids[start:end]).strip() for start, end in spans.ranges.tolist()]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_by_hand(side: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    batch = SpanCollator(tokenizer)(ROWS)
    tokenizer.padding_side = "right"
    assert set(batch) == {"input_ids", "attention_mask", "labels", "spans"}
    assert _texts(batch, batch["spans"]["word"]) == ["Name", "The", "Danube", "Yo"]
    assert _texts(batch, batch["spans"]["phrase"]) == ["a river", "The Danube"]
    for b, row in enumerate(ROWS):
        real = batch["attention_mask"][b].bool()
        ids, labels = batch["input_ids"][b][real], batch["labels"][b][real]
        counted = labels != IGNORED_LABEL
        assert tokenizer.decode(ids) == row["prompt"] + row["output"] + tokenizer.eos_token
        assert tokenizer.decode(labels[counted]) == row["output"] + tokenizer.eos_token
        assert torch.equal(ids[counted], labels[counted])
        assert (batch["labels"][b][~real] == IGNORED_LABEL).all()
        assert real[0 if side == "right" else -1]


def test_padding_on_the_left_predicts_nothing() -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    batch = SpanCollator(tokenizer, granularity=())([{"text": "The Danube is a river."}, {"text": "Yo"}])
    tokenizer.padding_side = "right"
    first = int(batch["attention_mask"][1].argmax())
    assert first > 0
    assert batch["labels"][1, first] == IGNORED_LABEL
    assert (batch["labels"][1, first + 1 :] != IGNORED_LABEL).all()


def test_truncation_drops_spans_and_the_end_token() -> None:
    tokenizer = make_tokenizer()
    whole = SpanCollator(tokenizer)(ROWS[:1])
    length = whole["input_ids"].shape[1]
    cut = SpanCollator(tokenizer, max_length=length - 5)(ROWS[:1])
    assert cut["input_ids"].shape[1] == length - 5
    assert tokenizer.eos_token_id not in cut["input_ids"]
    assert SpanCollator(tokenizer, max_length=4)(ROWS[:1])["spans"]["phrase"].num_spans == 0


def test_end_token_that_the_tokenizer_adds_itself() -> None:
    from tokenizers.processors import TemplateProcessing

    plain, ending = make_tokenizer(), copy.deepcopy(make_tokenizer())
    end = plain.eos_token
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, plain.eos_token_id)]
    )
    assert ending("a")["input_ids"][-1] == plain.eos_token_id
    expected, made = (SpanCollator(tokenizer)(ROWS) for tokenizer in (plain, ending))
    for name in ("input_ids", "labels"):
        assert torch.equal(made[name], expected[name])
    assert plain.eos_token_id not in SpanCollator(ending, max_length=8)(ROWS[:1])["input_ids"]


def test_two_tokenizers_hold_the_same_spans() -> None:
    batch = SpanCollator(make_tokenizer(), teacher_tokenizer=make_tokenizer(300))(ROWS)
    assert batch["teacher_input_ids"].shape != batch["input_ids"].shape
    for kind, spans in batch["spans"].items():
        teacher = batch["teacher_spans"][kind]
        assert _texts(batch, spans) == _texts(batch, teacher, "teacher_", 300)
        assert teacher.shape == tuple(batch["teacher_attention_mask"].shape)


def test_text_rows_and_multiples() -> None:
    row = {"text": "Name a river.", "word_spans": [[0, 4]]}
    batch = SpanCollator(make_tokenizer(), granularity="word", pad_to_multiple_of=16, add_eos=False)([row])
    assert batch["input_ids"].shape == (1, 16)
    assert (batch["labels"] != IGNORED_LABEL).sum() == batch["attention_mask"].sum()


def test_errors_name_expected_and_received() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="expected a fast tokenizer .*got Slow; load it with"):
        SpanCollator(Slow())
    with pytest.raises(InputError, match="row 0: expected the column 'phrase_spans'.*run SpanExtractor first"):
        SpanCollator(make_tokenizer())([{"text": "a", "word_spans": []}])
    with pytest.raises(
        InputError, match="row 0: expected strings in the columns 'prompt' and 'output', or in 'text', got"
    ):
        SpanCollator(make_tokenizer())([{"question": "a"}])
    with pytest.raises(InputError, match="got {'prompt': 'str', 'output': 'NoneType'}"):
        SpanCollator(make_tokenizer())([{"prompt": "a", "output": None}])
    with pytest.raises(InputError, match="rows: expected at least one row, got none"):
        SpanCollator(make_tokenizer())([])
    with pytest.raises(InputError, match="max_length: expected an integer >= 1, got None"):
        SpanCollator(make_tokenizer(), max_length=None)  # type: ignore[arg-type]
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.truncation_side = "left"
    with pytest.raises(InputError, match="expected truncation_side='right', got 'left'"):
        SpanCollator(tokenizer)
    with pytest.raises(InputError, match=r"span \(0, 90\) of row 0"):
        SpanCollator(make_tokenizer(), granularity=["word"])([{"text": "a", "word_spans": [(0, 90)]}])
