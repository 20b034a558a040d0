"""Alignment in the collator, extraction against bare spaCy, with two processes, and from the cache.

``python -m bench spans``. Alignment is measured on made-up rows, extraction on real text. The sides of a ratio follow
one another within each round.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.harness import Call, Effort, alternate, seconds
from bench.report import Entry, Report, Section, entry, machine, milliseconds, texts_name
from mta_fast import SpanBatch, SpanExtractor
from mta_fast.distill.data import load_rows, texts_of
from mta_fast.layout import Spans
from mta_fast.spans import align as align_backends
from mta_fast.spans.cache import SpanCache
from mta_fast.spans.extract import DEFAULT_MODEL, load_pipeline

ROW_TOKENS = 512  # of the alignment benchmark
ROUNDS, QUICK_TEXTS = 2, 4
CACHED = 400  # texts of the cache's row, whose first run is another extraction


def measure(rounds: int | None = None, texts: Path | None = None, quick: bool = False) -> Report:
    """Alignment and extraction."""
    rounds, read = rounds or (1 if quick else ROUNDS), read_texts(texts)
    sections = [
        Section("Alignment", alignment(rounds)),
        Section("Extraction", extraction(read[: QUICK_TEXTS if quick else None], rounds)),
    ]
    return Report("mta-fast bench spans", machine("spacy", texts=texts_name(texts)), sections)


def alignment(rounds: int) -> list[Entry]:
    """SpanBatch of words and phrases per row of 512 tokens, with the text at hand, batches of 16."""
    rows, text = 16, ("abcd " * ROW_TOKENS).strip()
    offsets = torch.tensor([[max(5 * j - 1, 0), 5 * j + 4] for j in range(ROW_TOKENS)]).expand(rows, -1, -1)
    words = [(5 * j, 5 * j + 4) for j in range(ROW_TOKENS)]
    phrases = [(words[j][0], words[j + 1][1]) for j in range(0, ROW_TOKENS - 1, 2)]
    mask, texts = torch.ones(rows, ROW_TOKENS), [text] * rows

    def align(backend: str) -> list[SpanBatch]:
        return [
            SpanBatch.from_char_spans([spans] * rows, offsets, mask, texts=texts, backend=backend)
            for spans in (words, phrases)
        ]

    first = align_backends.choose()
    sides = {name: partial(align, name) for name in dict.fromkeys((first, "reference"))}
    expected = [t for batch in align("reference") for t in batch.index_tensors()]
    if [len(t) for t in expected[:: len(Spans._fields)]] != [rows * len(words), rows * len(phrases)]:
        sys.exit("bench: alignment: expected every span to find its tokens; nothing timed")
    for name, call in sides.items():
        made = [t for batch in call() for t in batch.index_tensors()]
        if not all(map(torch.equal, made, expected)):
            sys.exit(f"bench: alignment: expected {name} to find what the reference finds; nothing timed")
    times, what = alternate(sides, Effort(5 * rounds)), "alignment in the collator, words and phrases"
    each = f"{what}, per row of {ROW_TOKENS} tokens"
    entries = [milliseconds(f"{each}: {name}", [t / rows for t in times[name]], "< 1") for name in sides]
    if first != "reference":
        entries.append(entry(f"{what}: reference / {first}", times.ratio("reference", first), target=">= 1"))
    return entries


def extraction(texts: list[str], rounds: int) -> list[Entry]:
    """Extraction against bare spaCy, words alone, two processes and the cache."""
    extract, words = SpanExtractor(), SpanExtractor(granularity="word")
    pipeline = load_pipeline(DEFAULT_MODEL)
    for loads_pipeline in (extract, words):
        loads_pipeline(texts[:1])
    sides: dict[str, Call] = {
        "bare": lambda: sum(1 for _ in pipeline.pipe(texts, batch_size=extract.batch_size)),
        "ours": partial(extract, texts),
        "words": partial(words, texts),
        "one": lambda: SpanExtractor(n_process=1)(texts),  # each loads the pipeline
        "two": lambda: SpanExtractor(n_process=2)(texts),
    }
    times = alternate(sides, Effort(rounds), warm_up=False, collect=True)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (seconds(SpanCache(SpanExtractor(), folder), texts[:CACHED]) for _ in range(2))
    count, start_up = f"{len(texts)} texts", "start-up included: 1 process / 2 processes"
    bare, cached = "bare nlp.pipe of the same components", f"spans of {len(texts[:CACHED])} texts"
    return [
        entry(f"extraction of {count} / {bare}", times.ratio("ours", "bare"), target="<= 1.15"),
        entry("extraction / words alone", times.ratio("ours", "words"), target=">= 10"),
        entry(f"extraction of {count}, {start_up}", times.ratio("one", "two"), target=">= 1.6"),
        entry(f"{cached}: first run / second run, from the cache", [first / second], target=">= 30"),
    ]


def read_texts(path: Path | None) -> list[str]:
    """Prompt + output of the rows of a JSONL file, or of the bundled sample."""
    return texts_of(load_rows("sample" if path is None else path).rows)
