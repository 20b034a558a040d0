"""What MTATrainer writes: checkpoints that are whole or absent, projections beside the student, the plain student."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from mta_fast.distill import checkpoints
from mta_fast.distill.adapters import is_peft, save_adapter
from mta_fast.distill.module import DistillationModel


class WholeCheckpoints(Trainer):
    """A Trainer of a DistillationModel; its checkpoints hold the student's own files, and ``mta/`` beside them."""

    _saving = False  # a checkpoint is being written

    @property
    def _module(self) -> DistillationModel:
        """The wrapped module without its wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def export_student(self, directory: str | Path) -> None:
        """Write the plain student and its tokenizer; see ``checkpoints.export_student``. All ranks call it."""
        state = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # a collective; the ranks that don't save get nothing
            state = self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
        if self.args.should_save:
            state = None if state is None else _part(state, "student.")
            checkpoints.export_student(self._module.student, self.processing_class, Path(directory), state)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student's own files, with the tokenizer, and ``mta/`` beside them."""
        if not self.args.should_save:
            return
        module, folder = self._module, Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        student: Any = module.student
        own = None if state_dict is None else _part(state_dict, "student.")
        if is_peft(student):
            save_adapter(student, folder, own)
        else:
            student.save_pretrained(folder, state_dict=own)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if module.mta is not None:
            projections = module.mta.state_dict() if state_dict is None else _part(state_dict, "mta.")
            checkpoints.save_mta(folder, module.mta, projections)
        torch.save(self.args, folder / "training_args.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there once it is whole."""
        run = Path(self._get_output_dir(trial))
        target = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = checkpoints.partial_folder(target)
        first = self.args.local_process_index == 0 if self.args.save_on_each_node else self.args.process_index == 0
        if first:
            checkpoints.discard(partial)
        self.accelerator.wait_for_everyone()
        with checkpoints.removing_on_failure(partial, target):
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if first:
                self._record_best(run, target, partial)
                checkpoints.commit(partial, target)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(target))

    def _record_best(self, run: Path, target: Path, partial: Path) -> None:
        """Name the best checkpoint by the place it will have."""
        if self.state.best_global_step:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(partial / "trainer_state.json"))

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, checkpoints.PARTIAL) if self._saving else directory

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # while it is written it is not pushed
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # the sharded checkpoint holds student and projections
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, module = Path(resume_from_checkpoint), self._module
        checkpoints.check_mta(folder, module.mta)
        checkpoints.load_student(folder, module.student)
        if module.mta is not None:
            checkpoints.load_mta(folder, module.mta)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
