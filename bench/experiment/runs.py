"""One run of the experiment: an arm, a seed and a learning rate; what it measures on its way, as plain data."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from bench.experiment.arms import POINTS, Arm, RunSettings
from bench.experiment.prepare import Prepared
from bench.experiment.setups import EVALUATED, HELD_OUT, OUTSIDE, TRAIN
from mta_fast.distill import MTATrainer, MTATrainingArguments
from mta_fast.distill.heads import HeadStates, deferring
from mta_fast.distill.methods.losses import counted_tokens
from mta_fast.distill.placebo import shuffled, shuffled_positions
from mta_fast.distill.teacher.live import TeacherOutput
from mta_fast.inputs import model_inputs
from mta_fast.layers import evaluating
from mta_fast.ops.linear_divergence import divergence

FIGURES = ("kl", "srkl", "nll")
ALPHA = 0.1  # of SRKL
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
    """Measures the student after the steps it is asked to."""

    def __init__(self, prepared: Prepared, trainer: Any, steps: Sequence[int]) -> None:
        self.prepared, self.trainer, self.steps = prepared, trainer, set(steps)
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step in self.steps:
            sets = EVALUATED if step == max(self.steps) else (HELD_OUT, OUTSIDE)
            self.points.append({"step": step, **measured(self.trainer, self.prepared, sets)})


@torch.no_grad()
def measured(trainer: Any, prepared: Prepared, sets: Sequence[str]) -> Figures:
    """KL, SRKL and NLL of the student, means over the counted positions of each set; without the placebo."""
    module = trainer._module
    made: Figures = {}
    with evaluating(module):
        for part in sets:
            sums, counted = dict.fromkeys(FIGURES, 0.0), 0
            for own, teacher in zip(prepared.batches[part], _teacher_states(trainer, prepared, part), strict=True):
                batch = trainer._prepare_inputs(own)  # on the device
                with deferring(module.head, module.vocabulary) as student:
                    module.student(**model_inputs(module.student, batch), use_cache=False)
                assert student is not None  # its head was taken apart
                tokens = counted_tokens(batch["labels"])
                log_p, log_q = (_log_probabilities(side, tokens) for side in (teacher, student))
                labels = batch["labels"].flatten()[tokens + 1]
                values = {
                    "kl": divergence(log_p, log_q, "forward_kl"),
                    "srkl": divergence(log_p, log_q, "srkl", ALPHA),
                    "nll": -log_q.gather(1, labels[:, None]),
                }
                sums = {name: total + float(values[name].sum()) for name, total in sums.items()}
                counted += len(tokens)
            made[part] = {name: total / counted for name, total in sums.items()}
    return made


def _teacher_states(trainer: Any, prepared: Prepared, part: str) -> list[HeadStates]:
    """What the teacher's head reads of a set's batches: the same for every run of a process, read once."""
    if part not in prepared.teacher_states:
        found = [MTATrainer._teach(trainer, trainer._prepare_inputs(own)).head for own in prepared.batches[part]]
        prepared.teacher_states[part] = [states for states in found if states is not None]
    return prepared.teacher_states[part]


def _log_probabilities(side: HeadStates, tokens: Tensor) -> Tensor:
    logits = side.head.logits(side.at(tokens))[:, : side.vocabulary]
    return logits.float().log_softmax(-1)


def trainer_of(
    prepared: Prepared, arm: Arm, settings: RunSettings, folder: str, *, teacher: Any = None, part: str = TRAIN,
    student: nn.Module | None = None, norms: bool = False,
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
        log_gradient_norms=norms,
        report_to=[],
        disable_tqdm=True,
        use_cpu=prepared.device == "cpu",
    )
    return ExperimentTrainer(
        prepared.student(settings.seed) if student is None else student,
        teacher,
        arm.mta,
        arguments,
        processing_class=prepared.tokenizer,
        teacher_tokenizer=prepared.teacher_tokenizer,
        base_loss="srkl",
        base_loss_options={"alpha": ALPHA},
        teacher_cache=prepared.cache,
        train_dataset=prepared.rows[part],
    )


def run(
    prepared: Prepared,
    arm: Arm,
    settings: RunSettings,
    *,
    points: Sequence[float] = POINTS,
    keep: Path | None = None,
    norms: bool = False,
) -> dict[str, Any]:
    """Train, and what was found: figures of the held-out sets, times, digests of the start and of the batches.

    Args:
        points: shares of the run after which the student is measured.
        keep: a folder for the trained student; None: it is not kept.
        norms: whether each term's gradient is measured ten times, which takes time of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(prepared, arm, settings, folder, norms=norms)
        watch = Watch(prepared, trainer, settings.after(points))
        trainer.add_callback(watch)  # the last one: the trainer's own clock has stopped by then
        trainer.remove_callback(PrinterCallback)
        trainer.begin(settings.seed if arm.placebo else None)
        start = digest_of_weights(trainer._module.student)
        trainer.train()
        if keep is not None:
            trainer.export_student(keep, overwrite=True)
        return {
            "points": watch.points,
            "logs": [entry for entry in trainer.state.log_history if "base" in entry],
            "train_seconds": trainer.train_seconds,
            "start": start,
            "batches": trainer.order.hexdigest(),
        }


def digest_of_weights(model: nn.Module) -> str:
    """Of all parameters, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
