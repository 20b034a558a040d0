"""Which characters of a parsed text are words and phrases: the rules of span extraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mta_fast.errors import InputError

if TYPE_CHECKING:
    from spacy.tokens import Doc

CharSpan = tuple[int, int]
# raise it with every change below that changes a span: cached spans are tied to it
SPAN_RULES = 1


def words(doc: Doc) -> list[CharSpan]:
    """Every token that is neither white space nor punctuation."""
    return [(t.idx, t.idx + len(t)) for t in doc if not (t.is_space or t.is_punct)]


def phrases(doc: Doc) -> list[CharSpan]:
    """Noun chunks and verb phrases; among nested ones the longest, in reading order."""
    try:
        found = [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]
    except NotImplementedError:
        raise InputError(
            f"phrases: expected a language with noun chunks, spaCy has none for {doc.lang_!r}; "
            f"give SpanExtractor a function text -> spans"
        ) from None
    for first, last in verb_phrases([token.pos_ for token in doc]):
        found.append((doc[first].idx, doc[last - 1].idx + len(doc[last - 1])))
    return drop_nested(found)


def verb_phrases(pos: Sequence[str]) -> list[tuple[int, int]]:
    """The longest matches [first, last) of AUX* ADV* VERB+ ADV* over parts of speech; each holds one run of verbs."""
    found, i = [], 0
    while i < len(pos):
        if pos[i] != "VERB":
            i += 1
            continue
        first = last = i
        while last < len(pos) and pos[last] == "VERB":
            last += 1
        i = last
        while first and pos[first - 1] == "ADV":
            first -= 1
        while first and pos[first - 1] == "AUX":
            first -= 1
        while last < len(pos) and pos[last] == "ADV":
            last += 1
        found.append((first, last))
    return found


def drop_nested(spans: Iterable[CharSpan]) -> list[CharSpan]:
    """Spans that lie in no other one, by start; of equal ones, one stays. Partial overlaps stay."""
    kept: list[CharSpan] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or end > kept[-1][1]:
            kept.append((start, end))
    return kept
