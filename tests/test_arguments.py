"""Every field of TrainingArguments and argument of Trainer is followed or refused; the doubtful ones are tried."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import logged, make_rows, make_trainer
from transformers import Trainer, TrainingArguments

from mta_fast.distill import MTATrainingArguments
from mta_fast.distill.training.arguments import FOR_SCRIPTS, REFUSED, REFUSED_OPTIONS
from mta_fast.distill.training.run import training_arguments
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError

# why each field works: what reads it, or the test that shows it
FOLLOWED: dict[str, str] = {
    **dict.fromkeys(("output_dir", "save_strategy", "save_steps", "save_total_limit"), "test_checkpoints"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "test_checkpoints"),
    "save_only_model": "Trainer's, around saving._save_checkpoint",
    "save_on_each_node": "saving._save_checkpoint",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"), "test_trainer"),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "warmup_steps"), "test_trainer, test_run"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), "create_scheduler"),
    **dict.fromkeys(("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), "create_optimizer"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "refused beside an optimiser that reads none, below"),
    "max_grad_norm": "Trainer clips the wrapped module's parameters",
    **dict.fromkeys(("bf16", "fp16", "tf32"), "accelerate's autocast and scaler; the teacher runs under it too"),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), "module, test_trainer"),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), "their older names"),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "either sets torch_compile, which is refused"),
    "neftune_noise_alpha": "below",
    "auto_find_batch_size": "below",
    "torch_empty_cache_steps": "Trainer.training_step",
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"), "Trainer"),
    **dict.fromkeys(("log_on_each_node", "log_level", "log_level_replica", "disable_tqdm"), "Trainer"),
    **dict.fromkeys(("report_to", "run_name", "project"), "the reporting callbacks"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "the reporting callbacks"),
    "include_num_input_tokens_seen": "below",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size"), "test_trainer"),
    "eval_on_start": "below",
    "prediction_loss_only": "always so: no predictions are kept",
    "eval_accumulation_steps": "Trainer moves the losses, which is all there is, to the CPU",
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), "saving"),
    **dict.fromkeys(("hub_always_push", "hub_revision"), "saving"),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), "Trainer's resume"),
    **dict.fromkeys(("full_determinism", "seed", "data_seed"), "Trainer and its samplers"),
    **dict.fromkeys(("use_cpu", "ddp_backend", "ddp_timeout"), "TrainingArguments' own set-up"),
    "accelerator_config": "accelerate; two of its fields are refused below",
    "dataloader_drop_last": "of training; evaluation is always whole, below",
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), "Trainer's loaders; test_collate"),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_multiprocessing_context"), "Trainer's loaders"),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_in_order"), "Trainer's loaders"),
    "remove_unused_columns": "always false: the collator reads texts and spans",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "feeding, test_feeding"),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), "accelerate's DDP"),
    "ddp_static_graph": "accelerate's DDP",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "test_distributed, the cluster examples"),
    "skip_memory_metrics": "Trainer",
    **dict.fromkeys(FOR_SCRIPTS, "for scripts that hold the arguments; refused in YAML, below"),
}
FOLLOWED_OPTIONS: dict[str, str] = {
    "args": "MTATrainer's own argument",
    "data_collator": "test_trainer",
    **dict.fromkeys(("train_dataset", "eval_dataset"), "test_trainer, test_feeding"),
    "processing_class": "MTATrainer's own argument",
    "callbacks": "Trainer",
    "optimizers": "test_fitness",
    "optimizer_cls_and_kwargs": "below",
}
OTHER_VALUES: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "debug": "underflow_overflow",
    "parallelism_config": object(),
    "resume_from_checkpoint": "runs/x/checkpoint-2",
}


def _arguments(tmp_path: Path, **values: Any) -> MTATrainingArguments:
    return MTATrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)


def test_every_field_is_followed_or_refused() -> None:
    """A field that a new transformers brings has to be thought about: follow it, or add it to REFUSED."""
    names = {field.name for field in fields(TrainingArguments) if field.init}
    assert not set(FOLLOWED) & set(REFUSED)
    assert names - set(FOLLOWED) - set(REFUSED) == set()
    options = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert options - set(FOLLOWED_OPTIONS) - set(REFUSED_OPTIONS) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_fields_without_effect_are_refused(tmp_path: Path, name: str) -> None:
    kept = REFUSED[name][0]
    value = OTHER_VALUES.get(name, not kept)
    with pytest.raises(InputError, match=f"{name}: expected .*, got .*; "):
        _arguments(tmp_path, **{name: value})
    _arguments(tmp_path, **{name: kept})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"torch_compile_mode": "default"}, "torch_compile: expected false, got true"),
        ({"optim": "lomo"}, "optim: expected an optimiser with groups, got 'lomo'"),
        ({"optim_args": "momentum=0.9"}, "optim_args: expected none, got 'momentum=0.9'; adamw_torch_fused reads none"),
        ({"optim_target_modules": ["attn"]}, "optim_target_modules: expected none"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: expected dispatch_batches false"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: expected even_batches true"),
    ],
)
def test_combinations_without_effect_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _arguments(tmp_path, **values)


def test_an_optimizer_reads_its_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.25")
    assert {group["momentum"] for group in trainer.create_optimizer().param_groups} == {0.25}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_without_effect_are_refused(tmp_path: Path, name: str) -> None:
    from mta_fast.distill import MTATrainer

    with pytest.raises(InputError, match=f"{name}: expected none, as MTATrainer does not follow it: "):
        MTATrainer(
            torch.nn.Linear(1, 1), None, None, _arguments(tmp_path), processing_class=None, **{name: lambda: None}
        )


def test_yaml_has_no_fields_for_scripts(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{output_dir: o, teacher: {path: t}, student: {path: s}, data: {train: sample}}")
    settings = TrainSettings.from_yaml(file, ["training.do_train=false"])
    with pytest.raises(InputError, match=r"training\.do_train: expected nothing, as it has no effect here"):
        training_arguments(settings)


# --- those that could have been without effect -------------------------------------------------------------------


def test_noise_on_the_embeddings_reaches_the_student_and_not_its_evaluation(tmp_path: Path) -> None:
    plain, noisy = (make_trainer(tmp_path, max_steps=1, neftune_noise_alpha=noise) for noise in (None, 100.0))
    assert noisy.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    plain.train()
    noisy.train()
    assert logged(noisy, "base")[0] != pytest.approx(logged(plain, "base")[0], rel=1e-3)
    embeddings = noisy.model.student.get_input_embeddings()
    assert not embeddings._forward_hooks


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, auto_find_batch_size=True, gradient_accumulation_steps=2)
    student, forward = trainer.model.student, trainer.model.student.forward

    def limited(*args: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(*args, **inputs)

    student.forward = limited
    trainer.train()
    assert trainer.state.train_batch_size == 2
    assert trainer.state.global_step == 2
    assert all(value > 0 for value in logged(trainer, "loss"))


def test_many_options_in_one_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        rows=make_rows()[:23],
        max_steps=2,
        include_num_input_tokens_seen="non_padding",
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=2,
        eval_accumulation_steps=1,
        per_device_eval_batch_size=4,
        dataloader_drop_last=True,
        save_strategy="best",
        metric_for_best_model="dsa",
        greater_is_better=False,
        save_only_model=True,
        torch_empty_cache_steps=1,
        logging_first_step=True,
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen > 0
    assert len(logged(trainer, "eval_loss")) == 2
    # 7 rows in batches of four: dataloader_drop_last is of training alone
    whole = make_trainer(tmp_path / "other", rows=make_rows()[:23], per_device_eval_batch_size=7)
    assert logged(trainer, "eval_base")[0] == pytest.approx(whole.evaluate()["eval_base"], rel=1e-5)
    checkpoint = tmp_path / "checkpoint-2"
    assert checkpoint.is_dir()
    assert not (checkpoint / "optimizer.pt").exists()


def test_an_optimizer_class_of_ones_own_has_the_projections_rate(tmp_path: Path) -> None:
    from mta_fast.distill import MTATrainer

    trainer = make_trainer(tmp_path)
    own = MTATrainer(
        trainer.model.student,
        trainer.teacher,
        trainer.model.mta,
        _arguments(tmp_path, projection_learning_rate=0.25),
        processing_class=make_tokenizer(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}),
    )
    groups = own.create_optimizer().param_groups
    assert {(group["lr"], group["momentum"]) for group in groups} == {(0.5, 0.5), (0.25, 0.5)}


def test_the_threshold_follows_the_trainers_own_evaluation_set(tmp_path: Path) -> None:
    from mta_fast.distill.methods.distillm import DistiLLM

    options: dict[str, Any] = {"mta": None, "max_steps": 1}
    with pytest.raises(InputError, match="eval_strategy: expected steps or epoch, as the threshold of distillm"):
        make_trainer(tmp_path, base_loss=DistiLLM(), **options)
    method = DistiLLM()
    trainer = make_trainer(tmp_path, base_loss=method, eval_strategy="steps", eval_steps=1, **options)
    trainer.evaluate(eval_dataset=make_rows()[:2])
    assert method.kept_loss is None
    trainer.evaluate()
    assert method.kept_loss is not None
