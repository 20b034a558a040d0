"""Waiting for what other processes and threads do: for an event, never for a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LIMIT = 600.0  # seconds: only ends a test that hangs, however slow the machine is


def wait_for(condition: Callable[[], Any]) -> None:
    """Return as soon as the condition holds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT:.0f} s"
        time.sleep(0.01)


def hold(parent: int, until: Callable[[], Any] = lambda: False) -> None:
    """Do nothing until the condition holds, or this process's parent is gone: no test leaves a process behind."""
    while os.getppid() == parent and not until():
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run (Linux)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in map(int, task.read_text().split()) if alive(child)]


def wait_until_gone(pids: Iterable[int]) -> None:
    """Return as soon as none of the processes runs."""
    wait_for(lambda: not any(map(alive, pids)))


def ignore_interrupts() -> None:
    """``preexec_fn`` of a process that starts as ``command &`` of a script does, or a job of cron."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
