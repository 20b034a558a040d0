"""Vocabularies trimmed to what a data set uses: the tokenizer, and a training with the teacher's own ids."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from test_heads import _flat, _losses
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from training import STUDENT_LAYERS, make_pairs, make_rows, make_trainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mta_fast import SpanExtractor
from mta_fast.distill.data import load_sample
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.models import same_vocabulary
from mta_fast.distill.students.vocabulary import teacher_ids, trim_tokenizer
from mta_fast.distill.training.caching import TeacherCache
from mta_fast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:labels:UserWarning")
OTHER = "Zebra-crossings cost \u20ac 3.14, said Žižek \U0001f642;\n\tx = {y: [1]} \u4f60\u597d <|endoftext|> QUIZZICAL"
VOCABULARY = 700


# --- tokenizers --------------------------------------------------------------------------------------------------


@cache
def _texts() -> list[str]:
    return [row["prompt"] + row["output"] for row in load_sample()]


def _by_bytes() -> Any:
    """As GPT-2's: byte-level, the special token first."""
    return make_tokenizer(VOCABULARY)


def _with_fallback() -> Any:
    """As Llama's: a BPE of characters whose other ones are bytes; a token before each text; added tokens at the end."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [text.replace(" ", " ") for text in _texts()],
        trainers.BpeTrainer(vocab_size=900, special_tokens=named, show_progress=False, max_token_length=8),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    made.chat_template = "{{ messages }}"
    return made


def _unigram() -> Any:
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        _texts(),
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<unk>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


KINDS = {"bytes": _by_bytes, "fallback": _with_fallback, "unigram": _unigram}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts)["input_ids"]
    return found


def test_its_own_texts_keep_their_tokens(tokenizer: Any) -> None:
    texts = _texts()[:12]
    before = tokenizer.backend_tokenizer.to_str()
    trimmed = trim_tokenizer(tokenizer, texts)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert len(trimmed) < len(tokenizer)
    ids = teacher_ids(trimmed, tokenizer)
    assert ids is not None
    assert ids.dtype == torch.int64
    assert [ids[row].tolist() for row in _ids(trimmed, texts)] == _ids(tokenizer, texts)
    assert trimmed.convert_ids_to_tokens(list(range(len(trimmed)))) == tokenizer.convert_ids_to_tokens(ids.tolist())
    offsets = [each(texts, return_offsets_mapping=True)["offset_mapping"] for each in (trimmed, tokenizer)]
    assert offsets[0] == offsets[1]
    for name in ("eos", "pad", "bos", "unk"):
        own, theirs = (getattr(each, f"{name}_token_id") for each in (trimmed, tokenizer))
        assert (own is None and theirs is None) or int(ids[own]) == theirs
    assert trimmed.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("size", [None, 420])
def test_other_texts_decode_as_before(tokenizer: Any, size: int | None) -> None:
    trimmed = trim_tokenizer(tokenizer, _texts()[:4], size)
    assert size is None or len(trimmed) <= size
    ids = teacher_ids(trimmed, tokenizer)
    assert ids is not None
    for text in (OTHER, *_texts()[:2], *_texts()[-3:]):
        own, theirs = _ids(trimmed, [text])[0], _ids(tokenizer, [text])[0]
        assert trimmed.decode(own) == tokenizer.decode(theirs) == tokenizer.decode(ids[own])


def test_the_rarest_tokens_go_first() -> None:
    tokenizer = _by_bytes()
    text = "the house the house the house the garden"
    whole, smaller = (trim_tokenizer(tokenizer, [text], size) for size in (None, 262))
    assert len(smaller) <= 262 < len(whole)
    assert "\u0120the" in smaller.get_vocab()
    assert smaller.get_vocab().keys() < whole.get_vocab().keys()
    with pytest.raises(InputError, match=r"vocabulary size: expected at least 257 tokens .*, got 256"):
        trim_tokenizer(tokenizer, [text], 256)


def test_it_is_the_same_once_saved(tokenizer: Any, tmp_path: Path) -> None:
    trimmed = trim_tokenizer(tokenizer, _texts()[:12])
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert same_vocabulary(loaded, trimmed)
    assert _ids(loaded, [*_texts(), OTHER]) == _ids(trimmed, [*_texts(), OTHER])
    found, expected = teacher_ids(loaded, tokenizer), teacher_ids(trimmed, tokenizer)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def _changed(tokenizer: Any, change: Any) -> Any:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    made = copy.deepcopy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return made


def test_only_a_trimmed_tokenizer_is_one() -> None:
    tokenizer = _by_bytes()
    trimmed = trim_tokenizer(tokenizer, _texts()[:12])
    assert teacher_ids(trimmed, tokenizer) is not None
    assert teacher_ids(tokenizer, trimmed) is None
    assert teacher_ids(make_tokenizer(300), _with_fallback()) is None
    changes = [
        lambda spec: spec["model"]["merges"].pop(),
        lambda spec: spec["model"]["merges"].reverse(),
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=not spec["pre_tokenizer"]["add_prefix_space"]),
        lambda spec: spec["added_tokens"][0].update(lstrip=True),
    ]
    for change in changes:
        assert teacher_ids(_changed(trimmed, change), tokenizer) is None


def test_what_can_t_be_trimmed_says_why() -> None:
    words = Tokenizer(kinds.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="expected BPE or Unigram, whose vocabulary can be trimmed, got WordPiece"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), ["a"])
    ends = Tokenizer(kinds.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(InputError, match="expected a BPE without marks inside or at the end of words"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=ends), ["a"])


# --- training ----------------------------------------------------------------------------------------------------


@cache
def _trimmed(size: int | None = None) -> tuple[Any, torch.Tensor]:
    """The tokenizer of the bundled rows with the tokens of the first, and the whole one's ids."""
    rows = make_rows()
    made = trim_tokenizer(_by_bytes(), [row["prompt"] + row["output"] for row in rows], size)
    ids = teacher_ids(made, _by_bytes())
    assert ids is not None
    return made, ids


