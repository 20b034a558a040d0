"""Special tokens: added once, whatever the text holds already, and in no span."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

from mta_fast import SpanBatch, SpanCollator, _extension
from mta_fast.distill.data import LoadedRows, drop_long_rows, fill_template
from mta_fast.distill.responses.generation import GenerationSettings, encode_prompts
from mta_fast.errors import InputError
from mta_fast.spans.collate import IGNORED_LABEL
from mta_fast.tokens import encode

pytest.importorskip("transformers")

BEGIN, TURN, UNKNOWN = "<s>", "<|turn|>", "<unk>"
BACKENDS = ["reference"] + (["cpp"] if not _extension.why_missing() else [])


def _chat_tokenizer(before: str = BEGIN, behind: str = "") -> Any:
    """A tokenizer that puts special tokens around a text, with a chat template that begins with its BOS."""
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(make_tokenizer())
    made.add_special_tokens({"bos_token": BEGIN, "unk_token": UNKNOWN})
    made.add_tokens([TURN], special_tokens=True)
    added = f"{before} {behind}".split()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {behind}".strip(),
        special_tokens=[(token, made.convert_tokens_to_ids(token)) for token in dict.fromkeys(added)],
    )
    made.chat_template = (
        "{{ bos_token }}{% for message in messages %}" + TURN + "{{ message['role'] }}\n{{ message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
    )
    return made


def _names(tokenizer: Any, ids: Any) -> list[str]:
    return [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]


# --- added once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "behind", "text", "expected"),
    [
        (BEGIN, "", "Hi", [BEGIN, "H", "i"]),
        (BEGIN, "", f"{BEGIN}Hi", [BEGIN, "H", "i"]),
        (BEGIN, "", f"{TURN}Hi", [BEGIN, TURN, "H", "i"]),
        (f"{BEGIN} {TURN}", "", f"{BEGIN}{TURN}Hi", [BEGIN, TURN, "H", "i"]),
        (f"{BEGIN} {TURN}", "", f"{BEGIN}Hi", [BEGIN, TURN, BEGIN, "H", "i"]),  # only a part of what is added
        (BEGIN, TURN, f"{BEGIN}Hi{TURN}", [BEGIN, "H", "i", TURN]),
        (BEGIN, TURN, f"Hi{TURN}", [BEGIN, "H", "i", TURN]),
        (BEGIN, TURN, "Hi", [BEGIN, "H", "i", TURN]),
        (BEGIN, TURN, "", [BEGIN, TURN]),
        ("", "", f"{BEGIN}Hi", [BEGIN, "H", "i"]),
    ],
)
def test_added_tokens_are_there_once(before: str, behind: str, text: str, expected: list[str]) -> None:
    tokenizer = _chat_tokenizer(before, behind)
    (row,) = encode(tokenizer, [text])
    assert _names(tokenizer, row.ids) == expected
    assert row.special == [name in (BEGIN, TURN) for name in expected]
    letters = [text[start:end] for start, end in row.offsets if end > start]
    assert "".join(letters) == text or "".join(letters) == text.removeprefix(BEGIN)
    for length in range(1, len(expected) + 2):  # truncated: what is added stays, as far as there is room
        (cut,) = encode(tokenizer, [text], length)
        assert len(cut.ids) == len(cut.offsets) == len(cut.special) == min(length, len(expected))
        if length >= len(expected):
            assert cut == row


def test_a_chat_template_and_its_tokenizer_begin_once_everywhere() -> None:
    tokenizer = _chat_tokenizer()
    begin = tokenizer.bos_token_id
    prompt = fill_template("chat", "Name a river.", tokenizer=tokenizer)
    assert prompt.startswith(BEGIN)
    assert tokenizer(prompt)["input_ids"][:2] == [begin, begin]  # what is to be avoided
    batch = SpanCollator(tokenizer, granularity="word")([{"prompt": prompt, "output": "The Danube", "word_spans": []}])
    ids = batch["input_ids"][0].tolist()
    assert ids.count(begin) == 1
    assert tokenizer.decode(ids) == f"{prompt}The Danube{tokenizer.eos_token}"
    student = make_model("gpt2", vocabulary=len(tokenizer))
    (encoded,) = encode_prompts(student, tokenizer, [prompt], GenerationSettings(max_new_tokens=4))
    assert encoded == ids[: len(encoded)]
    rows = LoadedRows([{"prompt": prompt, "output": "x"}])
    assert drop_long_rows(rows, tokenizer, max_length=len(encoded) + 1).rows == rows.rows
    with pytest.raises(InputError, match=f"the shortest has {len(encoded)}"):
        drop_long_rows(rows, tokenizer, max_length=len(encoded))


def test_a_tokenizer_that_is_not_fast_begins_once() -> None:
    tokenizer = _chat_tokenizer()

    class Slow:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, texts: list[str]) -> Any:
            return tokenizer(texts)

    for text in (f"{BEGIN}Hi", "Hi"):
        assert encode(Slow(), [text])[0].ids == encode(tokenizer, [text])[0].ids


# --- in no span --------------------------------------------------------------------------------------------------


def _covered(batch: dict[str, Any], spans: SpanBatch, tokenizer: Any) -> list[str]:
    """The tokens that the spans hold, joined."""
    ids = batch["input_ids"].flatten()
    made = []
    for u in range(spans.num_spans):
        tokens = [c for c, u_list in enumerate(_lists(spans)) if u in u_list]
        made.append(tokenizer.decode(ids[spans.covered[tokens].long()]).strip())
    return made


def _lists(spans: SpanBatch) -> list[list[int]]:
    bounds = spans.cover_splits.tolist()
    return [spans.cover_spans[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_special_tokens_of_the_text_are_in_no_span(backend: str, side: str) -> None:
    tokenizer = _chat_tokenizer()
    tokenizer.padding_side = side
    prompt, output = f"{BEGIN}{TURN}user\nHi{TURN}", f"Yo man{TURN}"
    text = prompt + output

    def at(part: str) -> list[int]:
        start = text.index(part)
        return [start, start + len(part)]

    spans = [
        at(BEGIN),  # nothing but a special token: dropped
        at(f"{TURN}user"),  # begins with one
        at(f"Hi{TURN}Yo"),  # goes over one
        at("Yo"),
        at(f"man{TURN}"),  # ends with one, the last of the text: not cut
        [text.index(TURN) + 1, text.index(TURN) + 3],  # within one: dropped
    ]
    rows = [{"prompt": prompt, "output": output, "word_spans": spans}, {"prompt": "", "output": text, "word_spans": []}]
    batch = SpanCollator(tokenizer, granularity="word", backend=backend)(rows)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN)}
    made = batch["spans"]["word"]
    assert not special & set(batch["input_ids"].flatten()[made.covered.long()].tolist())
    assert _covered(batch, made, tokenizer) == ["user", "HiYo", "Yo", "man"]
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED_LABEL]) == output + tokenizer.eos_token  # they are still learnt


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_still_cuts_spans_beside_special_tokens(backend: str) -> None:
    tokenizer = _chat_tokenizer()
    text = f"Hi{TURN}you"
    row = {"prompt": "", "output": text, "word_spans": [[0, 2], [0, 2 + len(TURN)], [0, len(text)]]}
    made = {
        length: SpanCollator(tokenizer, granularity="word", max_length=length, backend=backend)([row])["spans"]["word"]
        for length in (3, 4, 16)
    }
    whole = len(encode(tokenizer, [text])[0].ids)
    assert {length: spans.num_spans for length, spans in made.items()} == {3: 1, 4: 2, 16: 3}
    assert 4 < whole < 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_special_tokens(backend: str) -> None:
    offsets = torch.tensor([[[0, 3], [3, 5], [5, 9], [9, 9]]])
    special = [[1, 0, 0, 0]]
    spans = [[(0, 3), (0, 5), (3, 9)]]
    own = SpanBatch.from_char_spans(spans, offsets, special_tokens_mask=special, backend=backend)
    assert own.ranges.tolist() == [[1, 2], [1, 3]]
    assert SpanBatch.from_char_spans(spans, offsets, backend=backend).ranges.tolist() == [[0, 1], [0, 2], [1, 3]]
    student, teacher = SpanBatch.pair(spans, (offsets, None, special), (offsets, None), backend=backend)
    assert student.ranges.tolist() == [[1, 2], [1, 3]]
    assert teacher.ranges.tolist() == [[0, 2], [1, 3]]
    packed = SpanBatch.from_char_spans(
        spans, offsets[0], cu_seqlens=torch.tensor([0, 4]), special_tokens_mask=special[0], backend=backend
    )
    assert packed.ranges.tolist() == own.ranges.tolist()
    with pytest.raises(InputError, match=r"special_tokens_mask: expected \(1, 4\) as in offset_mapping, got \(1, 2\)"):
        SpanBatch.from_char_spans(spans, offsets, special_tokens_mask=[[1, 0]], backend=backend)


def test_an_unknown_token_stands_for_its_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({UNKNOWN: 0, "a": 1, "</s>": 2}, unk_token=UNKNOWN)
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, eos_token="</s>")
    (row,) = encode(tokenizer, [f"a river {UNKNOWN} </s>"])
    assert row.ids == [1, 0, 0, 2]
    assert row.special == [False, False, True, True]
