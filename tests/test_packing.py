"""Rows without padding: the same batches, losses and gradients as padded ones, and models that mix them are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import CONFIG, STUDENT_LAYERS, TEACHER_LAYERS, logged, make_pairs, make_rows, make_trainer, weights

from mta_fast import MTAConfig, MTALoss, SpanCollator
from mta_fast.distill import MTATrainer
from mta_fast.distill.methods.distillm import DistiLLM
from mta_fast.distill.methods.losses import counted_positions
from mta_fast.distill.training.packing import check_packing
from mta_fast.errors import InputError
from mta_fast.inputs import model_inputs
from mta_fast.spans.collate import IGNORED_LABEL

BARE = {"word_spans": [], "phrase_spans": []}


def _both(rows: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same rows padded and packed."""
    return tuple(SpanCollator(make_tokenizer(), flatten=flat, **options)(rows) for flat in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "rows",
    [
        make_rows()[:4],
        make_rows()[:1],
        [*make_rows()[:1], {"prompt": "Name a river.\n", "output": "", **BARE}, *make_rows()[1:2]],
        [{"prompt": "", "output": "", **BARE}, *make_rows()[:2], {"text": "", **BARE}],
    ],
    ids=["rows", "one row", "an empty response", "empty rows"],
)
@pytest.mark.parametrize("side", ["", "teacher_"])
@pytest.mark.parametrize("max_length", [256, 24])
def test_a_packed_batch_is_a_padded_one_without_its_padding(
    rows: list[dict[str, Any]], side: str, max_length: int
) -> None:
    teacher = make_tokenizer(300) if side else None
    padded, packed = _both(rows, teacher_tokenizer=teacher, max_length=max_length)
    real = padded[f"{side}attention_mask"].bool()
    lengths = real.sum(1)
    assert f"{side}attention_mask" not in packed
    assert torch.equal(packed[f"{side}input_ids"][0], padded[f"{side}input_ids"][real])
    assert torch.equal(packed[f"{side}position_ids"][0], torch.cat([torch.arange(length) for length in lengths]))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert packed[side + name].dtype == torch.int32
        assert packed[side + name].diff().tolist() == lengths.tolist()
    assert packed[f"{side}max_length_q"] == packed[f"{side}max_length_k"] == int(lengths.max())
    labels = padded[f"{side}labels"].clone()
    labels[:, 0] = IGNORED_LABEL
    assert torch.equal(packed[f"{side}labels"][0], labels[real])
    predicted = padded[f"{side}labels"][:, 1:][counted_positions(padded[f"{side}labels"])]
    assert torch.equal(packed[f"{side}labels"][:, 1:][counted_positions(packed[f"{side}labels"])], predicted)
    for kind, spans in packed[f"{side}spans"].items():
        expected = padded[f"{side}spans"][kind]
        assert spans.shape == (int(lengths.sum()),)
        starts = (packed[f"{side}cu_seq_lens_q"][:-1] - expected.rows.host[:, 0])[expected.span_rows.long()]
        assert torch.equal(spans.ranges, expected.ranges + starts[:, None])
        assert torch.equal(spans.span_rows, expected.span_rows)


def test_flat_rows_have_no_padding_to_choose() -> None:
    for option, said in ({"pad_to": "max_length"}, "pad_to"), ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"):
        with pytest.raises(InputError, match=f"{said}: expected .* beside flatten"):
            SpanCollator(make_tokenizer(), flatten=True, **option)


