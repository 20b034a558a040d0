"""What MTATrainer writes: checkpoints that are whole or absent, projections beside the student, the plain student."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from mta_fast import files
from mta_fast.distill import manifest
from mta_fast.distill.training import checkpoints, fingerprint
from mta_fast.distill.training.adapters import is_peft, save_adapter
from mta_fast.distill.training.interrupt import deaf_workers
from mta_fast.distill.training.module import DistillationModel
from mta_fast.errors import InputError


class WholeCheckpoints(Trainer):
    """A Trainer of a DistillationModel; its checkpoints hold the student's own files, and ``mta/`` beside them."""

    run_settings: Mapping[str, Any] | None = None  # of ``mta-fast train``, kept in the checkpoints
    verified: Path | None = None  # a checkpoint whose files were just compared with its manifest
    stop_wanted: Callable[[], bool] | None = None  # asked by all ranks after each step: save a checkpoint, and stop
    stopped = False  # it was, and this is how the training ended
    model_fingerprint: fingerprint.Fingerprint  # of student, teacher and base method, before they are wrapped
    _saving = False  # a checkpoint is being written
    _saved_step: int | None = None

    @property
    def _module(self) -> DistillationModel:
        """The wrapped module without its wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def export_student(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the plain student and its tokenizer; see ``checkpoints.export_student``. All ranks call it.

        Args:
            directory: a free name, or with ``overwrite`` an earlier export.
            overwrite: replace an earlier export.
        """
        sources = [*Path(str(self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
        sources += checkpoints.loaded_from(getattr(self, "teacher", None))
        checkpoints.check_export(directory, sources=sources, overwrite=overwrite)
        self.accelerator.wait_for_everyone()  # every rank has looked before one writes
        state = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # a collective; the ranks that don't save get nothing
            state = self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
        if self.args.should_save:
            state = None if state is None else _part(state, "student.")
            student, tokenizer = self._module.student, self.processing_class
            checkpoints.export_student(student, tokenizer, directory, state, sources=sources, overwrite=overwrite)
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
        partial = files.partial_folder(target)
        first = self.args.local_process_index == 0 if self.args.save_on_each_node else self.args.process_index == 0
        if first:
            files.discard(partial)
        self.accelerator.wait_for_everyone()
        with files.removing_on_failure(partial, target):
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if first:
                self._record_best(run, target, partial)
                fingerprint.save(partial, self.run_fingerprint, self.run_settings)
                manifest.write_manifest(partial)
                files.commit(partial, target)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self._saved_step = self.state.global_step
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
        return os.path.join(directory, files.PARTIAL) if self._saving else directory

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # while it is written it is not pushed
            super()._push_from_checkpoint(checkpoint_folder)

    # --- stopping early ------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kw: Any
    ) -> None:
        """After a step: where a stop is wanted, its checkpoint too, whatever the save strategy."""
        if self.stopped and self.state.epoch % 1:  # the end of an epoch that was cut short
            return
        if not self.stopped and self.control.should_evaluate and self.stop_wanted is not None and self.stop_wanted():
            self._save_checkpoint(model, None)  # before the evaluation, which may outlast what a scheduler waits
            self._saved_step = None  # once more with what it finds
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kw)
        if self.stopped or self.stop_wanted is None or not self.stop_wanted():
            return
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, None)
        self.stopped = self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """The Trainer's; a run that is to go on keeps its last checkpoint and weights instead of the best ones."""
        best = self.state.best_model_checkpoint
        if self.stopped:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **options)
        finally:
            self.state.best_model_checkpoint = best

    def get_train_dataloader(self) -> Any:
        """The Trainer's; its workers end with this process, not by the signal that all processes of a job get."""
        return deaf_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's; its workers likewise."""
        return deaf_workers(super().get_eval_dataloader(eval_dataset))

    # --- going on ------------------------------------------------------------------------------------------------

    def _init_training_state(self, max_steps: int, *args: Any, **options: Any) -> Any:
        """The Trainer's; how often it logs, evaluates and saves is what the arguments say now, not the checkpoint's."""
        found = super()._init_training_state(max_steps, *args, **options)
        self.state.compute_steps(self.args, max_steps)
        return found

    @functools.cached_property
    def run_fingerprint(self) -> fingerprint.Fingerprint:
        """What this run is made of; its data is read through once."""
        module = self._module
        return {
            **self.model_fingerprint,
            **fingerprint.of_arguments(self.args),
            **fingerprint.of_rows("train_dataset", self.train_dataset),
            **fingerprint.of_rows("eval_dataset", self.eval_dataset),
            **fingerprint.of_tokenizer("tokenizer", self.processing_class),
            "mta": module.mta is not None,
        }

    def check_checkpoint(self, folder: Path, *, allow_changes: bool) -> None:
        """Refuse a checkpoint that is damaged or of another run; all ranks call it, and all refuse.

        Raises:
            InputError: names every file that is missing or differs, or every value that differs.
        """
        refused: InputError | None = None
        try:
            self._check_own(folder, allow_changes)
        except InputError as error:
            refused = error
        first = next((text for text in gather_object([str(refused) if refused else None]) if text), None)
        if refused is not None or first is not None:
            raise refused or InputError(first)

    def _check_own(self, folder: Path, allow_changes: bool) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a checkpoint folder, there is none")
        first = self.args.local_process_index == 0
        whole = (folder / manifest.MANIFEST_FILE).is_file()
        if first and self.verified != folder:
            whole = manifest.verify(folder)
        manifest.check_state(folder, self.args.process_index, self.args.world_size, allow_new=allow_changes)
        checkpoints.check_mta(folder, self._module.mta, allow_changes=allow_changes)
        if not first:
            return
        made_by, _ = fingerprint.load(folder)
        if made_by is None:
            made_by = {"world_size": manifest.ranks_of(folder)}
        differing = fingerprint.compare(made_by, self.run_fingerprint, finished=fingerprint.is_finished(folder))
        if not allow_changes:
            fingerprint.refuse(folder, differing)
        if self.args.process_index:
            return
        if not whole:
            warnings.warn(
                f"{folder}: made by an earlier version, which kept no checksums and no account of the run: whether its "
                f"files are whole and the data the same can't be checked",
                stacklevel=4,
            )
        changed = [str(each) for each in differing if each.matters or each.key in fingerprint.LENGTH]
        if changed:
            warnings.warn(f"{folder}: the run goes on with other values: {'; '.join(changed)}", stacklevel=4)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # the sharded checkpoint holds student and projections
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, module = Path(resume_from_checkpoint), self._module
        checkpoints.load_student(folder, module.student)
        if module.mta is not None:
            checkpoints.load_mta(folder, module.mta)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.args.local_process_index == 0:
            manifest.verify(best, student_only=True)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "optimiser and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "random numbers"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Name the checkpoint where its files can't be read: those of earlier versions have no checksums."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if checkpoint is None:
            raise
        raise InputError(
            f"{checkpoint}: expected {what} of this run, they can't be read: {' '.join(str(error).split())}"
        ) from error


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
