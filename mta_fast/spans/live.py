"""SpanPool: spans of texts made during training, parsed in processes of its own while the step goes on.

The processes start once and keep their pipeline. Each belongs to a thread of the caller's process, which hands it one
chunk of texts at a time and waits for the answer (``pool``'s workers); a process that dies is replaced by its thread,
which knows what it died over and has that parsed again. ``pending_batch`` is a collator's batch whose spans still come.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

import torch

from mta_fast.errors import InputError, MTAFastError
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.extract import Columns, SpanExtractor, _checked, decode_spans
from mta_fast.spans.pool import STOP_SECONDS, _stop, _Worker

Encoded = list[list[bytes]]  # per text, ``encode_spans`` per granularity

MAX_PENDING = 1024
ATTEMPTS = 3  # processes that may die over one text, or while they load
WATCH_SECONDS = 1.0  # between two looks of a worker at its parent
SHOWN_CHARACTERS = 60  # of a text in an error
FIRST_TEXT = "The first text takes longer."  # parsed while a process loads


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
        self._crew = _Crew(_picklable(extractor), n_process, max_pending)
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
        rows = _checked(texts)
        self._check_process()
        self._crew.start()
        size = min(-(-len(rows) // self.n_process), self.extractor.batch_size, self.max_pending) or 1
        parts = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
        chunks = [_Chunk([rows[i] for i in part], part) for part in parts]
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

    def __init__(self, pool: SpanPool, chunks: Sequence[_Chunk]) -> None:
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


# --- threads and their processes ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Chunk:
    """Texts that one process parses together, and where their spans go."""

    texts: list[str]
    rows: range  # of these texts in their submit
    spans: Future[Encoded] = field(default_factory=Future)


class _Crew:
    """The threads of a pool, their processes, and the chunks that wait. Knows no pool, so that one can be collected."""

    def __init__(self, work: _Work, n_process: int, max_pending: int) -> None:
        self._work, self._n_process, self._max_pending = work, n_process, max_pending
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[_Chunk] = deque()
        self._pending = 0  # texts
        self._ended: Exception | None = None  # why nothing is parsed any more
        self._threads: list[threading.Thread] = []
        self._ready: list[Future[None]] = []
        self._workers: set[_Worker] = set()
        self.replaced = 0

    def start(self) -> list[Future[None]]:
        """Start the threads once; one result each, when its process has loaded."""
        with self._changed:
            self._check()
            if not self._threads:
                self._ready = [Future() for _ in range(self._n_process)]
                self._threads = [
                    threading.Thread(target=self._run, args=(ready,), name="mta_fast.SpanPool", daemon=True)
                    for ready in self._ready
                ]
                for thread in self._threads:
                    thread.start()
            return self._ready

    def put(self, chunk: _Chunk) -> None:
        """Add a chunk, no larger than max_pending, as soon as there is room for it."""
        with self._changed:
            room = self._max_pending - len(chunk.texts)
            self._changed.wait_for(lambda: self._ended is not None or self._pending <= room)
            self._check()
            self._waiting.append(chunk)
            self._pending += len(chunk.texts)
            self._changed.notify_all()

    def end(self, reason: Exception) -> None:
        """Parse nothing more: what is not parsed gets this reason, and the processes are told to stop."""
        with self._changed:
            if self._ended is not None:
                return
            self._ended = reason
            dropped = [*self._waiting]
            self._waiting.clear()
            for worker in self._workers:
                worker.process.terminate()
            self._changed.notify_all()
        for chunk in dropped:
            chunk.spans.set_exception(reason)

    def stop(self) -> None:
        """End, and see the processes off."""
        self.end(MTAFastError("SpanPool: expected an open pool, got one that was closed; make a new one"))
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(STOP_SECONDS)
        with self._changed:
            for worker in self._workers:  # deaf to SIGTERM
                worker.process.kill()
        for thread in others:
            thread.join()

    def start_worker(self) -> _Worker:
        """A new process, which an ``end`` from now on stops."""
        with self._changed:
            self._check()
            worker = _Worker.start(multiprocessing.get_context("spawn"), self._work, [])
            self._workers.add(worker)
            return worker

    def stop_worker(self, worker: _Worker) -> int | None:
        """See a process off; its exit code, where it had ended by itself."""
        worker.process.join(STOP_SECONDS if self._ended is None else 0)
        code = worker.process.exitcode
        _stop([worker])
        with self._changed:
            self._workers.discard(worker)
        return code

    def lost(self, code: int | None) -> None:
        """Count a process that died, and say so."""
        if self._ended is not None:
            return
        warnings.warn(
            f"SpanPool: expected its processes to live, one stopped ({_how(code)}); another one is started and parses "
            f"its texts again",
            stacklevel=2,
        )
        with self._changed:
            self.replaced += 1

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _next(self) -> _Chunk | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or self._waiting)
            return None if self._ended is not None else self._waiting.popleft()

    def _run(self, ready: Future[None]) -> None:
        """A thread: one process after another, as they die, and the chunks."""
        parser = _Parser(self)
        _settle(ready, parser.load)
        while chunk := self._next():
            _settle(chunk.spans, functools.partial(parser.parse, chunk.texts, chunk.rows))
            with self._changed:
                self._pending -= len(chunk.texts)
                self._changed.notify_all()
        parser.stop()


class _Parser:
    """One process at a time, replaced when it dies."""

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew
        self._worker: _Worker | None = None

    def load(self) -> None:
        """Start a process and load its pipeline. Where that can't be, the crew ends."""
        code = None
        try:
            for _ in range(ATTEMPTS):
                self._worker = self._crew.start_worker()
                try:
                    self._ask(None)
                    return
                except _DiedError as died:
                    code = died.code
            raise MTAFastError(
                f"SpanPool: expected a process to load its pipeline, {ATTEMPTS} stopped before ({_how(code)}); what "
                f"they printed says why. A script must start it under `if __name__ == '__main__':`, and a function "
                f"must be importable"
            )
        except Exception as error:
            self._crew.end(error)
            raise

    def parse(self, texts: Sequence[str], rows: Sequence[int]) -> Encoded:
        """Together; and one by one, where a process died over them together."""
        code = None
        for _ in range(ATTEMPTS if len(texts) == 1 else 1):
            if self._worker is None:
                self.load()
            try:
                return self._ask((texts, rows))
            except _DiedError as died:
                code = died.code
                self._crew.lost(code)
        if len(texts) > 1:
            return [spans for text, row in zip(texts, rows, strict=True) for spans in self.parse([text], [row])]
        raise MTAFastError(
            f"text of row {rows[0]}: expected a process to parse it, {ATTEMPTS} stopped over it ({_how(code)}); "
            f"leave it out, it begins with {texts[0][:SHOWN_CHARACTERS]!r}"
        )

    def stop(self) -> None:
        """Its process, where one lives."""
        if self._worker is not None:
            self._crew.stop_worker(self._worker)

    def _ask(self, message: Any) -> Encoded:
        assert self._worker is not None
        worker = self._worker
        try:
            worker.connection.send(message)
            # a process forked meanwhile may keep the pipe open: that it closes does not tell every death
            while not worker.connection.poll(WATCH_SECONDS) and worker.process.is_alive():
                pass
            if not worker.connection.poll():
                raise EOFError
            made, error = worker.connection.recv()
        except (EOFError, OSError):
            self._worker = None
            raise _DiedError(self._crew.stop_worker(worker)) from None
        if error is not None:
            raise error
        return made


