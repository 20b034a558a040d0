"""MTATrainer: exact losses over micro-batches, the optimiser groups, logs, evaluation, families and adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import CONFIG, STUDENT_LAYERS, TEACHER_LAYERS, logged, make_rows, make_trainer, uneven_rows, weights

from mta_fast import MTALoss, SpanCollator, capture_layers
from mta_fast.config import MTAConfig
from mta_fast.distill import MTATrainer, MTATrainingArguments
from mta_fast.distill.methods.losses import skewed_reverse_kl
from mta_fast.distill.training import stopwatch
from mta_fast.errors import InputError


def _assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_step_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=0, weight_decay=0.0, lr_scheduler_type="constant")
    student, teacher, mta = trainer.model.student, trainer.teacher, trainer.model.mta
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with capture_layers(student, CONFIG.student_layers) as student_hidden:
        student_logits = student(**inputs).logits
    with torch.no_grad(), capture_layers(teacher, CONFIG.teacher_layers) as teacher_hidden:
        teacher_logits = teacher(**inputs).logits
    output = mta(student_hidden, teacher_hidden, batch["spans"])
    base = skewed_reverse_kl(student_logits, teacher_logits, batch["labels"])
    optimizer = torch.optim.AdamW(
        [{"params": student.parameters()}, {"params": mta.parameters(), "lr": 5e-4}], lr=1e-3, weight_decay=0.0
    )
    before = weights(trainer)
    (base + output.loss).backward()
    optimizer.step()
    expected = weights(trainer)
    trainer.model.load_state_dict(before)
    trainer.model.zero_grad()

    trainer.train()
    for name, value in (("base", base), ("dsa", output.dsa), ("hid", output.hid), ("loss", base + output.loss)):
        assert logged(trainer, name)[0] == pytest.approx(value.item(), rel=1e-5)
    _assert_close(weights(trainer), expected)


@pytest.mark.parametrize("accumulation", ["keep", "recompute"])
def test_micro_batches_equal_the_big_batch(tmp_path: Path, accumulation: str) -> None:
    rows = uneven_rows()
    steps: dict[str, Any] = {"accumulation": accumulation, "optim": "sgd"}  # Adam's don't follow a gradient's size
    big = make_trainer(tmp_path, rows=rows, **steps)
    big.train()
    small = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, **steps)
    small.train()
    for name in ("loss", "base", "dsa", "hid"):
        assert logged(small, name) == pytest.approx(logged(big, name), rel=1e-4)
    _assert_close(weights(small), weights(big))


def test_micro_batches_by_themselves_are_another_loss(tmp_path: Path) -> None:
    big, small = (
        make_trainer(tmp_path, rows=uneven_rows(), max_steps=1, accumulation="micro_batch", **sizes)
        for sizes in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    )
    big.train()
    small.train()
    assert logged(small, "base") == pytest.approx(logged(big, "base"), rel=1e-5)  # the base loss stays exact
    assert logged(small, "dsa")[0] == pytest.approx(logged(big, "dsa")[0], rel=0.9)
    assert logged(small, "dsa")[0] != pytest.approx(logged(big, "dsa")[0], rel=1e-2)


def test_projections_have_their_own_learning_rate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, projection_learning_rate=0.25, weight_decay=0.01)
    optimizer = trainer.create_optimizer()
    projections = {id(p) for p in trainer.model.mta.parameters()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[i] for i in projections} == {0.25}
    assert {rate for i, rate in rates.items() if i not in projections} == {1e-3}
    assert len(rates) == len(list(trainer.model.parameters()))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in trainer.model.mta.parameters()} == {0.0, 0.01}  # biases have none


def test_the_teacher_is_frozen_and_keeps_no_graph(tmp_path: Path) -> None:
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(make_tokenizer())).bfloat16().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, teacher=teacher, max_steps=2)
    seen = []
    original = trainer._teach
    trainer._teach = lambda batch: seen.append(original(batch)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    output = seen[0]
    assert sorted(output.hidden_states) == CONFIG.teacher_layers
    assert all(h.dtype == torch.bfloat16 and not h.requires_grad for h in output.hidden_states.values())
    assert not output.logits.requires_grad


def test_gradient_norms_on_request(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2, log_gradient_norms=True)
    trainer.train()
    norms = {name: logged(trainer, f"grad_norm_{name}") for name in ("base", "dsa", "hid")}
    assert [len(values) for values in norms.values()] == [1, 1, 1]
    assert all(values[0] > 0 for values in norms.values())
    plain = make_trainer(tmp_path, max_steps=3, logging_steps=2)
    plain.train()
    assert logged(plain, "loss") == logged(trainer, "loss")  # asking changes nothing
    # the terms add up: without the projections' part, the whole gradient is at most the sum of the norms
    assert logged(trainer, "grad_norm")[0] > 0


def test_share_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that shows a second more after the MTA loss, and three more in the rest of each step."""
    seconds = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    trainer = make_trainer(tmp_path)
    mta, step = trainer.model.mta.forward, trainer.training_step

    def after(pause: float, function: Any) -> Any:
        def slower(*args: Any, **kwargs: Any) -> Any:
            seconds[0] += pause
            return function(*args, **kwargs)

        return slower

    trainer.model.mta.forward = after(1.0, mta)
    monkeypatch.setattr(trainer, "training_step", after(3.0, step))
    trainer.train()
    assert logged(trainer, "mta_share_of_step") == [0.25] * 4


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_trainer(tmp_path, max_steps=2, report_to=["tensorboard"]).train()
    (file,) = (path for path in tmp_path.rglob("events.out.*"))
    read = events.EventAccumulator(str(file.parent))
    read.Reload()
    assert {"train/base", "train/dsa", "train/hid", "train/mta_share_of_step"} <= set(read.Tags()["scalars"])
    assert len(read.Scalars("train/dsa")) == 2


