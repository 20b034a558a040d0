"""Positions: a model has the same values wherever its padding is, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, make_model, make_tokenizer
from torch import Tensor
from training import logged, make_trainer

from mta_fast import SpanCollator, capture_layers
from mta_fast.distill.responses.generation import GenerationSettings, encode_prompts, generate_texts
from mta_fast.distill.training.module import DistillationModel, StepTotals, TeacherOutput
from mta_fast.errors import InputError
from mta_fast.inputs import check_left_padding, model_inputs, position_ids, takes_positions

tf = pytest.importorskip("transformers")

LENGTHS = (7, 4, 1)
SMALL: dict[str, dict[str, Any]] = {  # families that count positions in ways of their own, and some that count none
    "BioGpt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "GPTBigCode": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "RecurrentGemma": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "lru_width": 32,
    },
    "Roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "is_decoder": True,
    },
    "XGLM": {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2},
}
RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
TROCR = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}


def _small(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(tf, f"{name}Config")(vocab_size=VOCABULARY, **ends, **options)
    return getattr(tf, f"{name}ForCausalLM")(config).eval()


def _padded(side: str) -> dict[str, Tensor]:
    """Three rows of random tokens; the pad token is 0."""
    generator = torch.Generator().manual_seed(0)
    size = max(LENGTHS) + 2
    batch = {name: torch.zeros(len(LENGTHS), size, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for b, length in enumerate(LENGTHS):
        real = slice(size - length, size) if side == "left" else slice(0, length)
        batch["input_ids"][b, real] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        batch["attention_mask"][b, real] = 1
    return batch


@torch.no_grad()
def _values(model: Any, side: str) -> list[Tensor]:
    """Every hidden state and the logits, at the real tokens, row after row."""
    batch = _padded(side)
    output = model(**model_inputs(model, batch), output_hidden_states=True, use_cache=False)
    return [state[batch["attention_mask"].bool()] for state in (*output.hidden_states, output.logits)]


@pytest.mark.parametrize("family", [*FAMILIES, *SMALL])
def test_the_padding_side_changes_nothing(family: str) -> None:
    model = _small(family, **SMALL[family]) if family in SMALL else make_model(family).eval()
    check_left_padding(model, 0, "model", "")
    for right, left in zip(_values(model, "right"), _values(model, "left"), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), [("Rwkv", RWKV), ("TrOCR", TROCR)])
def test_models_that_read_padding_are_refused(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = _small(family, **options).train()
    with pytest.raises(InputError, match=f"student: expected a model with .* {family}\\w+ takes no position_ids.*; do"):
        check_left_padding(model, 0, "student", "do")
    assert model.training
    if family == "Rwkv":
        tokenizer = make_tokenizer()
        model = _small("Rwkv", **RWKV)
        model.resize_token_embeddings(len(tokenizer))
        settings = GenerationSettings(max_new_tokens=2, stop=None)
        with pytest.raises(InputError, match="one prompt at a time: batch_size 1"):
            encode_prompts(model, tokenizer, ["a", "a longer one"], settings)
        one = GenerationSettings(max_new_tokens=2, stop=None, batch_size=1)
        encode_prompts(model, tokenizer, ["a", "a longer one"], one)
        with pytest.raises(InputError, match="one prompt at a time: batch_size 1"):
            generate_texts(model, tokenizer, ["a", "a longer one"], one)
        assert len(generate_texts(model, tokenizer, ["a", "a"], settings)) == 2
        tokenizer.padding_side = "left"
        try:
            with pytest.raises(InputError, match="teacher: .*; set padding_side = 'right' of its tokenizer"):
                make_trainer(tmp_path, teacher=model, mta=None)
        finally:
            tokenizer.padding_side = "right"


def test_positions_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_positions_are_given_where_they_matter() -> None:
    peft = pytest.importorskip("peft")
    model = make_model("gpt2")
    adapted = peft.get_peft_model(make_model("gpt2"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    for wrapped in (model, adapted, torch.compile(model)):
        assert takes_positions(wrapped)
    assert not takes_positions(_small("Bloom", **SMALL["Bloom"]))
    assert not takes_positions(_small("Roberta", **SMALL["Roberta"]))  # counts its own tokens, and not from 0
    left, right = _padded("left"), _padded("right")
    assert set(model_inputs(model, right)) == {"input_ids", "attention_mask"}  # as ever
    assert torch.equal(model_inputs(adapted, left)["position_ids"], position_ids(left["attention_mask"]))
    teacher = {f"teacher_{name}": value for name, value in left.items()}
    assert torch.equal(model_inputs(model, right | teacher, "teacher_")["input_ids"], left["input_ids"])
    assert "position_ids" in model_inputs(model, right | teacher, "teacher_")
    given = torch.ones_like(left["input_ids"])
    assert model_inputs(model, right | {"position_ids": given})["position_ids"] is given


def test_the_side_is_known_without_a_synchronisation() -> None:
    tokenizer, model = make_tokenizer(), make_model("gpt2")
    rows = [{"text": text, "word_spans": [[0, 1]]} for text in ("a", "a longer row")]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = SpanCollator(tokenizer, granularity="word")(rows)
        tokenizer.padding_side = "right"
        elsewhere = {name: batch[name].to("meta") for name in ("input_ids", "attention_mask")}  # can't be read
        known = model_inputs(model, elsewhere | {"spans": batch["spans"]})
        assert ("position_ids" in known) == (side == "left")
        assert model_inputs(model, elsewhere)["position_ids"].shape == batch["input_ids"].shape


def test_a_step_and_an_evaluation_are_the_same_on_either_side(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    found = {}
    for side in ("right", "left"):
        tokenizer.padding_side = side
        try:
            trainer = make_trainer(
                tmp_path / side,
                family="gpt2",
                teacher=make_model("gpt2", 8, width=48, vocabulary=len(tokenizer)),
                max_steps=2,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=2,
            )
            trainer.train()
            found[side] = [logged(trainer, name) for name in ("base", "dsa", "hid")]
            found[side].append([trainer.evaluate()["eval_loss"]])
        finally:
            tokenizer.padding_side = "right"
    for right, left in zip(found["right"], found["left"], strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_the_module_gives_the_student_its_positions() -> None:
    model = make_model("gpt2")
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True)
    for side in ("right", "left"):
        batch = _padded(side)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with capture_layers(model, []):
            DistillationModel(model)(batch, TeacherOutput(None, {}), StepTotals(torch.zeros(0), lambda own: own))
    assert seen[0] is None
    assert torch.equal(seen[1], position_ids(_padded("left")["attention_mask"]))