def _teacher() -> Any:
    return make_model("llama", 8, width=48, vocabulary=VOCABULARY + 4)


def _with_rows(teacher: Any, ids: torch.Tensor) -> Any:
    """The teacher with the embeddings and the rows of the head of these ids alone: what reads and predicts them."""
    made = make_model("llama", 8, width=48, vocabulary=len(ids))
    state = {
        name: value[ids] if name in ("model.embed_tokens.weight", "lm_head.weight") else value
        for name, value in teacher.state_dict().items()
    }
    made.load_state_dict(state)
    return made


def _trainer(out: Path, *, trimmed: bool = True, size: int | None = None, **options: Any) -> Any:
    """A student of the trimmed vocabulary, beside the teacher or, not ``trimmed``, the one with its rows alone."""
    tokenizer, ids = _trimmed(size)
    family = options.pop("family", "gpt2")
    options = {"student": make_model(family, STUDENT_LAYERS, vocabulary=len(tokenizer)), **options}
    if trimmed:
        options = {"teacher_tokenizer": _by_bytes(), **options}
    if "teacher_cache" not in options:
        options.setdefault("teacher", _teacher() if trimmed else _with_rows(_teacher(), ids))
    return make_trainer(out, tokenizer=tokenizer, **options)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("srkl", {}),
    ("forward_kl", {}),
    ("jsd", {}),
    ("skl", {}),
    ("cross_entropy", {}),
    ("fdd", {}),
    ("distillm2", {"adaptive_alpha": True, "anchor_steps": 1}),
    ("distillm", {"threshold": 0.9, "increase": 0, "schedule": "constant", "generation": {"max_new_tokens": 4}}),
    ("none", {}),
]


def _assert_alike(found: Any, expected: Any) -> None:
    assert found[1].keys() == expected[1].keys()
    for left, right in zip(_flat(found), _flat(expected), strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm() + 1e-7


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])
def test_every_loss_is_that_of_the_teachers_rows(
    tmp_path: Path, method: str, options: dict[str, Any], fused: bool
) -> None:
    """Live and from disk, losses and gradients: those of a teacher that has no other tokens."""
    rows = make_pairs(make_rows()) if method == "distillm2" else make_rows()
    folder = tmp_path / "states"

    def trainer(**more: Any) -> Any:
        made = base_method(method, **options)
        extractor = SpanExtractor() if method == "distillm" else None
        return _trainer(
            tmp_path, base_loss=made, rows=rows, fused_head=fused, span_extractor=extractor, size=450, **more
        )

    expected = _losses(trainer(trimmed=False))
    live = trainer()
    assert (live._module.head is not None) == fused
    _assert_alike(_losses(live), expected)
    if method != "distillm":
        trainer(teacher=_teacher(), teacher_cache=TeacherCache(folder, "float32")).fill_teacher_cache()
        _assert_alike(_losses(trainer(teacher_cache=TeacherCache(folder, "float32"))), expected)
