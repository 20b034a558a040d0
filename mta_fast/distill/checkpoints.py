"""What a run leaves on disk: checkpoints that are whole or absent, projections beside the student, plain exports.

A checkpoint is a folder of transformers' Trainer whose model files are the plain student's (or its adapter's); the
projections and the MTAConfig lie in its subfolder ``mta/``, where ``from_pretrained`` does not look.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mta_fast.config import MTAConfig
from mta_fast.distill.adapters import ADAPTER_CONFIG, active_adapter, is_peft, load_adapted, merged
from mta_fast.errors import InputError, MTAFastError
from mta_fast.loss import MTALoss

MTA_FOLDER, CONFIG_FILE, PROJECTIONS_FILE = "mta", "config.json", "projections.safetensors"
PROGRESS_FILE = "progress_{rank}.json"
RESULTS_FILE = "results.json"  # of a run or an evaluation that is finished
PARTIAL = ".partial"
# they choose how the same numbers are computed
FREE_TO_CHANGE = frozenset({"backend", "dsa_method"})


class CheckpointError(MTAFastError, OSError):
    """A checkpoint or an export could not be written; what was on disk before is untouched."""


# --- whole or absent ---------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; it takes the place of ``target`` when the block ends well, else it is removed.

    Raises:
        CheckpointError: writing failed (no space left, no permission), with the place and the mend.
    """
    partial = partial_folder(target)
    with removing_on_failure(partial, target):
        discard(partial)
        partial.mkdir(parents=True)
        yield partial
        commit(partial, target)


def partial_folder(target: Path) -> Path:
    """Where a folder is written before it is whole."""
    return target.parent / PARTIAL / target.name


