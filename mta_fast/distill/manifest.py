"""What tells a whole checkpoint from a damaged one: the size and the checksum of every file, written last.

Reading a checkpoint then costs one more pass over its bytes (BLAKE2b, a quarter to one second a GB, and the disk).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mta_fast.errors import InputError

MANIFEST_FILE, FINGERPRINT_FILE = "manifest.json", "fingerprint.json"
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CHUNK = 2**22
# what only a resumed run reads; the student and its projections are whole without them
_STATE = (
    *(STATE_FILE, SCHEDULER_FILE, FINGERPRINT_FILE, "optimizer*", "scaler.pt", "rng_state*", "progress_*.json"),
    *("training_args.bin", "pytorch_model_fsdp*", "global_step*", "latest", "zero_to_fp32.py"),
)
# what would be read though the run never wrote it
_READ = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "adapter_config.json", "progress_*.json")


class DamagedCheckpointError(InputError):
    """Files of a checkpoint are missing, or not as they were written."""


# --- written and verified ----------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """List every file of a finished folder, those in its subfolders too. All ranks have written theirs before."""
    files = {name: _describe(folder / name) for name in _files(folder)}
    (folder / MANIFEST_FILE).write_text(_text(files), encoding="utf-8")


def verify(folder: Path, *, student_only: bool = False) -> bool:
    """Compare a folder with its manifest.

    Args:
        folder: a checkpoint.
        student_only: only what the student and its projections are read from.

    Returns:
        Whether there is a manifest; earlier versions wrote none.

    Raises:
        DamagedCheckpointError: names every file that is missing, differs or never belonged to it.
    """
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / FINGERPRINT_FILE).is_file():
            raise _damaged(folder, [f"{MANIFEST_FILE} (missing)"])
        return False
    listed = _read(folder / MANIFEST_FILE)
    if listed is None:
        raise _damaged(folder, [f"{MANIFEST_FILE} (other content)"])
    found = set(_files(folder))
    wrong = []
    for name, described in listed.items():
        if student_only and _is_state(name):
            continue
        if name not in found:
            wrong.append(f"{name} (missing)")
        elif (size := (folder / name).stat().st_size) != described["bytes"]:
            wrong.append(f"{name} ({size} bytes for {described['bytes']})")
        elif _describe(folder / name) != described:
            wrong.append(f"{name} (other content)")
    foreign = sorted(name for name in found - set(listed) if any(fnmatch(name, each) for each in _READ))
    wrong += [f"{name} (not of this checkpoint)" for name in foreign if not (student_only and _is_state(name))]
    if wrong:
        raise _damaged(folder, wrong)
    return True


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE]


def _is_state(name: str) -> bool:
    return any(fnmatch(name.split("/")[0], each) for each in _STATE)


def _describe(file: Path) -> dict[str, Any]:
    digest, size = hashlib.blake2b(digest_size=32), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _text(files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text; it holds a checksum of itself."""
    own = hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()
    return json.dumps({"files": files, "blake2b": own}, indent=1, sort_keys=True) + "\n"


def _read(file: Path) -> dict[str, dict[str, Any]] | None:
    """What a manifest lists; None where it is not as it was written."""
    try:
        text = file.read_text(encoding="utf-8")
        files: dict[str, dict[str, Any]] = json.loads(text)["files"]
        return files if _text(files) == text else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _damaged(folder: Path, wrong: Iterable[str]) -> DamagedCheckpointError:
    wrong = list(wrong)
    return DamagedCheckpointError(
        f"{folder}: expected every file as it was written, {len(wrong)} differ{'s' if len(wrong) == 1 else ''}: "
        f"{', '.join(wrong)}; {_way_on(folder)}"
    )


def _way_on(folder: Path) -> str:
    """Which earlier checkpoint of the run is whole, and how to go on from it."""
    for earlier in earlier_checkpoints(folder):
        try:
            verify(earlier)
            _require_state(earlier)
        except DamagedCheckpointError:
            continue
        return f"{earlier.name} beside it is whole: move {folder.name} away, then --resume goes on from there"
    return "no earlier checkpoint beside it is whole; restore these files, or start another output_dir"


def earlier_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints beside one with fewer steps, the last one first."""
    own = CHECKPOINT.fullmatch(folder.name)
    if own is None or not folder.parent.is_dir():
        return []
    steps = {int(m[1]): path for path in folder.parent.iterdir() if (m := CHECKPOINT.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True) if step < int(own[1])]


# --- what a resumed run can't do without -------------------------------------------------------------------------


def check_state(folder: Path, rank: int, world_size: int, *, allow_new: bool = False) -> None:
    """Refuse a checkpoint that a run could only go on from with another optimiser, schedule or random numbers.

    Args:
        folder: a checkpoint that ``verify`` accepts.
        rank, world_size: of this process.
        allow_new: where the run wrote the model alone (``save_only_model``), start with a new state.

    Raises:
        DamagedCheckpointError: names every file that is missing.
        InputError: the run wrote the model alone.
    """
    if (folder / MANIFEST_FILE).is_file() and not any(folder.glob("rng_state*")):  # verified: none was written
        _require(folder, [STATE_FILE])
        if allow_new:
            return
        raise InputError(
            f"{folder}: expected optimiser, schedule and random numbers to go on with, got the model alone "
            f"(save_only_model); train from it as student.path in another output_dir, or go on with a new optimiser "
            f"and schedule: --allow-changes"
        )
    _require_state(folder, rank, world_size)


def ranks_of(folder: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(folder.glob("rng_state_*.pth"))) or 1


def _require_state(folder: Path, rank: int = 0, world_size: int | None = None) -> None:
    needed = [STATE_FILE]
    if not any(folder.glob("global_step*")):  # DeepSpeed's, which hold both
        needed += [next((path.name for path in folder.glob("optimizer*")), "optimizer.pt"), SCHEDULER_FILE]
    several = any(folder.glob("rng_state_*.pth"))
    own = f"rng_state_{rank}.pth" if several else "rng_state.pth"
    if world_size in (None, ranks_of(folder)) or not any(folder.glob("rng_state*.pth")):
        needed.append(own)
    _require(folder, needed)


def _require(folder: Path, names: Iterable[str]) -> None:
    missing = [f"{name} (missing)" for name in names if not (folder / name).exists()]
    if missing:
        raise _damaged(folder, missing)
