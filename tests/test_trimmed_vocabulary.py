"""Vocabularies trimmed to what a data set uses: the tokenizer, and a training with the teacher's own ids."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from test_heads import _flat, _losses
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from training import CONFIG, STUDENT_LAYERS, logged, make_pairs, make_rows, make_trainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mta_fast import SpanCollator, SpanExtractor
from mta_fast.distill.data import load_sample
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.models import same_vocabulary
from mta_fast.distill.students.vocabulary import teacher_ids, trim_tokenizer
from mta_fast.distill.teacher.rows import teacher_rows
from mta_fast.distill.teacher.store import TeacherStore
from mta_fast.distill.training.caching import TeacherCache
from mta_fast.errors import InputError
from mta_fast.ops.entropy import entropy_weights
from mta_fast.spans.collate import for_teacher

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


METHODS: list[tuple[str, dict[str, Any], bool]] = [
    ("srkl", {}, True),
    ("srkl", {}, False),
    ("jsd", {}, True),
    ("cross_entropy", {}, True),
    ("fdd", {}, True),
    ("fdd", {}, False),
    ("distillm2", {"adaptive_alpha": True, "anchor_steps": 1}, True),
    ("distillm2", {}, False),
    ("none", {}, True),
]


def _assert_alike(found: Any, expected: Any) -> None:
    assert found[1].keys() == expected[1].keys()
    for left, right in zip(_flat(found), _flat(expected), strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm() + 1e-7


@pytest.mark.parametrize(("method", "options", "fused"), METHODS, ids=[f"{name}-{fused}" for name, _, fused in METHODS])
def test_every_loss_is_that_of_the_teachers_rows(
    tmp_path: Path, method: str, options: dict[str, Any], fused: bool
) -> None:
    """Live and from disk, losses and gradients: those of a teacher that has no other tokens."""
    rows = make_pairs(make_rows()) if method == "distillm2" else make_rows()
    folder = tmp_path / "states"

    def trainer(**more: Any) -> Any:
        made = base_method(method, **options)
        return _trainer(tmp_path, base_loss=made, rows=rows, fused_head=fused, size=450, **more)

    expected = _losses(trainer(trimmed=False))
    live = trainer()
    assert (live._module.head is not None) == fused
    _assert_alike(_losses(live), expected)
    trainer(teacher=_teacher(), teacher_cache=TeacherCache(folder, "float32")).fill_teacher_cache()
    _assert_alike(_losses(trainer(teacher_cache=TeacherCache(folder, "float32"))), expected)


def test_what_the_student_writes(tmp_path: Path) -> None:
    """DistiLLM trains on the same texts, the student's own among them, as beside the teacher's rows alone."""
    found = []
    for trimmed in (True, False):
        method = base_method(
            "distillm", threshold=1.0, increase=0, schedule="constant", generation={"max_new_tokens": 4}
        )
        trainer = _trainer(tmp_path, trimmed=trimmed, base_loss=method, span_extractor=SpanExtractor(), max_steps=2)
        trainer.train()
        assert len(method.replay) == 8
        found.append(([row["output"] for row in method.replay], logged(trainer, "loss"), logged(trainer, "dsa")))
    assert found[0][0] == found[1][0]
    for left, right in zip(found[0][1:], found[1][1:], strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """SRKL over the student's tokens, and its gradient, in float64."""
    trainer = _trainer(tmp_path, base_loss="srkl", mta=None)
    student, teacher = (copy.deepcopy(each).double() for each in (trainer._module.student, trainer.teacher))
    _, ids = _trimmed()
    found, gradients = _losses(trainer, 1)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens, mask, counted = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:] != -100
    assert not mask.all()
    with torch.no_grad():
        p = teacher(input_ids=ids[tokens], attention_mask=mask).logits[:, :-1][counted][:, ids].softmax(-1)
    q = student(input_ids=tokens, attention_mask=mask).logits[:, :-1][counted].softmax(-1)
    loss = (q * (q / (0.9 * p + 0.1 * q)).log()).sum(-1).mean()
    loss.backward()
    torch.testing.assert_close(found[0].double(), loss.detach(), rtol=1e-5, atol=0)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        error = (gradients[f"student.{name}"].double() - parameter.grad).norm()
        assert error <= 1e-4 * parameter.grad.norm() + 1e-8


