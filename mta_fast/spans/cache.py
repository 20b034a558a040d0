"""SpanCache: extracted spans on disk, one SQLite file per source of spans, keyed by a digest of the text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta_fast.errors import InputError
from mta_fast.spans.extract import (
    GRANULARITIES,
    Columns,
    SpanExtractor,
    decode_spans,
    progress_bar,
)

APPLICATION_ID = 0x4D544153  # "MTAS": marks the file as a span cache of this layout; a new layout takes a new number
COMMIT_TEXTS = 256  # a crash loses at most these, or what came in COMMIT_SECONDS
COMMIT_SECONDS = 2.0
BUSY_SECONDS = 60.0  # how long to wait for another process that writes
DIGEST_BYTES = 16
QUERY_TEXTS = 500  # digests per SELECT, below SQLite's oldest limit of 999 parameters
SUFFIX = ".sqlite"
BYTES_PER_SPAN = 8  # of encode_spans
FOLDER_VARIABLE = "MTA_FAST_CACHE"


class SpanCache:
    """A SpanExtractor that remembers: called like one, it extracts only texts that its file doesn't hold yet.

    What is extracted is committed every few hundred texts or seconds, so an interrupted run goes on where it was.
    Several processes may fill one file. Words and phrases are kept apart: a file made with both serves either.
    spaCy is imported only when a text is missing.

    Args:
        extractor: where spans come from; a function must have a name.
        directory: folder of the cache files, one per model, version and rules. Default: $MTA_FAST_CACHE, or
            ~/.cache/mta_fast/spans.
        file: one given file instead.

    Raises:
        InputError: the file is of another source of spans, no span cache, or damaged; or a function without a name.
        OSError: the file can't be made or read.
    """

    def __init__(
        self, extractor: SpanExtractor, directory: str | Path | None = None, *, file: str | Path | None = None
    ) -> None:
        if directory is not None and file is not None:
            raise InputError(f"SpanCache: expected directory or file, got both ({directory} and {file}); drop one")
        self.extractor = extractor
        identity = extractor.identity()
        self.path = Path(file) if file is not None else _folder(directory) / _file_name(identity)
        _create(self.path, identity)
        with _open(self.path) as connection:
            made_by = _identity(connection, self.path)
        if made_by != identity:
            raise InputError(
                f"span cache {self.path}: expected one made by {_describe(identity)}, got one made by "
                f"{_describe(made_by)}; give another file, or delete this one to make it again"
            )

    def __call__(self, texts: Any, progress: bool = False) -> Any:
        """``extractor(texts)``, with the spans of texts seen before taken from the file.

        Args:
            texts: as ``SpanExtractor`` takes them: a list of strings, a mapping or a pyarrow table.
            progress: as in ``fill``.

        Raises:
            InputError, OSError: as ``fill`` does.
        """
        return self.extractor.apply(texts, lambda rows: self._columns(rows, progress))

    def __len__(self) -> int:
        """Texts in the file."""
        return self.summary().texts

    def fill(self, texts: Sequence[str], progress: bool = False) -> int:
        """Extract the texts that are missing, each once; returns how many those were.

        Args:
            texts: strings, checked as by ``SpanExtractor``; progress: say on stderr how many came from the file,
                and show a bar over the others.

        Raises:
            InputError: a text the extractor refuses, or a damaged file.
            OSError: the file can't be written (no space left, no permission); what was committed stays.
        """
        filled = 0

        def fill_rows(rows: list[str]) -> Columns:
            nonlocal filled
            filled = self._fill(rows, [_digest(text) for text in rows], progress)
            return {}

        self.extractor.apply(texts, fill_rows)
        return filled

    def summary(self) -> CacheSummary:
        """Numbers of the file, as ``summarize_cache`` gives them."""
        return summarize_cache(self.path)

    def _columns(self, texts: list[str], progress: bool) -> Columns:
        digests = [_digest(text) for text in texts]
        self._fill(texts, digests, progress)
        found: dict[bytes, Sequence[bytes]] = {}
        with _open(self.path) as connection:
            for digest, *spans in _select(connection, ", ".join(self.extractor.granularity), "1", digests):
                found[digest] = spans
        kinds = enumerate(self.extractor.granularity)
        return {f"{kind}_spans": [decode_spans(found[digest][i]) for digest in digests] for i, kind in kinds}

    def _fill(self, texts: list[str], digests: list[bytes], progress: bool) -> int:
        complete = " AND ".join(f"{kind} IS NOT NULL" for kind in self.extractor.granularity)
        with _open(self.path) as connection:
            known = {digest for (digest,) in _select(connection, "", complete, digests)}
        first_row: dict[bytes, int] = {}
        for row, digest in enumerate(digests):
            if digest not in known:
                first_row.setdefault(digest, row)
        shown = progress or self.extractor.progress
        if shown:
            cached = sum(digest in known for digest in digests)
            print(f"spans: {cached} of {len(texts)} texts from {self.path}", file=sys.stderr)
        if first_row:
            self._extract(texts, first_row, shown)
        return len(first_row)

    def _extract(self, texts: list[str], first_row: dict[bytes, int], shown: bool) -> None:
        rows = list(first_row.values())
        made: list[tuple[bytes, list[bytes]]] = []
        committed = time.monotonic()
        with closing(self.extractor.encoded([texts[row] for row in rows], rows)) as stream:
            pairs = zip(first_row, stream, strict=True)
            try:
                for pair in progress_bar(pairs, len(rows)) if shown else pairs:
                    made.append(pair)
                    if len(made) >= COMMIT_TEXTS or time.monotonic() - committed >= COMMIT_SECONDS:
                        self._store(made)
                        committed = time.monotonic()
            finally:
                self._store(made)

    def _store(self, made: list[tuple[bytes, list[bytes]]]) -> None:
        """Commit these rows in one transaction, and empty the list even if that fails."""
        rows = [(digest, *spans) for digest, spans in made]
        made.clear()
        if not rows:
            return
        kinds = self.extractor.granularity
        kept = ", ".join(f"{kind} = COALESCE({kind}, excluded.{kind})" for kind in kinds)
        insert = (
            f"INSERT INTO spans (digest, {', '.join(kinds)}) VALUES (?{', ?' * len(kinds)}) "
            f"ON CONFLICT (digest) DO UPDATE SET {kept}"  # another process may have been first
        )
        with _open(self.path) as connection, _transaction(connection):
            connection.executemany(insert, rows)


@dataclass(frozen=True)
class CacheSummary:
    """What a cache file holds."""

    path: Path
    made_by: str
    texts: int
    word_texts: int  # texts whose words were extracted
    words: int
    phrase_texts: int
    phrases: int
    bytes: int  # on disk

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.path}",
                f"made by  {self.made_by}",
                f"texts    {self.texts:,}",
                f"words    {self.words:,} in {self.word_texts:,} texts",
                f"phrases  {self.phrases:,} in {self.phrase_texts:,} texts",
                f"size     {self.bytes:,} bytes",
            )
        )


def summarize_cache(path: str | Path) -> CacheSummary:
    """Numbers of a cache file; needs neither spaCy nor the model.

    Raises:
        InputError: no such file, no span cache, or a damaged one. OSError: it can't be read.
    """
    path = Path(path)
    with _open(path) as connection:
        made_by = _describe(_identity(connection, path))
        counts = ", ".join(f"count({kind}), total(length({kind}))" for kind in GRANULARITIES)
        texts, word_texts, words, phrase_texts, phrases = connection.execute(
            f"SELECT count(*), {counts} FROM spans"
        ).fetchone()
    return CacheSummary(
        path=path,
        made_by=made_by,
        texts=texts,
        word_texts=word_texts,
        words=int(words) // BYTES_PER_SPAN,
        phrase_texts=phrase_texts,
        phrases=int(phrases) // BYTES_PER_SPAN,
        bytes=path.stat().st_size,
    )


def describe_cache(path: str | Path) -> str:
    """The summary of a cache file, or of each in a folder, as text.

    Raises:
        InputError, OSError: as ``summarize_cache`` does, or a folder without a cache file.
    """
    path = Path(path)
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"span cache {path}: expected a folder with {SUFFIX} files, found none in it; give a file")
    return "\n".join(str(summarize_cache(file)) for file in files)


def look_up(path: str | Path, text: str) -> dict[str, list[list[int]]] | None:
    """{"word_spans": [[start, end], ...], "phrase_spans": ...} of one text, or None; needs neither spaCy nor the model.

    A kind that was not extracted for this text is left out. Raises as ``summarize_cache`` does.
    """
    path = Path(path)
    with _open(path) as connection:
        _identity(connection, path)
        rows = list(_select(connection, ", ".join(GRANULARITIES), "1", [_digest(text)]))
    if not rows:
        return None
    _, *spans = rows[0]
    return {
        f"{kind}_spans": decode_spans(data) for kind, data in zip(GRANULARITIES, spans, strict=True) if data is not None
    }


# --- the file ----------------------------------------------------------------------------------------------------


def _folder(directory: str | Path | None) -> Path:
    if directory is not None:
        return Path(directory)
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "mta_fast" / "spans")


def _file_name(identity: dict[str, str]) -> str:
    readable = re.sub(r"[^\w.-]+", "_", f"{identity['name']}-{identity.get('version', 'function')}")
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"{readable[:80]}-{digest}{SUFFIX}"


def _describe(identity: dict[str, str]) -> str:
    source = f"{identity['source']} {identity['name']}"
    rest = [f"{key} {value}" for key, value in identity.items() if key not in ("source", "name")]
    return ", ".join([source, *rest])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _create(path: Path, identity: dict[str, str]) -> None:
    """Make the file and its tables unless it has them; of two processes, one does."""
    if path.exists() and path.stat().st_size:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise type(error)(
            f"span cache {path}: can't be made ({error.strerror}); give a folder that can be written, "
            f"or set ${FOLDER_VARIABLE}"
        ) from None
    with _open(path) as connection, _transaction(connection):
        if _application_id(connection) == APPLICATION_ID:
            return
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("CREATE TABLE identity (json TEXT NOT NULL)")
        connection.execute("CREATE TABLE spans (digest BLOB PRIMARY KEY, word BLOB, phrase BLOB)")
        connection.execute("INSERT INTO identity VALUES (?)", (json.dumps(identity),))


def _identity(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """Who made the file, once it is sure that this is a span cache; SQLite itself refuses one that is cut short."""
    if _application_id(connection) != APPLICATION_ID:
        raise InputError(
            f"span cache {path}: expected a span cache of this version, got another file; give another path"
        )
    return json.loads(connection.execute("SELECT json FROM identity").fetchone()[0])


def _application_id(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA application_id").fetchone()[0]


def _select(
    connection: sqlite3.Connection, columns: str, condition: str, digests: Sequence[bytes]
) -> Iterator[tuple[Any, ...]]:
    """(digest, *columns) of the rows with these digests, each once, in no order."""
    wanted = list(dict.fromkeys(digests))
    for first in range(0, len(wanted), QUERY_TEXTS):
        part = wanted[first : first + QUERY_TEXTS]
        marks = ", ".join("?" * len(part))
        names = ", ".join(filter(None, ("digest", columns)))
        yield from connection.execute(f"SELECT {names} FROM spans WHERE digest IN ({marks}) AND {condition}", part)


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one operation, so that none is ever carried into a forked process; errors name the file."""
    if not path.is_file():
        raise InputError(f"span cache {path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")
    try:
        uri = path.absolute().as_uri() + "?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise _explained(path, error) from error


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. IMMEDIATE: a second writer waits, where a later upgrade would fail at once."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _explained(path: Path, error: sqlite3.Error) -> Exception:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return _damaged(path, str(error))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return OSError(f"span cache {path}: another process kept it locked for {BUSY_SECONDS:.0f} s; try again later")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return OSError(
            f"span cache {path}: can't be written ({error}); free space on that disk and run again, "
            f"the texts committed so far are kept"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return PermissionError(
            f"span cache {path}: can't be written ({error}); give a folder that can be, or set ${FOLDER_VARIABLE}"
        )
    return InputError(f"span cache {path}: expected a span cache, got a file SQLite can't use so ({error})")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"span cache {path}: expected a whole SQLite file, got a damaged or foreign one ({what}); "
        f"move it away, its texts are then extracted again"
    )
