"""Alignment in the collator, extraction against bare spaCy, with two processes, and from the cache."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from bench.report import Row, make_row, seconds
from mta_fast import SpanBatch, SpanExtractor
from mta_fast.distill.data import load_rows, texts_of
from mta_fast.spans.cache import SpanCache
from mta_fast.spans.extract import DEFAULT_MODEL, load_pipeline

ROW_TOKENS = 512  # of the alignment benchmark


def alignment_row(rounds: int) -> Row:
    """SpanBatch of words and phrases per row of 512 tokens, with the text at hand, batches of 16."""
    rows, text = 16, ("abcd " * ROW_TOKENS).strip()
    offsets = torch.tensor([[max(5 * j - 1, 0), 5 * j + 4] for j in range(ROW_TOKENS)]).expand(rows, -1, -1)
    words = [(5 * j, 5 * j + 4) for j in range(ROW_TOKENS)]
    phrases = [(words[j][0], words[j + 1][1]) for j in range(0, ROW_TOKENS - 1, 2)]
    mask = torch.ones(rows, ROW_TOKENS)

    def align() -> list[SpanBatch]:
        return [
            SpanBatch.from_char_spans([spans] * rows, offsets, mask, texts=[text] * rows) for spans in (words, phrases)
        ]

    if [batch.num_spans for batch in align()] != [rows * len(words), rows * len(phrases)]:
        sys.exit("bench: alignment: expected every span to find its tokens; nothing timed")
    times = [1000 * seconds(align) / rows for _ in range(5 * rounds)]
    return make_row("alignment in the collator, words and phrases, per row of 512 tokens", "ms", "<", 1.0, times)


def extraction_rows(texts: list[str], rounds: int) -> list[Row]:
    """Extraction against bare spaCy, words alone, two processes and the cache."""
    extract, words = SpanExtractor(), SpanExtractor(granularity="word")
    pipeline = load_pipeline(DEFAULT_MODEL)
    extract(texts[:1])  # loads the pipeline
    overhead, speedup, processes, cached = [], [], [], []
    for _ in range(rounds):
        bare = seconds(lambda: sum(1 for _ in pipeline.pipe(texts, batch_size=extract.batch_size)))
        ours = seconds(extract, texts)
        overhead.append(ours / bare)
        speedup.append(ours / seconds(words, texts))
        one, two = (seconds(SpanExtractor(n_process=n), texts) for n in (1, 2))  # each loads the pipeline
        processes.append(one / two)
        with tempfile.TemporaryDirectory() as folder:
            first, second = (seconds(SpanCache(SpanExtractor(), folder), texts) for _ in range(2))
        cached.append(first / second)
    count = f"{len(texts)} texts"
    return [
        make_row(f"extraction of {count} / bare nlp.pipe of the same components", "x", "<=", 1.15, overhead),
        make_row("extraction / words alone", "x", ">=", 10.0, speedup),
        make_row(f"extraction of {count}, start-up included: 1 process / 2 processes", "x", ">=", 1.6, processes),
        make_row(f"spans of {count}: first run / second run, from the cache", "x", ">=", 30.0, cached),
    ]


def read_texts(path: Path | None) -> list[str]:
    """Prompt + output of the rows of a JSONL file, or of the bundled sample."""
    return texts_of(load_rows("sample" if path is None else path).rows)
