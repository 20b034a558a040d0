"""MTATrainer refuses models that it could not train, before it changes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import CONFIG, STUDENT_LAYERS, TEACHER_LAYERS, make_rows, make_trainer

from mta_fast import MTALoss
from mta_fast.distill import MTATrainer, MTATrainingArguments
from mta_fast.errors import InputError

SHARED = "teacher: expected a model of its own, it shares .* would be frozen with it; load the teacher a second time"


def _teacher() -> Any:
    return make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(make_tokenizer()))


def _student() -> Any:
    return make_model("gpt2", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))


def _lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM"} | options))


def _same(teacher: Any) -> Any:
    return teacher


def _over_its_base(teacher: Any) -> Any:
    return _lora(teacher)


def _with_its_embeddings(teacher: Any) -> Any:
    student = make_model("llama", STUDENT_LAYERS, width=48, vocabulary=len(make_tokenizer()))
    student.set_input_embeddings(teacher.get_input_embeddings())
    return student


def _with_a_part_of_its_head(teacher: Any) -> Any:
    student = make_model("llama", STUDENT_LAYERS, width=48, vocabulary=len(make_tokenizer()))
    norm = student.model.norm
    norm.weight = nn.Parameter(teacher.lm_head.weight.data.flatten()[100:148])  # other object, other first byte
    return student


@pytest.mark.parametrize("make_student", [_same, _over_its_base, _with_its_embeddings, _with_a_part_of_its_head])
def test_memory_that_the_teacher_shares_is_refused(tmp_path: Path, make_student: Any) -> None:
    teacher = _teacher()
    student = make_student(teacher)
    before = [p.requires_grad for p in teacher.parameters()]
    with pytest.raises(InputError, match=SHARED):
        make_trainer(tmp_path, student=student, teacher=teacher)
    assert [p.requires_grad for p in teacher.parameters()] == before
    assert teacher.training


def test_copies_share_nothing(tmp_path: Path) -> None:
    teacher = _teacher()
    teacher.tie_weights()
    trainer = make_trainer(tmp_path, student=_lora(copy.deepcopy(teacher)), teacher=teacher, max_steps=1)
    trainer.train()
    nowhere = _student().to("meta")
    with pytest.raises(InputError, match=r"student: expected weights in memory, .* has none \(meta device\)"):
        make_trainer(tmp_path, student=nowhere, teacher=teacher)


def test_a_loss_over_the_teachers_own_head_is_refused(tmp_path: Path) -> None:
    teacher, loss = _teacher(), MTALoss(CONFIG, 32, 48)
    loss.projections[0].weight = nn.Parameter(teacher.lm_head.weight.data[:48, :32])
    with pytest.raises(InputError, match="shares 1 parameters with mta, projections.0.weight first"):
        make_trainer(tmp_path, teacher=teacher, mta=loss)


def _for_inference() -> Any:
    student = _lora(make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer())))
    return student.requires_grad_(False)


def _quantised() -> Any:
    student = _student()
    student.is_quantized = True
    return student


def _prompt_tuned() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(_student(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _natively_adapted() -> Any:
    peft = pytest.importorskip("peft")
    student = _student()
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"]))
    return student


def _twice_adapted() -> Any:
    peft = pytest.importorskip("peft")
    student = _lora(make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer())))
    student.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    student.base_model.set_adapter(["default", "second"])
    return student


def _spread() -> Any:
    student = _student()
    student.hf_device_map = {"transformer": 0, "lm_head": 1}
    return student


@pytest.mark.parametrize(
    ("make_student", "message"),
    [
        (lambda: _student().requires_grad_(False), "student: expected parameters to train, got none with requires_gr"),
        (_for_inference, r"load its adapter with PeftModel.from_pretrained\(..., is_trainable=True\)"),
        (lambda: _student().half(), "student: expected float32 or bfloat16 weights to train, transformer.wte.weight"),
        (_quantised, "student: expected weights that can be trained, got quantised ones; put adapters on them"),
        (_prompt_tuned, "student: expected adapters that can be merged into the weights .* got PeftModelForCausalLM"),
        (_natively_adapted, "on a model wrapped by peft.get_peft_model.*got GPT2LMHeadModel"),
        (_twice_adapted, "student: expected one active adapter, got 2 of default, second"),
        (_spread, "student: expected one on a single device, got one spread by device_map"),
    ],
)
def test_students_that_nothing_would_train_are_refused(tmp_path: Path, make_student: Any, message: str) -> None:
    teacher = _teacher()
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, student=make_student(), teacher=teacher)
    assert all(p.requires_grad for p in teacher.parameters())


def test_frozen_projections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mta: expected projections that are trained, projections.0.weight is frozen"):
        make_trainer(tmp_path, mta=MTALoss(CONFIG, 32, 48).requires_grad_(False))


@pytest.mark.parametrize("left_out", ["student", "mta"])
def test_an_optimizer_that_lacks_parameters_is_refused(tmp_path: Path, left_out: str) -> None:
    student, loss, tokenizer = _student(), MTALoss(CONFIG, 32, 48), make_tokenizer()
    held = {"student": list(student.parameters()), "mta": list(loss.parameters())}
    arguments = MTATrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no")
    options: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": make_rows()[:8]}
    whole = torch.optim.SGD([*held["student"], *held["mta"]], lr=0.1)
    MTATrainer(student, _teacher(), loss, arguments, optimizers=(whole, None), **options).train()
    kept = "mta" if left_out == "student" else "student"
    part = torch.optim.SGD(held[kept], lr=0.1)
    message = f"optimizers: expected one over all .* it lacks {len(held[left_out])} of {left_out}, "
    with pytest.raises(InputError, match=message):
        MTATrainer(student, _teacher(), loss, arguments, optimizers=(part, None), **options)


def _only_the_last_block() -> Any:
    student = make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer())).requires_grad_(False)
    student.lm_head.requires_grad_(True)
    return student


def _disabled_adapter() -> Any:
    student = _lora(make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer())))
    student.base_model.disable_adapter_layers()
    for name, p in student.named_parameters():
        p.requires_grad_("lora_" in name)
    return student


@pytest.mark.parametrize("make_student", [_only_the_last_block, _disabled_adapter])
def test_a_loss_that_never_reaches_the_student_stops_the_first_step(tmp_path: Path, make_student: Any) -> None:
    trainer = make_trainer(tmp_path, student=make_student(), base_loss=None)
    with pytest.raises(InputError, match="student: expected a loss that reaches its trainable parameters, none of"):
        trainer.train()
    assert trainer.state.global_step == 0
