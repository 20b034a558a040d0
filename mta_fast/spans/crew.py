"""The processes behind a SpanPool: threads that hand them chunks of texts, and what a process does.

Each process belongs to a thread, which gives it one chunk at a time and waits for the answer (``pool``'s workers). A
process that dies is replaced by its thread, which knows what it died over and has that parsed again.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from mta_fast.errors import InputError, MTAFastError
from mta_fast.spans.extract import SpanExtractor
from mta_fast.spans.pool import STOP_SECONDS, Worker, how_it_ended, stop_workers

Encoded = list[list[bytes]]  # per text, ``encode_spans`` per granularity

ATTEMPTS = 3  # processes that may die over one text, or while they load
WATCH_SECONDS = 1.0  # between two looks of a worker at its parent
SHOWN_CHARACTERS = 60  # of a text in an error
FIRST_TEXT = "The first text takes longer."  # parsed while a process loads


@dataclass(eq=False)
class Chunk:
    """Texts that one process parses together, and where their spans go."""

    texts: list[str]
    rows: range  # of these texts in their submit
    spans: Future[Encoded] = field(default_factory=Future)


class Crew:
    """The threads of a pool, their processes, and the chunks that wait. Knows no pool, so that one can be collected."""

    def __init__(self, work: Work, n_process: int, max_pending: int) -> None:
        self._work, self._n_process, self._max_pending = work, n_process, max_pending
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[Chunk] = deque()
        self._pending = 0  # texts
        self._ended: Exception | None = None  # why nothing is parsed any more
        self._threads: list[threading.Thread] = []
        self._ready: list[Future[None]] = []
        self._workers: set[Worker] = set()
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

    def put(self, chunk: Chunk) -> None:
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

    def start_worker(self) -> Worker:
        """A new process, which an ``end`` from now on stops."""
        with self._changed:
            self._check()
            worker = Worker.start(multiprocessing.get_context("spawn"), self._work, [])
            self._workers.add(worker)
            return worker

    def stop_worker(self, worker: Worker) -> int | None:
        """See a process off; its exit code, where it had ended by itself."""
        worker.process.join(STOP_SECONDS if self._ended is None else 0)
        code = worker.process.exitcode
        stop_workers([worker])
        with self._changed:
            self._workers.discard(worker)
        return code

    def lost(self, code: int | None) -> None:
        """Count a process that died, and say so."""
        if self._ended is not None:
            return
        warnings.warn(
            f"SpanPool: expected its processes to live, one stopped ({how_it_ended(code)}); another one is started and "
            f"parses its texts again",
            stacklevel=2,
        )
        with self._changed:
            self.replaced += 1

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _next(self) -> Chunk | None:
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

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._worker: Worker | None = None

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
                f"SpanPool: expected a process to load its pipeline, {ATTEMPTS} stopped before ({how_it_ended(code)}); "
                f"what they printed says why. A script must start it under `if __name__ == '__main__':`, and a "
                f"function must be importable"
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
            f"text of row {rows[0]}: expected a process to parse it, {ATTEMPTS} stopped over it "
            f"({how_it_ended(code)}); leave it out, it begins with {texts[0][:SHOWN_CHARACTERS]!r}"
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


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Give a future what the call returns or raises."""
    try:
        made = call()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(made)


# --- in the worker -----------------------------------------------------------------------------------------------


class Work:
    """What a process does: load at the first message, which is None; then texts to spans."""

    def __init__(self, extractor: SpanExtractor) -> None:
        self.extractor = extractor

    def __call__(self, message: tuple[Sequence[str], Sequence[int]] | None) -> Encoded:
        if message is not None:
            return list(self.extractor.encoded(*message))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        return [] if callable(self.extractor.model) else list(self.extractor.encoded([FIRST_TEXT]))


def picklable(extractor: SpanExtractor) -> Work:
    """What a process of this extractor does; InputError where it can't be sent to one."""
    alone = copy.copy(extractor)
    alone.n_process = 1
    work = Work(alone)
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
