"""The records of a span cache: the bytes of a text's spans, and a checksum of text, kind and spans behind them."""

from __future__ import annotations

import hashlib
from typing import Any

BYTES_PER_SPAN = 8  # of encode_spans
SEAL_BYTES = 8  # of the checksum
DAMAGED = object()  # in place of spans that are not as they were written


def seal(kind: str, digest: bytes, data: bytes) -> bytes:
    """The checksum of a record."""
    return hashlib.blake2b(digest + data, digest_size=SEAL_BYTES, person=kind.encode()).digest()


def sealed(kind: str, digest: bytes, data: bytes) -> bytes:
    """A record as the file keeps it.

    Args:
        kind: "word" or "phrase"; digest: of the text; data: of ``encode_spans``.
    """
    return data + seal(kind, digest, data)


def sealed_as_found(kind: bytes | str, digest: Any, data: Any) -> bytes | None:
    """What SQLite calls for a record of the first layout; one that is no table of spans is left out."""
    name = kind if isinstance(kind, str) else kind.decode()
    whole = isinstance(digest, bytes) and isinstance(data, bytes) and len(data) % BYTES_PER_SPAN == 0
    return sealed(name, digest, data) if whole else None


def opened(kind: str, digest: Any, record: Any, checked: bool) -> Any:
    """The spans of a record as ``encode_spans`` gave them, None where it has none, or DAMAGED.

    Args:
        checked: the record ends with a checksum; False in files of the first layout.
    """
    if record is None:
        return None
    if not isinstance(record, bytes) or not isinstance(digest, bytes):
        return DAMAGED
    data = record[:-SEAL_BYTES] if checked else record
    if len(data) % BYTES_PER_SPAN or (checked and record != sealed(kind, digest, data)):
        return DAMAGED
    return data
