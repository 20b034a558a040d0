"""SpanCache: extracted spans on disk, one SQLite file per source of spans, keyed by a digest of the text.

Every record ends with a checksum of the text's digest, the kind and the spans: one that was damaged on disk is
extracted anew. SQLite itself has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta_fast.errors import InputError
from mta_fast.files import user_path
from mta_fast.spans.encoding import Columns, Encoded, decode_columns, decode_spans
from mta_fast.spans.extract import GRANULARITIES, SpanExtractor, progress_bar
from mta_fast.spans.records import BYTES_PER_SPAN, DAMAGED, opened, seal, sealed, sealed_as_found

APPLICATION_ID = 0x4D544132  # "MTA2": marks the file as a span cache of this layout; a new layout takes a new number
UNSEALED_ID = 0x4D544153  # "MTAS": the first layout, without checksums
COMMIT_TEXTS = 256  # a crash loses at most these, or what came in COMMIT_SECONDS
COMMIT_SECONDS = 2.0
BUSY_SECONDS = 60.0  # how long to wait for another process that writes
DIGEST_BYTES = 16
QUERY_TEXTS = 500  # digests per SELECT, below SQLite's oldest limit of 999 parameters
SUFFIX = ".sqlite"
FOLDER_VARIABLE = "MTA_FAST_CACHE"


class SpanCache:
    """A SpanExtractor that remembers: called like one, it extracts only texts that its file doesn't hold yet.

    What is extracted is committed every few hundred texts or seconds, so an interrupted run goes on where it was.
    Several processes may fill one file. Words and phrases are kept apart: a file made with both serves either.
    spaCy is imported only when a text is missing. Records that were damaged on disk are extracted anew, with a warning
    that counts them. A file of an earlier version, whose records have no checksums, gets them when it is opened, with a
    warning too.

    Args:
        extractor: where spans come from; a function must have a name.
        directory: folder of the cache files, one per model, version and rules. Default: $MTA_FAST_CACHE, or
            ~/.cache/mta_fast/spans.
        file: one given file instead.

    Raises:
        InputError: the file is of another source of spans, no span cache, or so damaged that SQLite can't read it; or
            a function without a name.
        OSError: the file can't be made or read.
    """

    def __init__(
        self, extractor: SpanExtractor, directory: str | Path | None = None, *, file: str | Path | None = None
    ) -> None:
        if directory is not None and file is not None:
            raise InputError(f"SpanCache: expected directory or file, got both ({directory} and {file}); drop one")
        self.extractor = extractor
        identity = extractor.identity()
        self.path = user_path(file) if file is not None else _folder(directory) / _file_name(identity)
        _create(self.path, identity)
        _seal_earlier(self.path)
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
        with _open(self.path) as connection:
            return int(connection.execute("SELECT count(*) FROM spans").fetchone()[0])

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
        found: dict[bytes, Encoded] = {}
        missing = self._missing(digests, found.__setitem__)
        if made := self._extract_missing(texts, digests, missing, progress):
            self._missing(list(made), found.__setitem__, again=True)
        return decode_columns(map(found.get, digests), self.extractor.granularity)

    def _fill(self, texts: list[str], digests: list[bytes], progress: bool) -> int:
        missing = self._missing(digests, lambda digest, spans: None)
        return len(self._extract_missing(texts, digests, missing, progress))

    def _missing(
        self, digests: Sequence[bytes], keep: Callable[[bytes, Encoded], None], *, again: bool = False
    ) -> set[bytes]:
        """The digests whose spans the file doesn't hold whole; ``keep`` gets the others.

        Raises:
            InputError: ``again``, after these were extracted, and some are missing still.
        """
        missing, damaged = set(digests), 0
        kinds = self.extractor.granularity
        with _open(self.path) as connection:
            connection.execute("BEGIN")  # layout and records as they are at one time
            checked = _application_id(connection) == APPLICATION_ID
            for digest, *records in _select(connection, ", ".join(kinds), digests):
                found = [opened(kind, digest, each, checked) for kind, each in zip(kinds, records, strict=True)]
                damaged += DAMAGED in found
                spans = [each for each in found if isinstance(each, bytes)]
                if len(spans) == len(kinds):
                    missing.discard(digest)
                    keep(digest, spans)
        if missing and again:
            raise _damaged(self.path, f"{len(missing)} texts can't be found again after they were written")
        if damaged:
            warnings.warn(
                f"span cache {self.path}: the spans of {damaged} of {len(set(digests))} texts were damaged on disk; "
                f"they are extracted anew",
                stacklevel=2,
            )
        return missing

    def _extract_missing(
        self, texts: list[str], digests: list[bytes], missing: set[bytes], progress: bool
    ) -> set[bytes]:
        """Extract and commit what is missing; returns what was, without the texts that are left without spans.

        Those are not kept: a later run, with more memory say, tries them again.
        """
        first_row: dict[bytes, int] = {}
        for row, digest in enumerate(digests):
            if digest in missing:
                first_row.setdefault(digest, row)
        shown = progress or self.extractor.progress
        if shown:
            cached = sum(digest not in missing for digest in digests)
            print(f"spans: {cached} of {len(texts)} texts from {self.path}", file=sys.stderr)
        return self._extract(texts, first_row, shown) if first_row else set()

    def _extract(self, texts: list[str], first_row: dict[bytes, int], shown: bool) -> set[bytes]:
        rows = list(first_row.values())
        made: list[tuple[bytes, Encoded]] = []
        extracted = set(first_row)
        committed = time.monotonic()
        with closing(self.extractor.encoded([texts[row] for row in rows], rows)) as stream:
            pairs = zip(first_row, stream, strict=True)
            try:
                for digest, spans in progress_bar(pairs, len(rows)) if shown else pairs:
                    if spans is None:
                        extracted.discard(digest)
                    else:
                        made.append((digest, spans))
                    if len(made) >= COMMIT_TEXTS or time.monotonic() - committed >= COMMIT_SECONDS:
                        self._store(made)
                        committed = time.monotonic()
            finally:
                self._store(made)
        return extracted

    def _store(self, made: list[tuple[bytes, Encoded]]) -> None:
        """Commit these rows in one transaction, and empty the list even if that fails."""
        kinds = self.extractor.granularity
        records = list(made)
        made.clear()
        if not records:
            return
        kept = ", ".join(f"{kind} = excluded.{kind}" for kind in kinds)
        insert = (
            f"INSERT INTO spans (digest, {', '.join(kinds)}) VALUES (?{', ?' * len(kinds)}) "
            f"ON CONFLICT (digest) DO UPDATE SET {kept}"  # another process was first, or the record is damaged
        )
        with _open(self.path) as connection, _transaction(connection):
            checked = _application_id(connection) == APPLICATION_ID
            rows = (
                (digest, *(sealed(k, digest, each) if checked else each for k, each in zip(kinds, spans, strict=True)))
                for digest, spans in records
            )
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
    damaged: int = 0  # texts with a record that is not as it was written; counted among no words or phrases

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.path}",
                f"made by  {self.made_by}",
                f"texts    {self.texts:,}",
                f"words    {self.words:,} in {self.word_texts:,} texts",
                f"phrases  {self.phrases:,} in {self.phrase_texts:,} texts",
                f"size     {self.bytes:,} bytes",
                *([f"damaged  {self.damaged:,} texts, extracted anew when they are needed"] if self.damaged else []),
            )
        )


def summarize_cache(path: str | Path) -> CacheSummary:
    """Numbers of a cache file; needs neither spaCy nor the model.

    Raises:
        InputError: no such file, no span cache, or a damaged one. OSError: it can't be read.
    """
    path = user_path(path)
    texts = damaged = 0
    counted, spans = Counter[str](), Counter[str]()
    with _open(path) as connection:
        made_by = _describe(_identity(connection, path))
        checked = _application_id(connection) == APPLICATION_ID
        for digest, *records in connection.execute(f"SELECT digest, {', '.join(GRANULARITIES)} FROM spans"):
            found = [opened(kind, digest, each, checked) for kind, each in zip(GRANULARITIES, records, strict=True)]
            texts += 1
            damaged += DAMAGED in found
            for kind, each in zip(GRANULARITIES, found, strict=True):
                if isinstance(each, bytes):
                    counted[kind] += 1
                    spans[kind] += len(each) // BYTES_PER_SPAN
    return CacheSummary(
        path=path,
        made_by=made_by,
        texts=texts,
        word_texts=counted["word"],
        words=spans["word"],
        phrase_texts=counted["phrase"],
        phrases=spans["phrase"],
        bytes=path.stat().st_size,
        damaged=damaged,
    )


def describe_cache(path: str | Path) -> str:
    """The summary of a cache file, or of each in a folder, as text.

    Raises:
        InputError, OSError: as ``summarize_cache`` does, or a folder without a cache file.
    """
    path = user_path(path)
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"span cache {path}: expected a folder with {SUFFIX} files, found none in it; give a file")
    return "\n".join(str(summarize_cache(file)) for file in files)


def look_up(path: str | Path, text: str) -> dict[str, list[list[int]]] | None:
    """{"word_spans": [[start, end], ...], "phrase_spans": ...} of one text, or None; needs neither spaCy nor the model.

    A kind that was not extracted for this text is left out. Raises as ``summarize_cache`` does, and InputError for
    spans that were damaged on disk.
    """
    path = user_path(path)
    with _open(path) as connection:
        connection.execute("BEGIN")
        _identity(connection, path)
        checked = _application_id(connection) == APPLICATION_ID
        rows = list(_select(connection, ", ".join(GRANULARITIES), [_digest(text)]))
    if not rows:
        return None
    digest, *records = rows[0]
    found = {kind: opened(kind, digest, each, checked) for kind, each in zip(GRANULARITIES, records, strict=True)}
    if DAMAGED in found.values():
        raise InputError(
            f"span cache {path}: expected the spans of this text as they were written, got damaged ones; mta-fast "
            f"spans make (or a run that needs them) extracts them anew"
        )
    return {f"{kind}_spans": decode_spans(data) for kind, data in found.items() if isinstance(data, bytes)}


# --- the file ----------------------------------------------------------------------------------------------------


def _folder(directory: str | Path | None) -> Path:
    if directory is not None:
        return user_path(directory)
    return user_path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/mta_fast/spans")


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
        if _application_id(connection) in (APPLICATION_ID, UNSEALED_ID):
            return
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("CREATE TABLE identity (json TEXT NOT NULL, seal BLOB)")
        connection.execute("CREATE TABLE spans (digest BLOB PRIMARY KEY, word BLOB, phrase BLOB)")
        text = json.dumps(identity)
        connection.execute("INSERT INTO identity VALUES (?, ?)", (text, seal("identity", b"", text.encode())))


def _seal_earlier(path: Path) -> None:
    """Give the records of a file of the first layout their checksums, all or none; a file that is read-only stays."""
    with _open(path) as connection:
        if _application_id(connection) != UNSEALED_ID:
            return
        connection.create_function("sealed", 3, sealed_as_found, deterministic=True)
        mend = "what it holds is taken as it is, and checked from now on"
        try:
            with _transaction(connection):
                if _application_id(connection) == UNSEALED_ID:  # another process may have been first
                    records = ", ".join(f"{kind} = sealed('{kind}', digest, {kind})" for kind in GRANULARITIES)
                    connection.execute(f"UPDATE spans SET {records}")
                    connection.execute("ALTER TABLE identity ADD COLUMN seal BLOB")
                    text = connection.execute("SELECT json FROM identity").fetchone()[0]
                    connection.execute("UPDATE identity SET seal = ?", (seal("identity", b"", text),))
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        except sqlite3.Error as error:
            if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_READONLY"):
                raise
            mend = "it can only be read, so damage in it can't be seen"
    warnings.warn(f"span cache {path}: made by an earlier version, without checksums; {mend}", stacklevel=3)


def _identity(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """Who made the file, once it is sure that this is a span cache; SQLite itself refuses one that is cut short."""
    number = _application_id(connection)
    if number not in (APPLICATION_ID, UNSEALED_ID):
        raise InputError(
            f"span cache {path}: expected a span cache of this version, got another file; give another path"
        )
    columns = "json, seal" if number == APPLICATION_ID else "json"
    row = connection.execute(f"SELECT {columns} FROM identity").fetchone()
    text = row[0] if row else None
    if not isinstance(text, bytes) or (number == APPLICATION_ID and row[1] != seal("identity", b"", text)):
        raise _damaged(path, "it doesn't say what it was made by")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise _damaged(path, "it doesn't say what it was made by") from None


def _application_id(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA application_id").fetchone()[0]


def _select(connection: sqlite3.Connection, columns: str, digests: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
    """(digest, *columns) of the rows with these digests, each once, in no order."""
    wanted = list(dict.fromkeys(digests))
    for first in range(0, len(wanted), QUERY_TEXTS):
        part = wanted[first : first + QUERY_TEXTS]
        marks = ", ".join("?" * len(part))
        yield from connection.execute(f"SELECT digest, {columns} FROM spans WHERE digest IN ({marks})", part)


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one operation, so that none is ever carried into a forked process; errors name the file."""
    if not path.is_file():
        raise InputError(f"span cache {path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")
    try:
        uri = path.absolute().as_uri() + "?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.text_factory = bytes  # a damaged text need not be UTF-8
            yield connection
    except sqlite3.Error as error:
        raise _explained(path, error) from error
    except (MemoryError, UnicodeDecodeError) as error:  # a damaged length; a message of SQLite with damaged names in it
        raise _damaged(path, type(error).__name__) from error


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
