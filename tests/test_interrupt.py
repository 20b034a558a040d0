"""Signals that arrive where the code must not stop half way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType

import pytest
from processes import LIMIT

from mta_fast.interrupt import Terminated, deferring, handling, stop_at_once


@pytest.fixture(autouse=True)
def _raising() -> Iterator[None]:
    def handler(number: int, _: FrameType | None) -> None:
        stop_at_once(number)

    with handling((signal.SIGINT, signal.SIGTERM), handler):
        yield


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_in_the_block_is_handled_after_it(number: int, raised: type[BaseException], fails: bool) -> None:
    handlers, ended = signal.getsignal(signal.SIGINT), list[bool]()

    def block() -> None:
        with deferring():
            signal.raise_signal(number)
            ended.append(True)
            if fails:
                raise ValueError("of the block")

    with pytest.raises(raised) as caught:
        block()
    assert ended
    assert (type(caught.value.__context__) is ValueError) == fails
    assert signal.getsignal(signal.SIGINT) is handlers
    with pytest.raises(raised):
        signal.raise_signal(number)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_python_does_not_handle_stays_so(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, handler)
    with deferring():
        assert signal.getsignal(signal.SIGTERM) == handler


# interrupts the main thread in the n-th lock that it takes in Python code, as soon as it has it
SCRIPT = """
import signal, sys, threading
from mta_fast.spans.processes import map_in_processes

def parse(texts, rows):
    return [None for _ in texts]

enter, main, left = threading.Condition.__enter__, threading.get_ident(), int(sys.argv[1])

def entering(condition):
    global left
    entered = enter(condition)
    if threading.get_ident() == main:
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
    return entered

threading.Condition.__enter__ = entering
threads = threading.active_count()
try:
    list(map_in_processes(parse, ["a"] * 40, range(40), n_process=2, batch_size=4, skip=False))
except KeyboardInterrupt:
    print("interrupted", threading.active_count() - threads)
else:
    print("done", left)
"""


@pytest.mark.parametrize("lock", [1, 4, 9, 16, 25])
def test_an_interrupt_leaves_no_lock_of_the_processes_taken(lock: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(lock)], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert ran.stdout.split() == ["interrupted", "0"], ran.stdout + ran.stderr
    assert not ran.stderr
