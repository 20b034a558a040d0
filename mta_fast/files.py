"""Files at a user's word: how paths are read, what a target may replace, writing whole or not at all.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta_fast._version import __version__
from mta_fast.errors import InputError, MTAFastError
from mta_fast.write_errors import write_failure

PARTIAL = ".partial"
RESULTS_FILE = "results.json"  # of a run, an evaluation or a demo that is finished
MARKER = "mta_fast.json"  # in a folder that an export made: which kind, by which version, which files
LOCK_FILE = ".mta_fast.lock"  # of locks.py; it makes no folder a full one
SOFTWARE = "mta_fast"  # in the metadata of pictures
HEAD_BYTES = 1 << 16  # of a file, in which its mark stands
NAMED = 3  # files that a message names


class CheckpointError(MTAFastError, OSError):
    """A checkpoint or an export could not be written; what was on disk before is untouched."""


# --- paths -------------------------------------------------------------------------------------------------------


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user wrote: ``~`` and ``~user`` at its start are home folders, everything else stays.

    Variables such as ``$HOME`` are the shell's and are not replaced. ``./~`` is the home folder too, as Python's paths
    drop the ``./``; a folder of that name is reached by its whole path.

    Raises:
        InputError: an empty path, one with a null character, or the home folder of an unknown user.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InputError(f"path: expected the name of a file or folder, got {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{text}: expected a path, got the home folder of an unknown user; write it out from / on"
        ) from None


def user_source(name: str) -> str:
    """The name of a model or a data set: a path that begins with ``~`` as ``user_path`` gives it, others as they are.

    Raises:
        InputError: as ``user_path`` does.
    """
    return str(user_path(name)) if str(Path(name)).startswith("~") else name


# --- what a target may replace -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        name: for messages, such as "an exported student".
        earlier: whether what lies at a path is an earlier result of this kind.
        folder: a folder; else a file.
        overwrite: an earlier one goes only where the user says so.
    """

    name: str
    earlier: Callable[[Path], bool]
    folder: bool = False
    overwrite: bool = False


def check_target(
    target: str | os.PathLike[str], kind: Kind, *, sources: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Where a result may be written: a place that is free, or holds an earlier result of the same kind.

    Nothing is written. Links and ``..`` are followed first, so that a link to a source is that source.

    Args:
        target: the user's path.
        kind: what is to be written there.
        sources: files and folders that are read; a target that is, holds or lies in one is refused.
        overwrite: replace an earlier result of a kind that asks for it.

    Returns:
        The resolved path.

    Raises:
        InputError: anything else is there, or nothing can be written there.
    """
    place = _resolved(target)
    for source in sources:
        _refuse_source(target, place, _resolved(source))
    if not (kind.folder and not kind.overwrite and place.is_dir()):  # its files are written into it
        _refuse_parent(target, place)
    if not os.path.lexists(place):
        return place
    if place.is_dir() != kind.folder or not (place.is_dir() or place.is_file()):
        got = "a folder" if place.is_dir() else "a file" if place.is_file() else "a device or a pipe"
        raise InputError(f"{target}: expected a {'folder' if kind.folder else 'file'} or a free name, got {got}")
    if _is_empty(place):
        return place
    if not kind.earlier(place):
        raise InputError(
            f"{target}: expected a free name or {kind.name}, got {_described(place)}; give another name, or move it "
            f"away (nothing was written)"
        )
    if kind.overwrite and not overwrite:
        raise InputError(
            f"{target}: expected a free name, it holds {kind.name}; --overwrite (overwrite=True) replaces it"
        )
    return place


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return user_path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{os.fspath(path)}: expected a path, got one that leads nowhere ({error})") from None


def _refuse_source(target: str | os.PathLike[str], place: Path, source: Path) -> None:
    relation = None
    if _same(place, source):
        relation = "it is"
    elif any(_same(parent, source) for parent in place.parents):
        relation = "it lies in"
    elif any(_same(parent, place) for parent in source.parents):
        relation = "it holds"
    if relation is not None:
        raise InputError(
            f"{target}: expected a target apart from what is read, {relation} {source}; give another name (nothing was "
            f"written)"
        )


def _same(first: Path, second: Path) -> bool:
    if first == second:
        return True
    try:
        return first.samefile(second)  # another spelling: bind mounts, file systems that ignore case
    except OSError:
        return False


def _refuse_parent(target: str | os.PathLike[str], place: Path) -> None:
    parent = _existing(place.parent)
    if not parent.is_dir():
        raise InputError(f"{target}: expected a path in a folder, got one below the file {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{target}: expected a folder that can be written, {parent} can't; give another place")


def _is_empty(place: Path) -> bool:
    if place.is_file():
        return place.stat().st_size == 0
    return not set(os.listdir(place)) - {LOCK_FILE}


def _described(place: Path) -> str:
    if place.is_file():
        return "another file"
    names = sorted(set(os.listdir(place)) - {LOCK_FILE})
    return f"a folder with {', '.join(names[:NAMED])}" + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))


def marked(*marks: bytes) -> Callable[[Path], bool]:
    """Whether the beginning of a file holds one of these marks; for ``Kind.earlier``."""

    def earlier(file: Path) -> bool:
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
        return any(mark in head for mark in marks)

    return earlier


def save_figure(figure: Any, file: Path, *, dpi: int) -> None:
    """Write a figure of matplotlib as a PNG that ``PICTURE`` knows again, whole or not at all."""
    with atomic_file(file) as partial:
        figure.savefig(partial, format="png", dpi=dpi, metadata={"Software": SOFTWARE})


PICTURE = Kind("an earlier picture of this package", marked(b"Software\0" + SOFTWARE.encode()))


def export_kind(name: str) -> Kind:
    """A folder that is written whole and marked (``mark_export``): one with other files in it is none."""

    def earlier(folder: Path) -> bool:
        try:
            made = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            kind, known = made["kind"], {MARKER, *made["files"]}
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return kind == name and _files_in(folder) <= known

    return Kind(f"an earlier {name} and nothing else", earlier, folder=True, overwrite=True)


def mark_export(folder: Path, name: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write into a finished folder that it is an export, of which files, and what else is to be known of it."""
    made = {"kind": name, "mta_fast": __version__, "files": sorted(_files_in(folder)), **(facts or {})}
    (folder / MARKER).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths} - {LOCK_FILE}


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
    try:
        yield
    except BaseException as error:
        discard(partial)
        failure = write_failure(error)
        if failure is None:
            raise
        free = shutil.disk_usage(_existing(partial)).free
        raise CheckpointError(
            f"{target}: expected to write it whole, got: {failure} ({free / 2**20:.0f} MiB are free there); make "
            f"room, then go on from the last checkpoint beside it, which is untouched"
        ) from error


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
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of ``file`` when the block ends well, else it is removed.

    Raises:
        CheckpointError: writing failed (no space left, no permission).
    """
    partial = file.with_name(file.name + PARTIAL)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{file}: expected to write it whole, got: {error}; make room, or give another place (what was there is "
            f"untouched)"
        ) from error