def test_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    found = []
    for size in (8, 3, 1):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_base", "eval_dsa", "eval_hid"):
        assert [metrics[name] for metrics in found] == pytest.approx([found[0][name]] * 3, rel=1e-5)
    terms = found[0]
    weighted = terms["eval_base"] + 2.0 * terms["eval_dsa"] + 0.2 * terms["eval_hid"]
    assert terms["eval_loss"] == pytest.approx(weighted, rel=1e-6)


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    plain, evaluated = make_trainer(tmp_path), make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    plain.train()
    evaluated.train()
    _assert_close(weights(plain), weights(evaluated))
    assert len(logged(evaluated, "eval_dsa")) == 4


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_checkpointing_and_mixed_precision(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, other = make_trainer(tmp_path, max_steps=2), make_trainer(tmp_path, max_steps=2, **options)
    plain.train()
    other.train()
    tolerance = 1e-5 if "gradient_checkpointing" in options else 3e-2
    for name in ("base", "dsa", "hid"):
        assert logged(other, name) == pytest.approx(logged(plain, name), rel=tolerance, abs=tolerance / 10)
    assert all(p.dtype == torch.float32 for p in other.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "llama", "mistral"])
def test_families(tmp_path: Path, family: str) -> None:
    teacher = make_model(family, TEACHER_LAYERS, width=48, vocabulary=len(make_tokenizer()))
    trainer = make_trainer(tmp_path, family=family, teacher=teacher, max_steps=8, learning_rate=3e-3)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    frozen = {name: value.clone() for name, value in student.state_dict().items()}
    lora = peft.get_peft_model(student, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, student=lora, gradient_checkpointing=True, max_steps=8, learning_rate=1e-2)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    after = lora.get_base_model().state_dict()
    untouched = [name for name in frozen if name in after]
    assert untouched
    assert all(torch.equal(frozen[name], after[name]) for name in untouched)


@pytest.mark.parametrize("weighting", ["uniform", "entropy"])
def test_other_weightings(tmp_path: Path, weighting: Any) -> None:
    config = MTAConfig.from_dict(CONFIG.to_dict() | {"weighting": weighting})
    big = make_trainer(tmp_path, mta=config, max_steps=1)
    small = make_trainer(
        tmp_path, mta=config, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    big.train()
    small.train()
    assert logged(small, "loss") == pytest.approx(logged(big, "loss"), rel=1e-4)


def test_the_base_loss_alone_and_mta_alone(tmp_path: Path) -> None:
    alone = make_trainer(tmp_path, mta=None, max_steps=1)
    alone.train()
    assert logged(alone, "loss") == pytest.approx(logged(alone, "base"))
    assert logged(alone, "dsa") == [0.0]
    mta = make_trainer(tmp_path, base_loss=None, max_steps=1)
    mta.train()
    assert logged(mta, "base") == [0.0]
    assert logged(mta, "loss")[0] == pytest.approx(2 * logged(mta, "dsa")[0] + 0.2 * logged(mta, "hid")[0], rel=1e-5)


def test_padded_vocabularies_are_cut_to_what_both_share(tmp_path: Path) -> None:
    size = len(make_tokenizer())
    plain = make_trainer(tmp_path, max_steps=1)
    plain.train()
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=size)
    teacher.resize_token_embeddings(size + 7, mean_resizing=False)  # 7 ids that no token has
    padded = make_trainer(tmp_path, teacher=teacher, max_steps=1)
    padded.train()
    assert logged(padded, "base") == pytest.approx(logged(plain, "base"), rel=1e-6)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    size = len(make_tokenizer())
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=size - 1)
    with pytest.raises(
        InputError, match=f"teacher: expected embeddings for the tokenizer's {size} tokens, it has {size - 1}"
    ):
        make_trainer(tmp_path, teacher=teacher)


