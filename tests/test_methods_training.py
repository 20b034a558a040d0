"""The base methods in the trainer: pairs, feature dynamics, what the student writes, and runs matched in time."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import CONFIG, logged, make_pairs, make_rows, make_trainer, weights

from mta_fast import SpanCollator, SpanExtractor, capture_layers
from mta_fast.distill import MTATrainer
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.distillm import DistiLLM
from mta_fast.distill.methods.distillm2 import DistiLLM2
from mta_fast.distill.methods.fdd import FDD
from mta_fast.distill.methods.losses import skewed_reverse_kl
from mta_fast.distill.training import log
from mta_fast.errors import InputError
from mta_fast.spans.lazy import LazySpans


def _close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def _base_by_hand(trainer: MTATrainer, batch: Any) -> torch.Tensor:
    """The method called alone, on the outputs that transformers gives."""
    method = trainer.model.base
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        outs = [model(**inputs, output_hidden_states=True) for model in (trainer.model.student, trainer.teacher)]
        return method(*outs, batch)


# --- DistiLLM-2 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return make_pairs(make_rows())


@pytest.mark.parametrize("mta", [CONFIG, None])
def test_distillm2_trains_on_pairs(tmp_path: Path, mta: Any, pairs: Any) -> None:
    trainer = make_trainer(tmp_path, base_loss="distillm2", mta=mta, rows=pairs, max_length=160)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 2 * 4
    expected = _base_by_hand(trainer, batch)
    trainer.train()
    assert logged(trainer, "base")[0] == pytest.approx(expected.item(), rel=1e-5)
    assert (logged(trainer, "dsa")[0] > 0) == (mta is not None)
    assert trainer.evaluate()["eval_base"] > 0


def test_mta_covers_all_rows_of_the_pairs(tmp_path: Path, pairs: Any) -> None:
    trainer = make_trainer(tmp_path, base_loss="distillm2", rows=pairs, max_steps=1, max_length=160)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["spans"]["word"].rows.host) == 8
    with torch.no_grad(), capture_layers(trainer.model.student, CONFIG.student_layers) as student:
        trainer.model.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad(), capture_layers(trainer.teacher, CONFIG.teacher_layers) as teacher:
        trainer.teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = trainer.model.mta(student, teacher, batch["spans"]).dsa.item()
    trainer.train()
    assert logged(trainer, "dsa")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("base_loss", ["distillm2", "fdd"])
def test_micro_batches_equal_the_big_batch(tmp_path: Path, base_loss: str, pairs: Any) -> None:
    rows = pairs if base_loss == "distillm2" else make_rows()
    steps: dict[str, Any] = {"max_steps": 2, "optim": "sgd"}  # Adam's steps don't follow the size of a gradient
    big = make_trainer(tmp_path, base_loss=base_loss, rows=rows, **steps)
    big.train()
    sizes: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    small = make_trainer(tmp_path, base_loss=base_loss, rows=rows, **steps, **sizes)
    small.train()
    for name in ("loss", "base", "dsa", "hid"):
        assert logged(small, name) == pytest.approx(logged(big, name), rel=1e-4)
    _close(weights(small), weights(big))


def test_evaluation_of_pairs_does_not_depend_on_the_batch_size(tmp_path: Path, pairs: Any) -> None:
    found = [
        make_trainer(tmp_path, base_loss="distillm2", rows=pairs, per_device_eval_batch_size=size).evaluate()
        for size in (3, 8)
    ]
    assert found[0]["eval_base"] == pytest.approx(found[1]["eval_base"], rel=1e-5)


def test_the_methods_know_the_progress(tmp_path: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    sums = DistiLLM2.sums
    monkeypatch.setattr(DistiLLM2, "sums", lambda method, *outs: (seen.append(method.progress), sums(method, *outs))[1])
    make_trainer(tmp_path, base_loss="distillm2", rows=pairs, mta=None).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("timed", [False, True])
def test_the_progress_may_count_the_step_that_runs(
    tmp_path: Path, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(DistiLLM, "next_source", lambda method: (seen.append(method.progress), "data")[1])
    monkeypatch.setattr(MTATrainer, "_seconds_of_all", lambda trainer: 10.0 * trainer.state.global_step)
    length: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "max_seconds": 50.0} if timed else {}
    _distillm(tmp_path, mta=None, increase=0, count_step=True, **length).train()
    assert seen == pytest.approx([0.0, 0.4, 0.6, 0.8, 1.0] if timed else [0.25, 0.5, 0.75, 1.0])  # 0: no length known


def test_the_final_losses_are_those_of_the_best_model_where_it_is_loaded(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, mta=None, load_best_model_at_end=True, learning_rate=1.0, **steps)
    trainer.train()
    evaluated = logged(trainer, "eval_loss")
    assert evaluated[-1] > min(evaluated)  # such steps make it worse
    assert trainer.final_losses()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


# --- FDD ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mta", [CONFIG, None])
def test_fdd_in_the_trainer_is_fdd_alone(tmp_path: Path, mta: Any) -> None:
    method = FDD([(2, 4), (3, 6), (4, 8)])
    trainer = make_trainer(tmp_path, base_loss=method, mta=mta)
    expected = _base_by_hand(trainer, next(iter(trainer.get_train_dataloader())))
    trainer.train()
    losses = logged(trainer, "base")
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]


def test_fdd_maps_the_layers_of_mta_unless_it_has_its_own(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, base_loss="fdd").model.base.layer_pairs == CONFIG.layer_pairs
    with pytest.raises(InputError, match="FDD: expected layer_pairs, got none"):
        make_trainer(tmp_path, base_loss="fdd", mta=None)


def test_fdd_with_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from models import make_model

    student = peft.get_peft_model(
        make_model("opt", 4, vocabulary=len(make_tokenizer())), peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    trainer = make_trainer(tmp_path, student=student, base_loss="fdd", gradient_checkpointing=True)
    trainer.train()
    assert all(torch.tensor(logged(trainer, "base")).isfinite())


# --- DistiLLM ----------------------------------------------------------------------------------------------------


def _distillm(tmp_path: Path, mta: Any = CONFIG, **options: Any) -> MTATrainer:
    arguments = {name: options.pop(name) for name in list(options) if name not in DISTILLM}
    method = DistiLLM(**({"generation": {"max_new_tokens": 8}, "increase": 0.0} | options))
    extractor = None if mta is None else SpanExtractor()
    settings = {"max_length": 320} | arguments
    return make_trainer(tmp_path, base_loss=method, mta=mta, span_extractor=extractor, **settings)


DISTILLM = ("threshold", "increase", "schedule", "capacity", "generation", "tolerance", "seed")
DISTILLM += ("validation_loss", "count_step")


def test_the_student_writes_what_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _distillm(tmp_path, threshold=1.0, schedule="constant", capacity=1000)
    seen: list[Any] = []
    compute = trainer.compute_loss

    def noted(model: Any, inputs: Any, **options: Any) -> Any:
        seen.append(inputs)
        return compute(model, inputs, **options)

    monkeypatch.setattr(trainer, "compute_loss", noted)
    trainer.train()
    buffer = list(trainer.model.base.replay)
    assert len(buffer) == 16
    assert logged(trainer, "student_share") == [1.0] * 4
    tokenizer = make_tokenizer()
    for step, inputs in enumerate(seen):
        for row, ids, labels in zip(buffer[4 * step :], inputs["input_ids"], inputs["labels"], strict=False):
            text = tokenizer(row["prompt"] + row["output"], return_offsets_mapping=True)
            written = [j for j, (start, _) in enumerate(text["offset_mapping"]) if start >= len(row["prompt"])]
            size = len(text["input_ids"])
            assert written
            assert ids[:size].tolist() == text["input_ids"]
            counted = (labels != -100).nonzero()[:, 0].tolist()
            assert counted == [*written, size]  # and the end token; each at its own place: the loss shifts them
            assert torch.equal(labels[counted], ids[counted])
    extracted = SpanExtractor()([row["prompt"] + row["output"] for row in buffer])
    for name, column in extracted.items():
        assert [row[name] for row in buffer] == column


def test_a_full_buffer_is_replayed(tmp_path: Path) -> None:
    trainer = _distillm(tmp_path, threshold=1.0, schedule="increasing", capacity=4, seed=1)
    trainer.train()
    assert logged(trainer, "student_share")[0] == 1.0  # it was not full
    assert sum(logged(trainer, "replay_share")) > 0
    assert all(entry > 0 for entry in logged(trainer, "dsa"))


def test_micro_batches_wait_for_their_spans_after_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _distillm(
        tmp_path, threshold=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2
    )
    order: list[str] = []
    teach, result = trainer._teach, LazySpans.result
    monkeypatch.setattr(trainer, "_teach", lambda batch: (order.append("teacher"), teach(batch))[1])
    monkeypatch.setattr(LazySpans, "result", lambda spans: (order.append("spans"), result(spans))[1])
    trainer.train()
    assert len(trainer.model.base.replay) == 8
    # denominators of both micro-batches, then their losses, which know the teacher's output
    assert order == ["teacher", "spans", "teacher", "spans", "spans", "spans"] * 2


def test_training_twice_starts_the_parsers_twice(tmp_path: Path) -> None:
    trainer = _distillm(tmp_path, threshold=1.0, max_steps=1)
    trainer.train()
    trainer.train()
    assert len(trainer.model.base.replay) == 8


def test_empty_responses_keep_the_data_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast.distill.methods import distillm

    monkeypatch.setattr(distillm, "generate_texts", lambda model, tokenizer, prompts, *a, **k: [" \n"] * len(prompts))
    trainer = _distillm(tmp_path, threshold=1.0, max_steps=1)
    trainer.train()
    own = {(row["prompt"], row["output"]) for row in make_rows()}
    assert {(row["prompt"], row["output"]) for row in trainer.model.base.replay} <= own
    assert logged(trainer, "empty_responses") == [4.0]


def test_the_threshold_follows_the_evaluations(tmp_path: Path) -> None:
    trainer = _distillm(tmp_path, mta=None, increase=0.25, tolerance=-100.0, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.model.base.threshold == 1.0  # four evaluations after the one before training
    assert logged(trainer, "threshold")[0] == 0.0


@pytest.mark.parametrize("fused", [True, False])
def test_the_threshold_may_follow_the_cross_entropy(tmp_path: Path, fused: bool) -> None:
    options: dict[str, Any] = {"increase": 0.25, "eval_strategy": "steps", "fused_head": fused}
    trainer = _distillm(tmp_path, mta=None, validation_loss="cross_entropy", per_device_eval_batch_size=3, **options)
    expected = make_trainer(tmp_path, base_loss="cross_entropy", mta=None, max_length=320).evaluate()["eval_base"]
    metrics = trainer.evaluate()
    assert metrics["eval_validation"] == pytest.approx(expected, rel=1e-5)
    assert trainer.model.base.kept_loss == metrics["eval_validation"]
    assert metrics["eval_base"] == metrics["eval_loss"] != pytest.approx(expected, rel=1e-2)
    plain = _distillm(tmp_path, mta=None, **options)
    metrics = plain.evaluate()
    assert "eval_validation" not in metrics
    assert plain.model.base.kept_loss == metrics["eval_base"]


def test_distillm_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"threshold": 0.7, "schedule": "constant", "capacity": 6, "seed": 3}
    whole = _distillm(tmp_path / "whole", **options)
    whole.train()
    first = _distillm(tmp_path / "parts", save_strategy="steps", save_steps=2, **options)
    first.train()
    second = _distillm(tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    _close(weights(second), weights(whole))
    assert list(second.model.base.replay) == list(whole.model.base.replay)


def test_what_distillm_needs_is_asked_for_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="span_extractor: expected one"):
        make_trainer(tmp_path, base_loss="distillm")
    with pytest.raises(InputError, match="generation: expected fields of GenerationSettings"):
        _distillm(tmp_path, generation={"max_tokens": 3})
    with pytest.raises(InputError, match="granularity phrase, word, got word"):
        make_trainer(tmp_path, base_loss="distillm", span_extractor=SpanExtractor(granularity="word"))
    rows = [row | {"prompt": ""} if i == 3 else row for i, row in enumerate(make_rows())]
    with pytest.raises(InputError, match="row 3: expected a prompt that the student can answer"):
        _distillm(tmp_path, mta=None, rows=rows)
    trainer = make_trainer(tmp_path, mta=None)
    with pytest.raises(InputError, match="eval_dataset: expected one"):
        trainer.__class__(
            trainer.model.student,
            trainer.teacher,
            None,
            trainer.args,
            processing_class=make_tokenizer(),
            base_loss="distillm",
            train_dataset=make_rows(),
        )


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, mta=None, save_strategy="steps", save_steps=2, max_steps=2).train()
    other = make_trainer(tmp_path, mta=None, base_loss="skl")
    with pytest.raises(InputError, match="expected the run that it is of.* base: srkl -> skl"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_finished_run_takes_no_further_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second a look
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    first = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    again = make_trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 2
    assert again.train_seconds == first.train_seconds > 0
    _close(weights(again), weights(first))
    assert again.final_losses()["eval_loss"] == pytest.approx(first.final_losses()["eval_loss"], rel=1e-5)


def test_more_ranks_than_before_share_the_first_one_s_state(tmp_path: Path) -> None:
    from mta_fast.distill.training.checkpoints import load_progress, save_progress

    save_progress(tmp_path, 0, {"seconds": 1.0})
    assert load_progress(tmp_path, 3) == {"seconds": 1.0}
    assert load_progress(tmp_path / "none", 0) is None


# --- equal time --------------------------------------------------------------------------------------------------


def test_time_ends_a_run_and_the_learning_rate_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    trainer = make_trainer(tmp_path, max_seconds=5.0, max_steps=100, lr_scheduler_type="linear")
    step = trainer.training_step

    def in_a_second(*args: Any) -> torch.Tensor:
        seconds[0] += 1
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", in_a_second)
    trainer.train()
    assert trainer.state.global_step == 5
    assert logged(trainer, "learning_rate") == pytest.approx([0.001, 0.0008, 0.0006, 0.0004, 0.0002])


def test_seconds_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    seconds = json.loads((tmp_path / "checkpoint-2" / "progress_0.json").read_text())["seconds"]
    assert 0 < seconds <= first.train_seconds
    second = make_trainer(tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.train_seconds > seconds


def test_a_clock_needs_a_warm_up_ratio(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warmup_steps: expected a ratio"):
        make_trainer(tmp_path, max_seconds=5.0, warmup_steps=10)
    with pytest.raises(InputError, match="max_seconds: expected a time > 0"):
        make_trainer(tmp_path, max_seconds=0.0)


# --- a method is asked, never named ------------------------------------------------------------------------------


class OwnPairs(DistiLLM2):
    """A subclass under a name that nothing knows."""


class TwoAnswers(BaseMethod):
    """Rows with two responses under names of its own, which it trains on one after the other."""

    responses = ("short", "long")

    def collator(self, collator: Any) -> Any:
        def collate(rows: Any) -> Any:
            kinds = ("word_spans", "phrase_spans")
            return collator(
                [
                    {"prompt": row["prompt"], "output": row[name], **{kind: row[f"{name}_{kind}"] for kind in kinds}}
                    for name in self.responses
                    for row in rows
                ]
            )

        return collate

    def counts(self, batch: Any) -> torch.Tensor:
        return (batch["labels"][:, 1:] != -100).sum()[None]

    def sums(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        return skewed_reverse_kl(student.logits, teacher.logits, batch["labels"], reduction="sum")[None]


@pytest.mark.parametrize(("loss", "names"), [("OwnPairs", ("chosen", "rejected")), ("TwoAnswers", ("short", "long"))])
def test_a_method_of_ones_own_reads_its_rows_from_yaml(tmp_path: Path, loss: str, names: tuple[str, str]) -> None:
    from mta_fast.distill.training.run import build_trainer
    from mta_fast.distill.training.settings import TrainSettings

    tokenizer = make_tokenizer()
    for name, layers in (("teacher", 8), ("student", 4)):
        make_model("gpt2", layers, vocabulary=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"Say {i}.", names[0]: f"It is {i}.", names[1]: f"The answer is {i}."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}/run\nteacher: {{path: {tmp_path}/teacher}}\nstudent: {{path: {tmp_path}/student}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl}}\nspans: {{cache: {tmp_path}/cache}}\n"
        f"base: {{loss: '{__name__}:{loss}'}}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 4, use_cpu: true, logging_steps: 1, save_strategy: 'no',"
        " max_length: 160}\n"
    )
    trainer = build_trainer(TrainSettings.from_yaml(tmp_path / "run.yaml"))
    assert set(trainer.train_dataset.column_names) == {
        *("prompt", *names),
        *(f"{name}_{kind}_spans" for name in names for kind in ("word", "phrase")),
    }
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 2 * 4
    trainer.train()
    assert logged(trainer, "base")[0] > 0
    assert logged(trainer, "dsa")[0] > 0


def test_a_collator_of_ones_own_beside_a_method_with_batches(tmp_path: Path) -> None:
    class Shouting(SpanCollator):
        def __call__(self, rows: Any) -> dict[str, Any]:
            return super().__call__(rows) | {"seen": len(rows)}

    own = Shouting(make_tokenizer(), max_length=64)
    extractor = SpanExtractor()
    options: dict[str, Any] = {"data_collator": own, "span_extractor": extractor, "max_steps": 2}
    method = DistiLLM(threshold=1.0, increase=0.0, schedule="constant", capacity=4, generation={"max_new_tokens": 4})
    trainer = make_trainer(tmp_path / "one", base_loss=method, **options)
    assert next(iter(trainer.get_train_dataloader()))["seen"] == 4
    trainer.train()
    assert len(method.replay) == 4
    with pytest.raises(InputError, match="data_collator: expected a SpanCollator, as DistiLLM also makes .* got funct"):
        make_trainer(tmp_path / "two", base_loss=DistiLLM(increase=0.0), **options | {"data_collator": lambda rows: {}})
    pairs = make_pairs(make_rows())
    paired = make_trainer(tmp_path / "three", base_loss="distillm2", rows=pairs, data_collator=own)
    assert len(next(iter(paired.get_train_dataloader()))["input_ids"]) == 2 * 4


def test_nothing_outside_the_registry_tells_methods_by_name_or_type() -> None:
    from mta_fast.distill.methods.registry import METHODS

    package = Path(__file__).parents[1] / "mta_fast"
    classes = "|".join(("BaseMethod", "NoBaseLoss", *(getattr(m, "func", m).__name__ for m in METHODS.values())))
    names = "|".join(METHODS.keys() - {"none"})
    told = re.compile(
        rf"base\.loss *[!=]=|isinstance\([^\n]*\b({classes})\b|[!=]= *[\"']({names})[\"']|[\"']({names})[\"'] *[!=]="
    )
    # a divergence of the op has the name of its loss
    own = {"registry.py", "reference.py", "contract.py", "linear_divergence.py"}
    files = [file for file in package.rglob("*.py") if file.name not in own and "kernels" not in file.parts]
    assert len(files) > 50
    found = {str(file.relative_to(package)): told.findall(file.read_text(encoding="utf-8")) for file in files}
    assert not {file: each for file, each in found.items() if each}