class _DiedError(Exception):
    """A process ended before it answered."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}" + (", often the system's out-of-memory killer" if -code == signal.SIGKILL else "")
    return f"exit code {code}"


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Give a future what the call returns or raises."""
    try:
        made = call()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(made)


# --- in the worker -----------------------------------------------------------------------------------------------


class _Work:
    """What a process does: load at the first message, which is None; then texts to spans."""

    def __init__(self, extractor: SpanExtractor) -> None:
        self.extractor = extractor

    def __call__(self, message: tuple[Sequence[str], Sequence[int]] | None) -> Encoded:
        if message is not None:
            return list(self.extractor.encoded(*message))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        return [] if callable(self.extractor.model) else list(self.extractor.encoded([FIRST_TEXT]))


def _picklable(extractor: SpanExtractor) -> _Work:
    alone = copy.copy(extractor)
    alone.n_process = 1
    work = _Work(alone)
    try:
        pickle.dumps(work)
    except Exception as error:
        raise InputError(
            f"extractor: expected one that can be pickled for the processes, got one that can't ({error}); define its "
            f"function at the top level of a module"
        ) from None
    return work


def _end_with_parent() -> None:
    """End this process, whatever it is at, when its parent is gone; a fork of the parent may keep the pipes open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid and not wait([parent.sentinel], WATCH_SECONDS):
        pass
    os._exit(1)