def commit(partial: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name; a former ``target`` goes only after that."""
    for path in sorted(partial.rglob("*"), reverse=True):
        _flush(path)
    _flush(partial)
    former = partial.with_name(partial.name + "-former")
    if target.exists():
        discard(former)
        os.replace(target, former)
    os.replace(partial, target)
    _flush(target.parent)
    discard(former)


@contextmanager
def removing_on_failure(partial: Path, target: Path) -> Iterator[None]:
    """Remove what was half written when the block fails or is interrupted, and say so."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        writing = isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in str(error)
        discard(partial)
        if not writing:
            raise
        free = shutil.disk_usage(_existing(partial)).free
        raise CheckpointError(
            f"{target}: expected to write it whole, got: {error} ({free / 2**20:.0f} MiB are free there); make room, "
            f"then go on from the last checkpoint beside it, which is untouched"
        ) from error
    except BaseException:
        discard(partial)
        raise


def discard(folder: Path) -> None:
    """Remove a folder if it exists, and the folder of partial ones once that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.name == PARTIAL and folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Write a small file whole or not at all; what was there goes once the new one is on disk."""
    partial = file.with_name(file.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, file)


# --- projections and settings ------------------------------------------------------------------------------------


def save_mta(folder: Path, mta: MTALoss, state: Mapping[str, Tensor]) -> None:
    """Write the config, the widths and the projections (``state``: those of ``mta``) into ``folder/mta``."""
    from safetensors.torch import save_file

    place = folder / MTA_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    settings = _settings(mta)
    (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, place / PROJECTIONS_FILE)


def check_mta(folder: Path, mta: MTALoss | None) -> None:
    """Refuse a checkpoint that was trained with another MTALoss.

    Raises:
        InputError: names the first setting that differs and both values.
    """
    file = folder / MTA_FOLDER / CONFIG_FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a checkpoint folder, there is none")
    if mta is None or not file.is_file():
        if (mta is None) == (not file.is_file()):
            return
        has, wants = ("none", "an MTA loss") if mta is not None else ("an MTA loss", "none")
        raise InputError(
            f"{folder}: expected a checkpoint trained with {wants}, it has {has}; start another output_dir"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in _settings(mta).items():
        if name not in FREE_TO_CHANGE and found.get(name) != value:
            raise InputError(
                f"{folder}: expected a checkpoint with {name} = {value}, it has {found.get(name)}; resume with the "
                f"settings it was made with, or start another output_dir"
            )


def _settings(mta: MTALoss) -> dict[str, Any]:
    return {**mta.config.to_dict(), "student_dims": mta.student_dims, "teacher_dims": mta.teacher_dims}


def load_mta(folder: Path, mta: MTALoss) -> None:
    """Read the projections of a checkpoint that ``check_mta`` accepts."""
    from safetensors.torch import load_file

    mta.load_state_dict(load_file(folder / MTA_FOLDER / PROJECTIONS_FILE))


def load_loss(folder: Path) -> MTALoss | None:
    """The MTALoss that a checkpoint was trained with, with its projections; None for a folder without one."""
    file = folder / MTA_FOLDER / CONFIG_FILE
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    student_dims, teacher_dims = settings.pop("student_dims"), settings.pop("teacher_dims")
    loss = MTALoss(MTAConfig.from_dict(settings), student_dims, teacher_dims)
    load_mta(folder, loss)
    return loss


# --- progress ----------------------------------------------------------------------------------------------------


def save_progress(folder: Path, rank: int, progress: Mapping[str, Any]) -> None:
    """Write what a rank needs to go on beside weights, optimiser and random numbers."""
    (folder / PROGRESS_FILE.format(rank=rank)).write_text(json.dumps(progress), encoding="utf-8")


def load_progress(folder: Path, rank: int) -> dict[str, Any] | None:
    """What ``save_progress`` wrote, the first rank's where there were fewer ranks; None where none wrote anything."""
    files = [folder / PROGRESS_FILE.format(rank=each) for each in (rank, 0)]
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else json.loads(found.read_text(encoding="utf-8"))


# --- the student -------------------------------------------------------------------------------------------------


def load_student(folder: Path, student: nn.Module) -> None:
    """Read a checkpoint's student (or its adapter, for a PEFT student) into ``student``, every weight of it.

    Raises:
        InputError: weights that the student lacks, or the checkpoint.
    """
    from safetensors.torch import load_file

    if is_peft(student):
        from peft import load_peft_weights, set_peft_model_state_dict

        if not (folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"{folder}: expected a checkpoint of an adapter (LoRA), it has none")
        active, weights = active_adapter(student), load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(student, weights, adapter_name=active)
        missing = {name for name in result.missing_keys if "lora_" in name and active in name.split(".")}
    else:
        state = {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}
        if not state:
            raise InputError(f"{folder}: expected a checkpoint with model.safetensors, it has none")
        result = student.load_state_dict(state, strict=False)
        tied = getattr(student, "_tied_weights_keys", None) if student.config.tie_word_embeddings else None  # type: ignore[union-attr]  # transformers' config
        missing = set(result.missing_keys) - set(tied or ())
        student.tie_weights()  # type: ignore[operator]  # transformers' method
    if missing or result.unexpected_keys:
        differing = sorted([*missing, *result.unexpected_keys])
        raise InputError(f"{folder}: expected the weights of this student, {len(differing)} differ: {differing[:3]}")


def export_student(student: nn.Module, tokenizer: Any, target: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a plain student and its tokenizer, whole or not at all; adapters are merged into the weights.

    ``AutoModelForCausalLM.from_pretrained(target)`` loads it; nothing of MTA is in it.

    Args:
        student: the student, or its PEFT wrapper (which stays as it is).
        tokenizer: saved beside it.
        target: the folder; what was there goes once the new one is whole.
        state: the student's gathered weights where its own are sharded.

    Raises:
        CheckpointError: it could not be written. InputError: an adapter whose weights are sharded.
    """
    plain: Any = student
    if is_peft(student):
        if state is not None:
            raise InputError(
                "export: expected an adapter whose weights are whole, got sharded ones; run mta-fast export on the "
                "checkpoint"
            )
        plain = merged(student)
    with atomic_folder(target) as folder:
        plain.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """The plain student of a checkpoint on disk; adapters are merged into the model they were trained on.

    Raises:
        InputError: no checkpoint there, or its base model can't be found.
    """
    from mta_fast.distill.models import load_model, load_tokenizer

    adapter = checkpoint / ADAPTER_CONFIG
    if not adapter.is_file() and not (checkpoint / CONFIG_FILE).is_file():
        raise InputError(
            f"{checkpoint}: expected a checkpoint folder with config.json or adapter_config.json, got none"
        )
    student = load_adapted(checkpoint) if adapter.is_file() else load_model(str(checkpoint))
    export_student(student, load_tokenizer(str(checkpoint)), target)
