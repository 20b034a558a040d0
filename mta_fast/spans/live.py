"""SpanPool: spans of texts made during training, parsed in processes of its own while the step goes on.

``pending_batch`` is a collator's batch whose spans still come. The processes themselves are ``crew``'s.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

import torch

from mta_fast.errors import InputError
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.crew import Chunk, Crew, picklable
from mta_fast.spans.extract import Columns, SpanExtractor, checked_texts, decode_spans

MAX_PENDING = 1024


class SpanPool:
    """A SpanExtractor in processes that are started once and work beside the caller.

        with SpanPool(SpanExtractor(), n_process=2) as pool:
            pending = pool.submit(texts)
            ...                               # the teacher runs
            columns = pending.result()

    A process that dies is replaced, with a warning, and its texts are parsed again. The processes are spawned: a fork
    of a process that holds a GPU or OpenMP threads may hang. Hence a script must start its training under
    ``if __name__ == "__main__":``, and a function in place of a spaCy model must be importable. They end with the
    pool, and with the process that made it, however that ends.

    Args:
        extractor: makes the spans. Its pipeline is loaded once in each process; its own n_process does not count.
        n_process: processes that parse; the texts of one ``submit`` are split over them.
        max_pending: texts not parsed yet that the pool takes in; ``submit`` waits for room for more.

    Attributes:
        stall_seconds: how long callers have waited so far, for spans in ``result`` and for room in ``submit``.
        replaced: processes that died so far, each replaced by another.

    Raises:
        InputError: an argument of the wrong kind, an extractor that can't be pickled, or a process that may have no
            children.
    """

    def __init__(self, extractor: SpanExtractor, n_process: int = 1, max_pending: int = MAX_PENDING) -> None:
        if not isinstance(extractor, SpanExtractor):
            raise InputError(
                f"extractor: expected a SpanExtractor, got {type(extractor).__name__}; of a SpanCache give .extractor"
            )
        for option, value in (("n_process", n_process), ("max_pending", max_pending)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{option}: expected an integer >= 1, got {value!r}")
        if multiprocessing.current_process().daemon:
            raise InputError(
                "SpanPool: expected a process that may have children, got a daemonic worker process; make the pool in "
                "the main process"
            )
        self.extractor, self.n_process, self.max_pending = extractor, n_process, max_pending
        self.stall_seconds = 0.0
        self._process = os.getpid()
        self._crew = Crew(picklable(extractor), n_process, max_pending)
        # also when the pool is collected, and at the interpreter's exit, before multiprocessing joins its processes
        self._close = Finalize(self, self._crew.stop, exitpriority=0)

    @property
    def replaced(self) -> int:
        """Processes that died so far, each replaced by another."""
        return self._crew.replaced

    def start(self) -> None:
        """Start the processes, unless they run, and wait until each has its pipeline loaded.

        Without it they start at the first ``submit``, or where the pool is entered, and load meanwhile.

        Raises:
            MTAFastError: a process could not start or load; the pool is closed then. Or it was closed before.
        """
        self._check_process()
        for ready in self._crew.start():
            ready.result()

    def submit(self, texts: Sequence[str]) -> PendingSpans:
        """Have these texts parsed; returns at once while there is room for them.

        Args:
            texts: strings, as SpanExtractor takes them.

        Raises:
            InputError: a row that is no string. MTAFastError: the pool is closed, or could not start.
        """
        rows = checked_texts(texts)
        self._check_process()
        self._crew.start()
        size = min(-(-len(rows) // self.n_process), self.extractor.batch_size, self.max_pending) or 1
        parts = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
        chunks = [Chunk([rows[i] for i in part], part) for part in parts]
        begun = time.perf_counter()
        for chunk in chunks:
            self._crew.put(chunk)
        self.stall_seconds += time.perf_counter() - begun
        return PendingSpans(self, chunks)

    def close(self) -> None:
        """Stop the processes; what is not parsed yet is dropped. Does nothing the second time."""
        self._close()

    def __enter__(self) -> SpanPool:
        self._check_process()
        self._crew.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "SpanPool: expected use in the process that made it, got a fork of that one, where its threads don't "
                "run; submit texts in the main process (DataLoader(num_workers=0))"
            )


class PendingSpans:
    """The spans of one ``submit``, which may still be parsed."""

    def __init__(self, pool: SpanPool, chunks: Sequence[Chunk]) -> None:
        self._pool, self._chunks = pool, chunks

    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        return all(chunk.spans.done() for chunk in self._chunks)

    def result(self) -> Columns:
        """What the extractor gives for these texts, in their order; waits until they are parsed.

        Returns:
            {"word_spans": per text [[start, end], ...], "phrase_spans": ...}.

        Raises:
            MTAFastError: processes died over a text, could not start, or the pool was closed before. What the
                extractor raised, the worker's traceback in its notes.
        """
        begun = time.perf_counter()
        try:
            rows = [row for chunk in self._chunks for row in chunk.spans.result()]
        finally:
            self._pool.stall_seconds += time.perf_counter() - begun
        kinds = enumerate(self._pool.extractor.granularity)
        return {f"{kind}_spans": [decode_spans(row[i]) for row in rows] for i, kind in kinds}


# --- a collator's batch whose spans still come -------------------------------------------------------------------


class LazySpans:
    """The {"word": SpanBatch, ...} of a batch that is already in use while its texts are parsed.

    No mapping: what moves a batch to a device must not ask for the spans.

    Attributes:
        pending: the character spans of the batch's texts.
    """

    def __init__(
        self, pending: PendingSpans, aligned: Callable[[], Mapping[str, Mapping[str, SpanBatch]]], side: str
    ) -> None:
        self.pending = pending
        self._aligned, self._side = aligned, side
        self._place: dict[str, Any] = {}
        self._spans: dict[str, SpanBatch] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LazySpans:
        """Remember the device that ``result`` moves the spans to; returns this object."""
        self._place, self._spans = {"device": device, "non_blocking": non_blocking}, None
        return self

    def result(self) -> dict[str, SpanBatch]:
        """The spans, aligned and moved to the device; waits until their texts are parsed.

        Raises:
            What ``PendingSpans.result`` and ``SpanCollator.align`` raise.
        """
        if self._spans is None:
            made = self._aligned()[self._side]
            self._spans = {kind: spans.to(**self._place) if self._place else spans for kind, spans in made.items()}
        return self._spans


def pending_batch(pool: SpanPool, collator: SpanCollator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The collator's batch of these rows at once, while the pool parses their texts.

    Args:
        rows: "prompt" and "output" (or "text"); columns of spans are not read.

    Returns:
        What ``collator(rows)`` gives, with LazySpans as "spans" and, with a teacher tokenizer, as "teacher_spans".

    Raises:
        InputError: rows without texts, or a pool that does not extract the collator's granularity.
    """
    extracted = pool.extractor.granularity
    if not set(collator.granularity) <= set(extracted):
        raise InputError(
            f"pool: expected an extractor of the collator's granularity {', '.join(collator.granularity)}, "
            f"got one of {', '.join(extracted)}; give SpanExtractor(granularity=...) the same"
        )
    tokenized = collator.tokenize(rows)
    pending = pool.submit(tokenized.texts)
    aligned = functools.cache(lambda: collator.align(tokenized, pending.result()))  # one alignment makes both sides
    sides = ("spans", "teacher_spans")[: len(tokenized.sides)]
    return tokenized.batch | {side: LazySpans(pending, aligned, side) for side in sides}