@pytest.mark.parametrize(
    "changes", [{}, {"normalization": "sample"}, {"student_pooling": "own"}, {"weighting": "uniform"}]
)
def test_the_loss_of_packed_states(changes: dict[str, Any]) -> None:
    padded, packed = _both(make_rows()[:3], teacher_tokenizer=None)
    config = MTAConfig([(0, 0), (1, 1)], ("word", "phrase"), backend="reference", **changes)
    loss = MTALoss(config, 6, 10).double()
    real = padded["attention_mask"].bool()
    states = [torch.randn(*real.shape, width, dtype=torch.float64) for width in (6, 6, 10, 10)]
    results = []
    for batch, given in (padded, states), (packed, [state[real][None] for state in states]):
        student = [state.clone().requires_grad_() for state in given[:2]]
        loss.zero_grad()
        output = loss(student, given[2:], batch["spans"], denominators=loss.denominators(given[2:], batch["spans"]))
        output.loss.backward()
        flat = [state.grad[real] if state.grad.shape[:-1] == real.shape else state.grad[0] for state in student]
        results.append([output.loss.detach(), *flat, *(p.grad.clone() for p in loss.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def _trained(tmp_path: Path, padding_free: bool, **options: Any) -> tuple[MTATrainer, dict[str, torch.Tensor]]:
    trainer = make_trainer(tmp_path, max_steps=1, optim="sgd", max_grad_norm=0, padding_free=padding_free, **options)
    before = weights(trainer)
    trainer.train()
    return trainer, {name: value - before[name] for name, value in weights(trainer).items()}


@pytest.mark.parametrize(
    ("family", "attention", "options"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {"gradient_accumulation_steps": 2}),
        ("gpt2", "sdpa", {"mta": MTAConfig(CONFIG.layer_pairs, ("word", "phrase", "phrase"), weighting="entropy")}),
        ("gpt2", "eager", {"base_loss": "fdd"}),
        ("gpt2", "sdpa", {"teacher_tokenizer": 300, "base_loss": "cross_entropy"}),
        ("llama", "sdpa", {"base_loss": "srkl", "fused_head": False, "max_length": 56}),
    ],
)
def test_the_same_training_as_padded(tmp_path: Path, family: str, attention: str, options: dict[str, Any]) -> None:
    runs = []
    for padding_free in (False, True):
        given = dict(options)
        vocabulary = given.pop("teacher_tokenizer", None)
        if vocabulary:
            given["teacher_tokenizer"] = make_tokenizer(vocabulary)
        student = make_model(family, STUDENT_LAYERS, vocabulary=512)
        teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=vocabulary or 512)
        for model in (student, teacher):
            model.set_attn_implementation(attention)
        runs.append(_trained(tmp_path, padding_free, student=student, teacher=teacher, **given))
    (padded, moved), (packed, packed_moved) = runs
    assert "attention_mask" not in next(iter(packed.get_train_dataloader()))
    assert logged(padded, "base")[0] > 0
    for name in ("loss", "base", "dsa", "hid"):
        assert logged(packed, name) == pytest.approx(logged(padded, name), rel=1e-4)
    for name, value in moved.items():
        torch.testing.assert_close(packed_moved[name], value, rtol=2e-3, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")
    if options:
        return
    expected, found = padded.evaluate(), packed.evaluate()
    for name in ("eval_loss", "eval_base", "eval_dsa", "eval_hid"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_what_the_student_writes_is_packed_too(tmp_path: Path) -> None:
    method = DistiLLM(threshold=1.0, increase=0.0, schedule="constant", capacity=4, generation={"max_new_tokens": 3})
    trainer = make_trainer(tmp_path, base_loss=method, mta=None, padding_free=True, max_steps=2)
    seen, forward = [], trainer.model.forward
    trainer.model.forward = lambda batch, *rest: seen.append(batch) or forward(batch, *rest)
    trainer.train()
    assert logged(trainer, "student_share") + logged(trainer, "replay_share") != [0.0] * 4
    assert all(batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch for batch in seen)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_models_that_keep_rows_apart_pass() -> None:
    for family, dtype in (("gpt2", torch.float32), ("gptj", torch.float32), ("llama", torch.bfloat16)):
        model = make_model(family).to(dtype).train()
        check_packing(model, "student")
        assert model.training


def test_an_attention_that_makes_no_mask_is_refused(tmp_path: Path) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("without_masks", sdpa_attention_forward)  # no mask of its name is known: it is causal
    teacher = make_model("llama", TEACHER_LAYERS, vocabulary=512)
    teacher.set_attn_implementation("without_masks")
    said = r"rows that don't read each other, those of the teacher \(LlamaForCausalLM, attn_implementation 'without"
    with pytest.raises(InputError, match=said):
        make_trainer(tmp_path, teacher=teacher, padding_free=True)
    make_trainer(tmp_path, teacher=teacher, padding_free=True, mta=None, base_loss="cross_entropy")  # it isn't run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_positions_in_its_mask_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="those of the student .OPTForCausalLM, .* do: another first row changes"):
        check_packing(make_model("opt").to(dtype), "student")


def test_a_model_that_counts_on_over_the_rows_is_refused() -> None:
    model = make_model("gpt2")
    model.transformer.wpe.register_forward_pre_hook(lambda _, args: (torch.arange(args[0].shape[-1])[None],))
    with pytest.raises(InputError, match="expected a row's own logits behind another row, the student"):
        check_packing(model, "student")


def test_a_model_without_positions_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(InputError, match="expected models that take position_ids, the student .MambaForCausalLM"):
        check_packing(transformers.MambaForCausalLM(config), "student")
    batch = SpanCollator(make_tokenizer(), flatten=True)(make_rows()[:2])
    with pytest.raises(InputError, match="model: expected one that takes position_ids with packed rows, Mamba"):
        model_inputs(transformers.MambaForCausalLM(config), batch)


def test_what_reads_padding_is_refused(tmp_path: Path) -> None:
    collator = SpanCollator(make_tokenizer(), max_length=64)
    with pytest.raises(InputError, match="padding_free: expected an MTA without count_padding"):
        make_trainer(
            tmp_path,
            padding_free=True,
            mta=MTAConfig.public(layer_pairs=CONFIG.layer_pairs, granularity=CONFIG.granularity),
        )
    with pytest.raises(InputError, match="padding_free: expected a base loss of tokens, DistiLLM2 takes means"):
        make_trainer(tmp_path, padding_free=True, base_loss="distillm2", rows=make_pairs(make_rows()[:3]))
    with pytest.raises(InputError, match=r"data_collator: expected SpanCollator\(flatten=True\) .* got flatten=False"):
        make_trainer(tmp_path, padding_free=True, data_collator=collator)
    with pytest.raises(InputError, match=r"data_collator: expected SpanCollator\(flatten=False\) .* got flatten=True"):
        make_trainer(tmp_path, data_collator=SpanCollator(make_tokenizer(), max_length=64, flatten=True))
    with pytest.raises(InputError, match="pad_to: expected none beside padding_free, got 'longest'"):
        make_trainer(tmp_path, padding_free=True, pad_to="longest")
