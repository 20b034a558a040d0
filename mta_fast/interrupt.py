"""Ctrl-C and SIGTERM: both end a command with what it has made kept and its children ended.

Where SIGINT is ignored when a process starts (a job in the background of a script, cron), Ctrl-C stays ignored;
SIGTERM still ends it. Schedulers send SIGTERM, some of them to every process of a job.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mta_fast.errors import INTERRUPTED, TERMINATED

Handler = Callable[[int, FrameType | None], None]
SETTLING_SECONDS = 0.05  # `timeout` and launchers signal a process and its group: that is one request


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; whatever keeps its work on Ctrl-C keeps it now."""


def exit_code(number: int) -> int:
    """Of a command that a signal ended."""
    return TERMINATED if number == signal.SIGTERM else INTERRUPTED


def stop_at_once(number: int) -> None:
    """Raise what ends the command."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


class Request:
    """Whether the process was asked to stop.

    Attributes:
        number: of the first signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._process, self._settling = os.getpid(), False

    def note(self, number: int) -> bool | None:
        """Take note of a signal: True for the first, False for a later one, None for the same request once more."""
        if os.getpid() != self._process:  # a child that was forked: it ends as if it had no handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return None
        if self._settling:
            return None
        if self.number is not None:
            return False
        self.number, self._settling = number, True
        time.sleep(SETTLING_SECONDS)
        self._settling = False
        return True


@contextmanager
def handling(numbers: tuple[signal.Signals, ...], handler: Handler) -> Iterator[None]:
    """Handle these signals in the block, but those that are ignored: they stay so. Only the main thread can."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    try:
        for number in former:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


@contextmanager
def deferring() -> Iterator[None]:
    """Ctrl-C and SIGTERM are handled when the block has ended, where the main thread runs it and they have handlers.

    For what must not stop half way: a Condition, a Future or an executor that an exception leaves in the middle of its
    own Python code may keep its lock for good, and the threads that wait for that never end.
    """
    with _deferring(signal.SIGINT), _deferring(signal.SIGTERM):
        yield


@contextmanager
def _deferring(number: signal.Signals) -> Iterator[None]:
    handler = signal.getsignal(number)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: came.append(frame))
        yield
    finally:
        signal.signal(number, handler)
        if came:
            handler(number, came[0])


@contextmanager
def terminable() -> Iterator[Request]:
    """SIGTERM raises Terminated in the block, as Ctrl-C raises KeyboardInterrupt; where it is not handled already."""
    request = Request()

    def handler(number: int, _: FrameType | None) -> None:
        if request.note(number) is not None:
            stop_at_once(number)

    default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with handling((signal.SIGTERM,) if default else (), handler):
        yield request
