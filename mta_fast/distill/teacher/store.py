"""A cache's files: a description, the LM head, and shards of rows whose names are the digests of their bytes.

A shard is written under another name, flushed and renamed: it is whole or absent, and the list of files is all the
index there is. So ranks and processes may read while one writes, and a process that is killed loses what it had not
written yet.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mta_fast._version import __version__
from mta_fast.distill.teacher.contents import Contents, Record
from mta_fast.errors import InputError
from mta_fast.files import LOCK_FILE, PARTIAL, CheckpointError, Kind, atomic_file, check_target, write_whole
from mta_fast.locks import lock_folder

DESCRIPTION, KIND, LAYOUT = "teacher.json", "mta_fast teacher cache", 1
SHARD_BYTES = 2**26  # what is written at once, and lost at most
_FILE = re.compile(r"(rows|head)-([0-9a-f]{32})\.safetensors")
_DIGEST_BYTES = 16


class TeacherStore:
    """The rows in a folder.

    Reads need no lock. Writing is for the process that holds it (``lock``) and, in a run of several ranks, those that
    it tells so (``writable``).

    Args:
        folder: with a description, as ``create`` leaves it.

    Attributes:
        description: {"identity", "contents", "head", "model", ...} as given to ``create``.
        contents: what it holds of a row.
        writable: whether ``add`` keeps rows.

    Raises:
        InputError: no cache, or one that is damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = _description(folder)
        self.contents = Contents.from_dict(self.description["contents"])
        self.writable = False
        self._shards: dict[str, _Shard] = {}
        self._places: dict[bytes, tuple[_Shard, int]] = {}
        self._pending: dict[bytes, Record] = {}
        self._pending_bytes = 0
        self._locked = ExitStack()
        self.refresh()

    @classmethod
    def create(
        cls, folder: Path, description: Mapping[str, Any], head: Mapping[str, Tensor], sources: Iterable[Path] = ()
    ) -> TeacherStore:
        """An empty cache in a new folder, or that which is there.

        Args:
            description: ``contents`` as ``Contents.to_dict`` gives them, and what its readers compare.
            head: tensors of the LM head; none where it isn't read.
            sources: files and folders that are read, as in ``files.check_target``.
        """
        check_target(folder, CACHE, sources=sources)
        data = _bytes_of(head, {}) if head else b""
        if not (folder / DESCRIPTION).is_file():
            made = {"kind": KIND, "layout": LAYOUT, "mta_fast": __version__, **description}
            made["head_file"] = _name("head", data) if head else None
            write_whole(folder / DESCRIPTION, json.dumps(made, indent=1) + "\n")
        store = cls(folder)
        name = store.description["head_file"]
        if head and name == _name("head", data) and not (folder / name).is_file():
            _write(folder / name, data)
        return store

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places or key in self._pending

    def refresh(self) -> None:
        """Take in the shards that other processes have written meanwhile."""
        for file in sorted(self.folder.glob("rows-*.safetensors")):
            if file.name not in self._shards and _FILE.fullmatch(file.name):
                shard = self._shards[file.name] = _Shard(file)
                for row, key in enumerate(shard.keys):
                    self._places.setdefault(key, (shard, row))

    def read(self, key: bytes) -> Record:
        """A row that is here.

        Raises:
            InputError: its shard is not as it was written.
        """
        if key in self._pending:
            return self._pending[key]
        shard, row = self._places[key]
        return shard.read(row)

    @property
    def has_head_file(self) -> bool:
        """Whether the file of the LM head is there, if there is to be one."""
        name = self.description["head_file"]
        return name is None or (self.folder / name).is_file()

    def head(self) -> dict[str, Tensor]:
        """The tensors of the LM head.

        Raises:
            InputError: they are missing or damaged.
        """
        from safetensors.torch import load

        name = self.description["head_file"]
        if name is None:
            return {}
        file = self.folder / name
        if not file.is_file():
            raise InputError(f"{file}: expected the teacher's LM head, there is none; mta-fast teach writes it again")
        data = file.read_bytes()
        if _name("head", data) != name:
            raise _damaged(file)
        return load(data)

    # --- writing -------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Be the process that writes, until ``close`` or its end; half-written files of one that was killed go.

        Raises:
            InputError: another process is.
        """
        self._locked.enter_context(lock_folder(self.folder))
        self.writable = True
        for file in self.folder.glob(f"*{PARTIAL}"):
            if _is_partial(file.name):
                file.unlink()
        self.refresh()

    def add(self, key: bytes, record: Record) -> None:
        """Keep a row, in memory until there are enough for a shard.

        Raises:
            CheckpointError: it can't be written (no space left).
        """
        if key not in self:
            self._pending[key] = record
            self._pending_bytes += sum(value.nbytes for value in record.values())
            if self._pending_bytes >= SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write the rows that are in memory only."""
        if not self._pending:
            return
        rows = [[key.hex(), *_lengths(record, self.contents)] for key, record in self._pending.items()]
        names = next(iter(self._pending.values()))
        tensors = {name: torch.cat([record[name] for record in self._pending.values()]) for name in names}
        data = _bytes_of(tensors, {"rows": json.dumps(rows)})
        self._pending, self._pending_bytes = {}, 0
        _write(self.folder / _name("rows", data), data)
        self.refresh()

    def close(self) -> None:
        """``flush``, and let others write."""
        try:
            if self.writable:
                self.flush()
        finally:
            self.writable = False
            self._locked.close()

    def check_room(self, needed: int) -> None:
        """Refuse a disk without room for so many bytes.

        Raises:
            InputError: says how many are needed and free.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.folder}: expected room for {in_words(needed)} of teacher states, {in_words(free)} are free "
                f"there; make room, give another folder, or store less (cache_dtype int8, fewer layers)"
            )


class _Shard:
    """A file of rows; its bytes are compared with its name when the first row is read."""

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.file = file
        try:
            self._data = safe_open(str(file), "pt")
            text = self._data.metadata()["rows"]
            rows: list[tuple[str, int, int]] = json.loads(text)
            self.keys = [bytes.fromhex(key) for key, *_ in rows]
            ends = torch.tensor([[0, 0], *([tokens, last] for _, tokens, last in rows)]).cumsum(0)
            self._ends: list[list[int]] = ends.tolist()
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            raise _damaged(file) from None
        self._verified = False

    def read(self, row: int) -> Record:
        if not self._verified:
            with self.file.open("rb") as opened:
                digest = hashlib.file_digest(opened, _new_digest).hexdigest()
            if self.file.name != f"rows-{digest}.safetensors":
                raise _damaged(self.file)
            self._verified = True
        (token, last), (token_end, last_end) = self._ends[row], self._ends[row + 1]
        record = {}
        for name in self._data.keys():  # noqa: SIM118  # no mapping
            first, end = (last, last_end) if name == "last" else (token, token_end)
            record[name] = self._data.get_slice(name)[first:end]
        return record


def _lengths(record: Record, contents: Contents) -> tuple[int, int]:
    """Tokens of a row, and those of its last state."""
    last = len(record["last"]) if contents.last else 0
    tokens = [len(value) for name, value in record.items() if name != "last"]
    return (tokens[0] if tokens else last), last


def open_store(folder: Path) -> TeacherStore | None:
    """The cache in a folder; None where there is none yet."""
    return TeacherStore(folder) if (folder / DESCRIPTION).is_file() else None


def in_words(size: int) -> str:
    """A number of bytes."""
    value, unit = float(size), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"


def _description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{folder}: expected a cache of a teacher's states, there is none; mta-fast teach makes one")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["kind"] != KIND:
            raise ValueError
        if found["layout"] == LAYOUT:
            Contents.from_dict(found["contents"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{file}: expected the description of a teacher's cache, it can't be read; delete the folder, then "
            f"mta-fast teach makes it again"
        ) from None
    if found["layout"] != LAYOUT:
        raise InputError(f"{folder}: expected a cache of layout {LAYOUT}, got {found['layout']}; make it again")
    return found


def _is_ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE}
    try:
        _description(folder)
    except InputError:
        return False
    return all(name == DESCRIPTION or _FILE.fullmatch(name) or _is_partial(name) for name in names)


def _is_partial(name: str) -> bool:
    whole = name.removesuffix(PARTIAL)
    return name != whole and (whole == DESCRIPTION or _FILE.fullmatch(whole) is not None)


CACHE = Kind("a cache of a teacher's states", _is_ours, folder=True)


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _name(kind: str, data: bytes) -> str:
    digest = _new_digest()
    digest.update(data)
    return f"{kind}-{digest.hexdigest()}.safetensors"


def _bytes_of(tensors: Mapping[str, Tensor], about: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, about)


def _write(file: Path, data: bytes) -> None:
    try:
        with atomic_file(file) as partial:
            partial.write_bytes(data)
    except CheckpointError as error:
        free = shutil.disk_usage(file.parent).free
        raise CheckpointError(
            f"{file.parent}: expected to write {in_words(len(data))} of teacher states, got: {error.__cause__} "
            f"({in_words(free)} are free there); make room and start again: what was written stays"
        ) from error.__cause__


def _damaged(file: Path) -> InputError:
    return InputError(
        f"{file}: expected the teacher's states as they were written, got other bytes; delete this file, then mta-fast "
        f"teach makes its rows again"
    )
