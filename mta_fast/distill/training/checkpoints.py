"""What a run leaves on disk: checkpoints that are whole or absent, projections beside the student, plain exports.

A checkpoint is a folder of transformers' Trainer whose model files are the plain student's (or its adapter's); the
projections and the MTAConfig lie in its subfolder ``mta/``, where ``from_pretrained`` does not look.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.config import MTAConfig
from mta_fast.distill.manifest import CHECKPOINT, verify
from mta_fast.distill.training.adapters import ADAPTER_CONFIG, active_adapter, is_peft, load_adapted, merged
from mta_fast.errors import InputError
from mta_fast.files import atomic_folder, check_target, export_kind, mark_export, user_path
from mta_fast.locks import lock_export
from mta_fast.loss import MTALoss

MTA_FOLDER, CONFIG_FILE, PROJECTIONS_FILE = "mta", "config.json", "projections.safetensors"
PROGRESS_FILE = "progress_{rank}.json"
CUT, NEW, EXPORT = "cut student", "new student", "exported student"  # kinds of exports
# they choose how the same numbers are computed
FREE_TO_CHANGE = frozenset({"backend", "dsa_method"})
OF_PROJECTIONS = frozenset({"layer_pairs", "student_dims", "teacher_dims"})


# --- projections and settings ------------------------------------------------------------------------------------


def save_mta(folder: Path, mta: MTALoss, state: Mapping[str, Tensor]) -> None:
    """Write the config, the widths and the projections (``state``: those of ``mta``) into ``folder/mta``."""
    from safetensors.torch import save_file

    place = folder / MTA_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    settings = _settings(mta)
    (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, place / PROJECTIONS_FILE)


def check_mta(folder: Path, mta: MTALoss | None, *, allow_changes: bool = False) -> None:
    """Refuse a checkpoint that was trained with another MTALoss; ``allow_changes``: with other projections only.

    Raises:
        InputError: names every setting that differs and both values.
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
    found = read_json(file)
    differing = {
        name: value
        for name, value in _settings(mta).items()
        if name not in FREE_TO_CHANGE and found.get(name) != value and (name in OF_PROJECTIONS or not allow_changes)
    }
    if differing:
        named = "; with ".join(f"{name} = {value}, it has {found.get(name)}" for name, value in differing.items())
        raise InputError(
            f"{folder}: expected a checkpoint with {named}; resume with the settings it was made with, or start "
            f"another output_dir"
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
    settings = read_json(file)
    student_dims, teacher_dims = settings.pop("student_dims"), settings.pop("teacher_dims")
    loss = MTALoss(MTAConfig.from_dict(settings), student_dims, teacher_dims)
    load_mta(folder, loss)
    return loss


def read_json(file: Path) -> dict[str, Any]:
    """A file of a checkpoint.

    Raises:
        InputError: it can't be read.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: expected what was saved there, it can't be read: {error}") from None
    return found


# --- progress ----------------------------------------------------------------------------------------------------


def save_progress(folder: Path, rank: int, progress: Mapping[str, Any]) -> None:
    """Write what a rank needs to go on beside weights, optimiser and random numbers."""
    (folder / PROGRESS_FILE.format(rank=rank)).write_text(json.dumps(progress), encoding="utf-8")


def load_progress(folder: Path, rank: int) -> dict[str, Any] | None:
    """What ``save_progress`` wrote, the first rank's where there were fewer ranks; None where none wrote anything."""
    files = [folder / PROGRESS_FILE.format(rank=each) for each in (rank, 0)]
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else read_json(found)


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run with the most steps; None without one."""
    steps = {int(m[1]): path for path in run.glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(path.name))}
    folders = {step: path for step, path in steps.items() if path.is_dir()}
    return folders[max(folders)] if folders else None


# --- the student -------------------------------------------------------------------------------------------------


def load_student(folder: Path, student: nn.Module) -> None:
    """Read a checkpoint's student (or its adapter, for a PEFT student) into ``student``, every weight of it.

    The files are read by transformers and PEFT, which know by what names a family's weights are stored; the student is
    in memory twice meanwhile.

    Raises:
        InputError: no such files, weights that the student lacks, or the checkpoint, or of another shape.
    """
    if is_peft(student):
        _load_adapter(folder, student)
    else:
        student.load_state_dict(_student_state(folder, student))


def _student_state(folder: Path, student: Any) -> Mapping[str, Tensor]:
    """The weights of a checkpoint under the names that they have in the student."""
    from safetensors import SafetensorError

    if not any(folder.glob("model*.safetensors")):
        raise InputError(f"{folder}: expected a checkpoint with model.safetensors, it has none")
    dtype = functools.reduce(torch.promote_types, {each.dtype for each in student.parameters()})  # loses nothing
    config = copy.deepcopy(student.config)
    with torch.random.fork_rng(devices=[]):  # weights that are missing would be drawn
        try:
            loaded, report = type(student).from_pretrained(
                folder, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder}: expected the weights of this student, got: {error}") from None
    state: dict[str, Tensor] = loaded.state_dict()
    own = student.state_dict()
    other = [each[0] if isinstance(each, tuple) else each for each in report["mismatched_keys"]]
    _refuse_differing(
        folder, [*report["missing_keys"], *report["unexpected_keys"], *other, *(own.keys() ^ state.keys())]
    )
    return state


def _load_adapter(folder: Path, student: Any) -> None:
    """Read a checkpoint's adapter into the active one; beside the checkpoint, or in a folder of its name."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    name = active_adapter(student)
    place = folder if (folder / ADAPTER_CONFIG).is_file() else folder / name
    if not (place / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder}: expected a checkpoint of an adapter (LoRA), it has none")
    try:
        state = load_peft_weights(str(place), device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{place}: expected the weights of this adapter, got: {error}") from None
    own = get_peft_model_state_dict(student, adapter_name=name)
    other = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    _refuse_differing(place, [*(own.keys() ^ state.keys()), *other])
    set_peft_model_state_dict(student, state, adapter_name=name)


def _refuse_differing(folder: Path, names: Iterable[str]) -> None:
    differing = sorted(set(names))
    if differing:
        raise InputError(f"{folder}: expected the weights of this student, {len(differing)} differ: {differing[:3]}")


def check_export(
    target: str | Path, *, kind: str = EXPORT, sources: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Where an export may be written; ``files.check_target`` for the kinds CUT, NEW and EXPORT.

    Raises:
        InputError: the folder holds anything else, an earlier one without ``overwrite``, or a source.
    """
    return check_target(target, export_kind(kind), sources=sources, overwrite=overwrite)


def export_student(
    student: nn.Module,
    tokenizer: Any,
    target: str | Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    kind: str = EXPORT,
    sources: Iterable[str | Path] = (),
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain student and its tokenizer, whole or not at all; adapters are merged into the weights.

    ``AutoModelForCausalLM.from_pretrained(target)`` loads it; nothing of MTA is in it.

    Args:
        student: the student, or its PEFT wrapper (which stays as it is).
        tokenizer: saved beside it.
        target: the folder: a free name, or with ``overwrite`` an earlier export, which goes once the new one is whole.
        state: the student's gathered weights where its own are sharded.
        kind: what is marked in it, CUT, NEW or EXPORT; only a folder of the same kind, with no other file in it, is
            replaced.
        sources: what else must not be touched; the folders that student and tokenizer were loaded from never are.
        overwrite: replace an earlier export.
        facts: what else ``mta_fast.json`` says of it.

    Raises:
        CheckpointError: it could not be written. InputError: an adapter whose weights are sharded, or a target that
            holds anything else.
    """
    sources = [*sources, *loaded_from(student, tokenizer)]
    place = check_export(target, kind=kind, sources=sources, overwrite=overwrite)
    plain: Any = student
    if is_peft(student):
        if state is not None:
            raise InputError(
                "export: expected an adapter whose weights are whole, got sharded ones; run mta-fast export on the "
                "checkpoint"
            )
        plain = merged(student)
    with lock_export(place):
        check_export(target, kind=kind, sources=sources, overwrite=overwrite)  # another process may have been first
        with atomic_folder(place) as folder:
            plain.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            mark_export(folder, kind, facts)


def loaded_from(*loaded: Any) -> list[Path]:
    """The folders that models and tokenizers of transformers were loaded from."""
    names = [getattr(each, "name_or_path", None) for each in loaded]
    return [Path(name) for name in names if isinstance(name, str) and name and Path(name).exists()]


def export_checkpoint(checkpoint: str | Path, target: str | Path, *, overwrite: bool = False) -> None:
    """The plain student of a checkpoint on disk; adapters are merged into the model they were trained on.

    Args:
        checkpoint: a checkpoint-N folder; neither it nor the run's other checkpoints are touched.
        target, overwrite: as in ``export_student``.

    Raises:
        InputError: no checkpoint there, its base model can't be found, or a target that holds anything else.
    """
    checkpoint = user_path(checkpoint)
    from mta_fast.distill.models import load_model, load_tokenizer

    adapter = checkpoint / ADAPTER_CONFIG
    if not adapter.is_file() and not (checkpoint / CONFIG_FILE).is_file():
        raise InputError(
            f"{checkpoint}: expected a checkpoint folder with config.json or adapter_config.json, got none"
        )
    sources = [checkpoint, *checkpoint.resolve().parent.glob("checkpoint-*")]
    check_export(target, sources=sources, overwrite=overwrite)
    verify(checkpoint, student_only=True)
    student = load_adapted(checkpoint) if adapter.is_file() else load_model(str(checkpoint))
    export_student(student, load_tokenizer(str(checkpoint)), target, sources=sources, overwrite=overwrite)
