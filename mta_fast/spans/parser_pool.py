"""ParserPool: spans of texts made during training, parsed in processes of its own while the step goes on."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

from mta_fast.errors import InputError
from mta_fast.interrupt import deferring
from mta_fast.spans.encoding import Columns, checked_texts, decode_columns
from mta_fast.spans.extract import SpanExtractor
from mta_fast.spans.processes import Parsed, Processes

MAX_PENDING = 1024


class ParserPool:
    """A SpanExtractor in processes that are started once and work beside the caller.

        with ParserPool(SpanExtractor(), n_process=2) as pool:
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
        skipped: texts so far that are left without spans, as the extractor's ``skip_unparsable`` allows.

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
        self.extractor, self.n_process, self.max_pending = extractor, n_process, max_pending
        self.stall_seconds = 0.0
        self._process = os.getpid()
        self._processes = Processes(
            extractor.alone().encoded, n_process, "spawn", max_pending=max_pending, skip=extractor.skip_unparsable
        )
        weakref.finalize(self, self._processes.end).atexit = False  # at exit the processes themselves see to it

    @property
    def replaced(self) -> int:
        """Processes that died so far, each replaced by another."""
        return self._processes.replaced

    @property
    def skipped(self) -> int:
        """Texts so far that are left without spans."""
        return self._processes.skipped

    def start(self) -> None:
        """Start the processes, unless they run, and wait until each has its pipeline loaded.

        Without it they start at the first ``submit``, or where the pool is entered, and load meanwhile.

        Raises:
            MTAFastError: a process could not start or load; the pool is closed then. Or it was closed before.
        """
        self._check_process()
        for ready in self._processes.start():
            self._processes.result(ready)

    def submit(self, texts: Sequence[str]) -> PendingSpans:
        """Have these texts parsed; returns at once while there is room for them.

        Args:
            texts: strings, as SpanExtractor takes them.

        Raises:
            InputError: a row that is no string. MTAFastError: the pool is closed, or could not start.
        """
        rows = checked_texts(texts)
        self._check_process()
        self._processes.start()
        size = min(-(-len(rows) // self.n_process), self.extractor.batch_size, self.max_pending) or 1
        parts = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
        begun = time.perf_counter()
        made = [self._processes.submit([rows[i] for i in part], part) for part in parts]
        self.stall_seconds += time.perf_counter() - begun
        return PendingSpans(self, made)

    def close(self) -> None:
        """Stop the processes; what is not parsed yet is dropped. Does nothing the second time."""
        self._processes.stop()

    def __enter__(self) -> ParserPool:
        self._check_process()
        self._processes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "ParserPool: expected use in the process that made it, got a fork of that one, where its threads don't "
                "run; submit texts in the main process (DataLoader(num_workers=0))"
            )


SpanPool = ParserPool  # its name up to 0.1


class PendingSpans:
    """The spans of one ``submit``, which may still be parsed."""

    def __init__(self, pool: ParserPool, made: Sequence[Future[Parsed]]) -> None:
        self._pool, self._made = pool, made

    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        with deferring():
            return all(future.done() for future in self._made)

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
            rows = [row for future in self._made for row in self._pool._processes.result(future)]
        finally:
            self._pool.stall_seconds += time.perf_counter() - begun
        return decode_columns(rows, self._pool.extractor.granularity)
