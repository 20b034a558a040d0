"""``mta-fast teach``: the teacher runs once over the rows of a run, and its states are kept."""

from __future__ import annotations

from dataclasses import replace

from mta_fast.distill.training.run import build_trainer
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError


def teach(settings: TrainSettings) -> None:
    """Fill ``teacher.cache`` with the states of all training and evaluation rows that it lacks.

    A run that was stopped, or killed, goes on with what isn't there. Under torchrun the ranks share the rows.

    Args:
        settings: of the training; nothing is written to its ``output_dir``.

    Raises:
        InputError: no teacher.cache; a folder with other files or of another teacher; no room; another process that
            fills it. CheckpointError: it can't be written.
    """
    if settings.teacher is None or settings.teacher.cache is None:
        raise InputError("teacher.cache: expected a folder for the teacher's states, got none; give one")
    training = {key: value for key, value in settings.training.items() if key not in _OF_A_RUN}
    trainer = build_trainer(replace(settings, output_dir=settings.teacher.cache, training=training))
    trainer.fill_teacher_cache()
    if trainer.is_world_process_zero():
        print(f"the teacher's states are in {settings.teacher.cache}")


_OF_A_RUN = ("report_to", "logging_dir", "run_name", "push_to_hub")
