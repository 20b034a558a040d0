"""The processes of span extraction: offline, in order (``map_in_processes``), and behind a ParserPool.

Each process has an executor of its own and one chunk of texts at a time. One that dies breaks no other's work, and what
it died over is known: those texts are parsed again, one by one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

from mta_fast.errors import InputError, MTAFastError
from mta_fast.interrupt import deferring
from mta_fast.spans.encoding import Encoded

# texts and the row numbers that errors name, to spans; with no texts it loads its pipeline. SpanExtractor.encoded
Parse = Callable[[Sequence[str], Sequence[int]], Iterable[Encoded | None]]
Parsed = list[Encoded | None]  # None: left without spans

CHUNKS_PER_PROCESS = 16  # at least, where there are enough texts: the last chunk then idles little
CHUNKS_AHEAD = 4  # per process: how far results may run ahead of the one the caller waits for
ATTEMPTS = 3  # processes that may die over one text, or while they load
WATCH_SECONDS = 1.0  # between two looks at a process, and of a process at its parent
INTERRUPT_SECONDS = 0.1  # how late a waiting caller hears of a Ctrl-C
SHOWN_CHARACTERS = 60  # of a text in an error
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def map_in_processes(
    parse: Parse, texts: Sequence[str], rows: Sequence[int], *, n_process: int, batch_size: int, skip: bool
) -> Generator[Encoded | None, None, None]:
    """The spans of each text, in order.

    On Linux processes are forked and share what ``parse`` holds (a loaded pipeline); elsewhere it is pickled. They
    start with the first result asked for, and stop when the iterator is exhausted, closed, or raises.

    Args:
        texts: one or more; rows: the row numbers that errors name.
        batch_size: texts that are parsed together, at most.
        skip: give None for a text over which processes die, with a warning, instead of raising.

    Raises:
        InputError: this process may have no children, or ``parse`` can't be pickled where processes aren't forked.
        MTAFastError: processes died over a text, or while they loaded. What ``parse`` raised, with the traceback of its
            process in the notes.
    """
    size = min(batch_size, -(-len(texts) // (CHUNKS_PER_PROCESS * n_process)))
    n_process = min(n_process, -(-len(texts) // size))
    processes = Processes(parse, n_process, _start_method(), max_pending=len(texts), skip=skip)
    made: deque[Future[Parsed]] = deque()
    try:
        for first in range(0, len(texts), size):
            if len(made) == CHUNKS_AHEAD * n_process:
                yield from processes.result(made.popleft())
            made.append(processes.submit(texts[first : first + size], rows[first : first + size]))
        while made:
            yield from processes.result(made.popleft())
    finally:
        processes.stop()


def _start_method() -> str:
    return "fork" if sys.platform == "linux" else "spawn"


class Processes:
    """Processes that parse chunks of texts. Knows no pool, so that one can be collected.

    As many threads hand them chunks, wait, and replace those that die.
    """

    def __init__(self, parse: Parse, n_process: int, method: str, *, max_pending: int, skip: bool) -> None:
        if multiprocessing.current_process().daemon:
            raise InputError(
                "span extraction: expected a process that may have children, got a daemonic worker process; use "
                "n_process=1 there, without skip_unparsable, or extract (and make a ParserPool) in the main process"
            )
        if method != "fork":
            _check_picklable(parse)
        self._processes = [_Process(parse, method) for _ in range(n_process)]
        self._max_pending, self._skip, self._made_in = max_pending, skip, os.getpid()
        self._threads = ThreadPoolExecutor(n_process, "mta_fast.spans")
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._changed = threading.Condition()  # guards all that follows
        self._ready: list[Future[Parsed]] = []
        self._ended: Exception | None = None  # why nothing is parsed any more
        self._pending = 0  # texts
        self.replaced = self.skipped = 0

    def start(self) -> list[Future[Parsed]]:
        """Start them once; one result each, when its pipeline is loaded."""
        with deferring(), self._changed:
            self._check()
            if not self._ready:
                _running.add(self)
                for process in self._processes:
                    self._idle.put(process)
                self._ready = [self._threads.submit(self._run, self._load) for _ in self._processes]
            return self._ready

    def submit(self, texts: Sequence[str], rows: Sequence[int]) -> Future[Parsed]:
        """Have a chunk, no larger than max_pending, parsed together, as soon as there is room for it."""
        self.start()
        room = self._max_pending - len(texts)
        while True:
            with deferring(), self._changed:
                if self._changed.wait_for(lambda: self._ended or self._pending <= room, INTERRUPT_SECONDS):
                    self._check()
                    self._pending += len(texts)
                    return self._threads.submit(self._run, self._parse_again, texts, rows)

    def result(self, future: Future[Parsed]) -> Parsed:
        """What a future of these gives."""
        while True:
            with deferring():
                if future.done() or wait([future], INTERRUPT_SECONDS).done:  # done alone knows the cancelled
                    try:
                        return future.result()
                    except CancelledError:
                        self._check()
                        raise

    def end(self, reason: Exception | None = None) -> None:
        """Parse nothing more: what is not parsed gets this reason, and the processes are killed. Waits for nothing."""
        if os.getpid() != self._made_in:  # a fork, to which they don't belong
            return
        closed = MTAFastError("ParserPool: expected an open pool, got one that was closed; make a new one")
        with deferring(), self._changed:
            if self._ended is None:
                self._ended = reason or closed
                for process in self._processes:
                    process.kill()
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._changed.notify_all()

    def stop(self) -> None:
        """End, and see processes and threads off."""
        with deferring():
            self.end()
            self._threads.shutdown()
            for process in self._processes:
                process.see_off()

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    # --- in one of the threads

    def _run(self, call: Callable[..., Parsed], texts: Sequence[str] = (), rows: Sequence[int] = ()) -> Parsed:
        """With a process that has nothing else to do."""
        process = self._idle.get()
        try:
            return call(process, texts, rows)
        finally:
            self._idle.put(process)
            with self._changed:
                self._pending -= len(texts)
                self._changed.notify_all()

    def _load(self, process: _Process, *nothing: Sequence[Any]) -> Parsed:
        """Start it, and wait until it has its pipeline. Where that can't be, all ends.

        Never in the main thread: what a signal raises there in a hook of a fork is lost.
        """
        code = None
        try:
            for _ in range(ATTEMPTS):
                self._start(process)
                try:
                    return process.parse((), ())
                except _DiedError as died:
                    code = died.code
            raise MTAFastError(
                f"span extraction: expected a process to load its pipeline, {ATTEMPTS} stopped before "
                f"({how_it_ended(code)}); what they printed says why. A script must start it under "
                f"`if __name__ == '__main__':`, and a function must be importable"
            )
        except Exception as error:
            self.end(error)
            raise

    def _parse_again(self, process: _Process, texts: Sequence[str], rows: Sequence[int]) -> Parsed:
        """Together; and one by one, where a process died over them together."""
        code = None
        if not process.alive():  # it died before, over none of these
            self._replace(process, process.exit_code())
        for _ in range(ATTEMPTS if len(texts) == 1 else 1):
            try:
                return process.parse(texts, rows)
            except _DiedError as died:
                code = died.code
                self._replace(process, code)
        if len(texts) > 1:
            singles = zip(texts, rows, strict=True)
            return [spans for text, row in singles for spans in self._parse_again(process, [text], [row])]
        return self._give_up(texts[0], rows[0], how_it_ended(code))

    def _give_up(self, text: str, row: int, how: str) -> Parsed:
        what = f"text of row {row}: expected a process to parse it, {ATTEMPTS} stopped over it ({how})"
        begins = f"it begins with {text[:SHOWN_CHARACTERS]!r}"
        if not self._skip:
            raise MTAFastError(
                f"{what}; try a smaller n_process or batch_size if memory ran out, leave it out, or allow it to have "
                f"no spans (skip_unparsable); {begins}"
            )
        with self._changed:
            self.skipped += 1
            count = self.skipped
        warnings.warn(f"{what}; it is left without spans, {count} so far; {begins}", stacklevel=2)
        return [None]

    def _replace(self, process: _Process, code: int | None) -> None:
        """Count and tell that it died, unless all ends, and have another one ready."""
        if self._ended is None:
            warnings.warn(
                f"span extraction: expected its processes to live, one stopped ({how_it_ended(code)}); another one is "
                f"started and parses its texts again",
                stacklevel=2,
            )
            with self._changed:
                self.replaced += 1
        self._load(process)

    def _start(self, process: _Process) -> None:
        with self._changed:
            if self._ended is None:
                process.start()
            if self._ended is not None:  # or meanwhile: a collector may have dropped the pool in this thread
                process.kill()
                raise self._ended


def _check_picklable(parse: Parse) -> None:
    try:
        pickle.dumps(parse)
    except Exception as error:
        raise InputError(
            f"extractor: expected one that can be pickled for the processes, got one that can't ({error}); define its "
            f"function at the top level of a module, or extract with n_process=1"
        ) from None


_running: weakref.WeakSet[Processes] = weakref.WeakSet()


def _end_all() -> None:
    for processes in list(_running):
        processes.end()


# before atexit, the interpreter waits for all that an executor has begun; this comes still earlier
threading._register_atexit(_end_all)  # type: ignore[attr-defined]  # not public: what concurrent.futures itself uses


class _Process:
    """One process at a time, in an executor of its own."""

    def __init__(self, parse: Parse, method: str) -> None:
        self._parse, self._method = parse, method
        self._process: BaseProcess | None = None
        self._manager: threading.Thread | None = None

    def start(self) -> None:
        """Start it, or its successor."""
        context = copy.copy(multiprocessing.get_context(self._method))
        context.Process = self._make  # type: ignore[attr-defined]  # BaseContext declares no Process
        self._executor = ProcessPoolExecutor(1, context, _begin, (self._parse,))
        self._executor.submit(os.getpid)  # the first call starts it
        self._manager = self._executor._executor_manager_thread  # type: ignore[assignment]  # not public

    def _make(self, **options: Any) -> BaseProcess:
        context: Any = multiprocessing.get_context(self._method)
        made: BaseProcess = context.Process(daemon=True, **options)
        self._process = made  # before it starts: an interrupt from now on finds it
        return made

    def parse(self, texts: Sequence[str], rows: Sequence[int]) -> Parsed:
        """The spans of these texts.

        Raises:
            _DiedError: it ended before. What ``parse`` raised there.
        """
        try:
            future = self._executor.submit(_answer, texts, rows)
            while not wait([future], WATCH_SECONDS).done:
                if not self.alive():
                    # its executor has not seen that: it waits for the rest of an answer, which now ends, or at a pipe
                    # that another fork keeps open
                    self._executor._result_queue._writer.close()  # type: ignore[attr-defined]
                    raise _DiedError(self.exit_code())
            made, error = future.result()
        except BrokenProcessPool:
            raise _DiedError(self.exit_code()) from None
        if error is not None:
            raise error
        return made

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.is_alive()

    def exit_code(self) -> int | None:
        """How it ended; waits until it has. None where it never began."""
        if self._process is None:
            return None
        while self._process.pid is not None and self._process.exitcode is None:
            self._process.join(0.01)  # returns early while its executor, too, asks the system for its end
        return self._process.exitcode

    def see_off(self) -> None:
        """Wait until it has ended, and the thread of its executor."""
        self.exit_code()
        if self._manager is not None:
            self._manager.join(WATCH_SECONDS)  # the interpreter's end would write to the pipe that it is closing

    def kill(self) -> None:
        """End it, whatever it is at."""
        if self._process is not None and self._process.pid is not None:
            self._process.kill()


class _DiedError(Exception):
    """A process ended before it answered."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