def _alike_from_disk(out: Path, expected: Any, folder: Path, **options: Any) -> None:
    _assert_alike(_losses(_trainer(out, teacher_cache=TeacherCache(folder, "float32"), **options)), expected)


@pytest.mark.parametrize("options", [{"padding_free": True, "family": "llama"}, {"left": True}], ids=str)
def test_packed_rows_and_padding_on_the_left(tmp_path: Path, options: dict[str, Any]) -> None:
    options = dict(options)
    left = options.pop("left", False)
    if left:
        tokenizer = copy.deepcopy(_trimmed()[0])
        tokenizer.padding_side = "left"
        options["data_collator"] = SpanCollator(tokenizer, max_length=64)
    expected = _losses(_trainer(tmp_path, trimmed=False, **options))
    _assert_alike(_losses(_trainer(tmp_path, **options)), expected)
    cache = TeacherCache(tmp_path / "states", "float32")
    _trainer(tmp_path, teacher=_teacher(), teacher_cache=cache, **options).fill_teacher_cache()
    _alike_from_disk(tmp_path, expected, tmp_path / "states", **options)


def test_a_collator_of_ones_own(tmp_path: Path) -> None:
    """Its batches get the teacher's ids, but where it has made them."""
    inner = SpanCollator(_trimmed()[0], max_length=64)
    expected = _losses(_trainer(tmp_path, data_collator=inner))
    assert inner.teacher_ids is None
    _assert_alike(_losses(_trainer(tmp_path, data_collator=lambda rows: inner(rows))), expected)
    _, ids = _trimmed()

    def reversed_ids(rows: Any) -> dict[str, Any]:
        batch = inner(rows)
        return batch | for_teacher(batch, ids.flip(0))

    assert not torch.allclose(_losses(_trainer(tmp_path, data_collator=reversed_ids))[0][0], expected[0][0])


def test_entropy_is_over_all_that_the_teacher_knows(tmp_path: Path) -> None:
    config = replace(CONFIG, weighting="entropy")
    _, ids = _trimmed()
    for fused in (True, False):
        live = _trainer(tmp_path, mta=config, fused_head=fused)
        batch = next(iter(live.get_train_dataloader()))
        with torch.no_grad():
            logits = _teacher()(input_ids=ids[batch["input_ids"]], attention_mask=batch["attention_mask"]).logits
        weights = live._teach(batch).entropy_weights
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(weights[real], entropy_weights(logits)[real], rtol=1e-4, atol=1e-6)
    expected = _losses(_trainer(tmp_path, mta=config))
    cache = TeacherCache(tmp_path / "states", "float32")
    _trainer(tmp_path, mta=config, teacher=_teacher(), teacher_cache=cache).fill_teacher_cache()
    _alike_from_disk(tmp_path, expected, tmp_path / "states", mta=config)


def test_students_of_any_vocabulary_share_a_cache(tmp_path: Path) -> None:
    """Filled by a student with the teacher's own tokenizer, read by a trimmed one without a teacher: all is there."""
    cache, rows = TeacherCache(tmp_path / "states", "float32"), make_rows()
    whole = _by_bytes()
    make_trainer(
        tmp_path,
        tokenizer=whole,
        student=make_model("gpt2", STUDENT_LAYERS, vocabulary=VOCABULARY),
        teacher=_teacher(),
        teacher_cache=cache,
    ).fill_teacher_cache()
    assert len(TeacherStore(cache.path)) == len(rows)
    cached = _trainer(tmp_path, teacher_cache=cache)
    with cached._filling() as filling:
        assert filling is not None
        assert filling.total == len(rows)
        assert not filling.missing
    _assert_alike(_losses(cached), _losses(_trainer(tmp_path)))
    tokenizer, ids = _trimmed()
    batch = SpanCollator(tokenizer, max_length=64, granularity=(), teacher_ids=ids)(rows[:4])
    assert [row.key for row in teacher_rows(batch)] == [
        row.key for row in teacher_rows(SpanCollator(whole, max_length=64, granularity=())(rows[:4]))
    ]
    smaller = _trainer(tmp_path, size=400, teacher_cache=cache)  # its rows have other tokens
    with (
        pytest.raises(InputError, match="expected the states of every row, 24 of 24 are not there"),
        smaller._filling(),
    ):
        pass


def test_a_teacher_without_those_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"teacher: expected (logits|embeddings) for the tokenizer's 700 tokens"):
        _trainer(tmp_path, teacher=make_model("llama", 8, width=48, vocabulary=690))
