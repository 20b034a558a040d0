"""One run of the experiment: an arm, a seed and a learning rate; what it measures on its way, as plain data."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from bench.experiment.arms import Arm, RunSettings
from bench.experiment.prepare import Prepared
from bench.experiment.setups import EVALUATED, HELD_OUT, OUTSIDE, TRAIN
from mta_fast.distill import MTATrainer, MTATrainingArguments
from mta_fast.distill.heads import deferring
from mta_fast.distill.methods.losses import TokenMethod
from mta_fast.distill.placebo import shuffled, shuffled_positions
from mta_fast.distill.teacher.live import TeacherOutput
from mta_fast.distill.training.module import StudentOutput
from mta_fast.inputs import model_inputs
from mta_fast.layers import evaluating

FIGURES = {"kl": "forward_kl", "srkl": "srkl", "nll": "cross_entropy"}
Figures = dict[str, dict[str, float]]  # set -> figure -> value


class ExperimentTrainer(MTATrainer):
    """MTATrainer that can permute what MTA reads of the teacher, and remembers which batches it has seen.

    Attributes:
        placebo_seed: of the permutations; None: the teacher's states as they are.
        order: a digest of the training batches.
    """

    placebo_seed: int | None = None

    def _teach(self, batch: Mapping[str, Any]) -> TeacherOutput:
        made = super()._teach(batch)
        if self.placebo_seed is None:
            return made
        positions = shuffled_positions(batch["input_ids"], batch["attention_mask"], self.placebo_seed)
        made.hidden_states = {layer: shuffled(state, positions) for layer, state in made.hidden_states.items()}
        if made.importance is not None:
            made.importance = {layer: shuffled(values, positions) for layer, values in made.importance.items()}
        return made

    def get_batch_samples(self, *args: Any) -> Any:
        batches, items = super().get_batch_samples(*args)
        for batch in batches:
            self.order.update(batch["input_ids"].cpu().numpy().tobytes())
        return batches, items

    def begin(self, placebo_seed: int | None) -> None:
        """Before training."""
        self.placebo_seed, self.order = placebo_seed, hashlib.blake2b(digest_size=8)


class Watch(TrainerCallback):
    """Measures the student at the steps it is asked to."""

    def __init__(self, prepared: Prepared, steps: Sequence[int]) -> None:
        self.prepared, self.steps = prepared, set(steps)
        self.points: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter() - self._begun)
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step in self.steps:
            last = step == max(self.steps)
            sets = EVALUATED if last else (HELD_OUT, OUTSIDE)
            self.points.append({"step": step, **measured(self.trainer, self.prepared, sets)})


@torch.no_grad()
def measured(trainer: Any, prepared: Prepared, sets: Sequence[str]) -> Figures:
    """KL, SRKL and NLL of the student, means over the counted positions of each set; without the placebo."""
    module, methods = trainer._module, {name: TokenMethod(loss) for name, loss in FIGURES.items()}
    made: Figures = {}
    with evaluating(module):
        for part in sets:
            sums = dict.fromkeys(FIGURES, 0.0)
            counted = 0
            for batch in prepared.batches[part]:
                with deferring(module.head, module.vocabulary) as head:
                    module.student(**model_inputs(module.student, batch), use_cache=False)
                student = StudentOutput(None, {}, head)
                teacher = MTATrainer._teach(trainer, batch)
                for name, method in methods.items():
                    sums[name] += float(method.sums(student, teacher, batch))
                counted += int(methods["kl"].counts(batch))
            made[part] = {name: value / counted for name, value in sums.items()}
    return made


def trainer_of(
    prepared: Prepared, arm: Arm, settings: RunSettings, folder: str, *, teacher: Any = None, part: str = TRAIN,
    callbacks: Sequence[Any] = (), student: nn.Module | None = None,
) -> ExperimentTrainer:  # fmt: skip
    """A run's trainer; the teacher's states come from the cache, which ``teacher`` fills where some are missing."""
    arguments = MTATrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        max_tokens_per_batch=prepared.setup.tokens,
        max_length=prepared.length(part),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings.seed,
        projection_init=arm.start,
        save_strategy="no",
        logging_steps=max(1, settings.steps // 10),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return ExperimentTrainer(
        prepared.student(settings.seed) if student is None else student,
        teacher,
        arm.mta,
        arguments,
        processing_class=prepared.tokenizer,
        teacher_tokenizer=prepared.teacher_tokenizer,
        base_loss="srkl",
        teacher_cache=prepared.cache,
        train_dataset=prepared.rows[part],
        callbacks=list(callbacks),
    )


def run(prepared: Prepared, arm: Arm, settings: RunSettings, keep: Path | None = None) -> dict[str, Any]:
    """Train, and what was found: points on the held-out sets, times, the digest of the batches.

    Args:
        keep: a folder for the trained student; None: it is not kept.
    """
    watch = Watch(prepared, settings.points)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(prepared, arm, settings, folder, callbacks=[watch])
        watch.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.begin(settings.seed if arm.placebo else None)
        trainer.train()
        if keep is not None:
            trainer.export_student(keep, overwrite=True)
        return {
            "points": watch.points,
            "logs": [entry for entry in trainer.state.log_history if "base" in entry],
            "train_seconds": trainer.train_seconds,
            "step_seconds": statistics.median(watch.times),
            "batches": trainer.order.hexdigest(),
        }