@pytest.mark.parametrize("base_loss", [None, "cross_entropy"])
def test_two_tokenizers(tmp_path: Path, base_loss: str | None) -> None:
    other = make_tokenizer(300)
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(other))
    options: dict[str, Any] = {"teacher": teacher, "teacher_tokenizer": other, "base_loss": base_loss}
    big = make_trainer(tmp_path, **options)
    big.train()
    small = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    small.train()
    assert logged(big, "loss")[-1] < logged(big, "loss")[0]
    assert logged(small, "loss") == pytest.approx(logged(big, "loss"), rel=1e-4)


def test_two_tokenizers_share_no_distribution(tmp_path: Path) -> None:
    other = make_tokenizer(300)
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(other))
    with pytest.raises(InputError, match="expected None or one of cross_entropy with two tokenizers .*got 'srkl'"):
        make_trainer(tmp_path, teacher=teacher, teacher_tokenizer=other)


def test_the_same_tokenizer_twice_is_one(tmp_path: Path) -> None:
    make_tokenizer.cache_clear()
    trainer = make_trainer(tmp_path, teacher_tokenizer=make_tokenizer(512))
    assert trainer.data_collator.teacher_tokenizer is None


def test_rows_without_spans_train_on_the_base_loss(tmp_path: Path) -> None:
    rows = [row | {"word_spans": [], "phrase_spans": []} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows=rows, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "base"))
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_a_collator_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    from mta_fast.distill import MTATrainer, MTATrainingArguments

    tokenizer = make_tokenizer()
    student = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(tokenizer))
    teacher = make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(tokenizer))
    trainer = MTATrainer(
        student,
        teacher,
        MTALoss(CONFIG, 32, 48),
        MTATrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        processing_class=tokenizer,
        data_collator=SpanCollator(tokenizer, max_length=32),
        train_dataset=make_rows()[:8],
    )
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] <= 32
    trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_loss": None, "mta": None}, "expected a base loss or an MTA config, got neither"),
        ({"base_loss": "srlk"}, "got 'srlk', did you mean 'srkl'"),
        ({"accumulation": "exact"}, "accumulation: expected one of keep, recompute, micro_batch, got 'exact'"),
        ({"torch_compile": True}, "torch_compile: expected false"),
    ],
)
def test_errors_name_expected_and_received(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, **options)


def test_an_optimizer_of_ones_own_stays_as_it_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    own = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.optimizer = own
    assert trainer.create_optimizer() is own
    assert len(own.param_groups) == 1
    assert isinstance(trainer.model, nn.Module)


def test_tokens_that_no_text_needs_may_lack_an_embedding(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for images; a text that holds it is refused in words."""
    tokenizer = copy.deepcopy(make_tokenizer())
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    models = (make_model(family, 2, vocabulary=size) for family in ("llama", "gpt2"))
    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True, "max_length": 32, "disable_tqdm": True}
    rows = [{"prompt": "A", "output": "river <image>"}]
    arguments = MTATrainingArguments(output_dir=str(tmp_path), **options)
    trainer = MTATrainer(*models, None, arguments, processing_class=tokenizer, train_dataset=rows)
    with pytest.raises(InputError, match=f"expected tokens below {size} .* got {size}, '<image>'; leave it out"):
        trainer.train()
    trainer.train_dataset = [{"prompt": "A", "output": " river"}]
    trainer.train()
    assert trainer.state.global_step == 1
