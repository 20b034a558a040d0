"""What the package writes: whole or not at all. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mta_fast.errors import MTAFastError

PARTIAL = ".partial"


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