def how_it_ended(code: int | None) -> str:
    """A process's exit code in words."""
    if code is not None and code < 0:
        return f"signal {-code}" + (", often the system's out-of-memory killer" if -code == signal.SIGKILL else "")
    return f"exit code {code}"


# --- in the process ----------------------------------------------------------------------------------------------


_parse: Parse


def _begin(parse: Parse) -> None:
    global _parse
    _parse = parse
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # the collector leaves alone what a fork brought: its pages stay shared with the parent
    _keep_freed_memory()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the cores are shared out, and a forked OpenMP pool would hang


def _end_with_parent() -> None:
    """End this process, whatever it is at, when its parent is gone; a fork of the parent may keep the pipes open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid and not wait_for_any([parent.sentinel], WATCH_SECONDS):
        pass
    os._exit(1)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next chunk: on 1,000 texts 9 times fewer page faults, 15% less CPU time.

    Without it each chunk's parse gives its arrays back to the system and faults them in again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_THRESHOLD, 32 << 20)):
            mallopt(parameter, value)


def _answer(texts: Sequence[str], rows: Sequence[int]) -> tuple[Parsed, Exception | None]:
    """Spans, or the error: an executor would break over one that can't be unpickled."""
    try:
        return list(_parse(texts, rows)), None
    except (Exception, SystemExit) as error:
        return [], _portable(error)


def _portable(error: BaseException) -> Exception:
    """The error with this process's traceback as a note; one that the parent can't take becomes an MTAFastError."""
    note = "in a worker process:\n" + "".join(traceback.format_exception(error))
    try:
        made = pickle.loads(pickle.dumps(error))
    except Exception:
        made = None
    if not isinstance(made, Exception):
        made = MTAFastError(f"span extraction: {type(error).__name__} in a worker process: {error}")
    made.add_note(note)
    return made
