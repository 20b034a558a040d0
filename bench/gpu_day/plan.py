"""A GPU day: which parts there are, each in a process with a time limit, and what is there already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_day.child import DONE, RUNNING, write
from bench.peak import CHECKOUT
from mta_fast.files import Kind, check_target, marked

MINUTES = 8.75
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-colreduce")  # whose versions a part depends on
LEAST = 20.0  # seconds: with fewer left, a part is not begun


@dataclass(frozen=True)
class Part:
    """One file of the folder.

    Attributes:
        call: "module:function" of what yields its rows, given a ``Day``.
        seconds: limit of its process.
        warm: whether what it compiles is compiled before, beside the first part.
    """

    name: str
    call: str
    seconds: float
    warm: bool = False


# The most valuable first: a day may end early
PARTS = (
    Part("correctness", "bench.gpu_day.correctness:measure", 120),
    Part("times", "bench.gpu_day.times:measure", 120, warm=True),
    Part("kernels", "bench.gpu_day.kernels:measure", 60),
    Part("heads", "bench.gpu_day.heads:measure", 60, warm=True),
    Part("graph", "bench.gpu_day.graph:measure", 45),
    Part("step", "bench.gpu_day.step:measure", 90, warm=True),
    Part("compiled", "bench.gpu_day.compiled:measure", 120, warm=True),
    Part("compiled-reference", "bench.gpu_day.times:compiled_reference", 180, warm=True),
    Part("sanitizer", "bench.gpu_day.sanitizer:measure", 90),
)


def key(quick: bool) -> dict[str, Any]:
    """What a part's figures hold for: code, card and versions."""
    import torch

    versions = dict[str, str]()
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"code": code_hash(), "card": card, "quick": quick, "python": platform.python_version(), **versions}


def code_hash() -> str:
    """Of every Python file of the package, its kernels and the benchmarks."""
    made = hashlib.sha256()
    for folder in ("mta_fast", "kernels", "bench"):
        for file in sorted((CHECKOUT / folder).rglob("*.py")):
            made.update(file.relative_to(CHECKOUT).as_posix().encode() + b"\0" + file.read_bytes())
    return made.hexdigest()[:16]


def file_of(folder: Path, part: Part) -> Path:
    """Where its rows are."""
    return folder / f"{part.name}.json"


def check_folder(folder: Path, parts: Iterable[Part]) -> None:
    """Raises InputError where something else lies in the place of a part."""
    for part in parts:
        check_target(file_of(folder, part), Kind("a part of a GPU day", marked(b'"part": "')))


def read(folder: Path, part: Part) -> dict[str, Any] | None:
    """What is there of a part."""
    file = file_of(folder, part)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def is_done(found: Mapping[str, Any] | None, key: Mapping[str, Any]) -> bool:
    """Whether a part's file holds all of it, of the same code, card and versions."""
    return found is not None and found["state"] == DONE and found["key"] == key


def _say(text: str) -> None:
    print(text, flush=True)


def run_day(
    folder: Path,
    parts: Sequence[Part],
    key: Mapping[str, Any],
    day: Mapping[str, Any],
    minutes: float = MINUTES,
    say: Callable[[str], None] = _say,
) -> None:
    """Run every part that isn't there, one after the other; beside the first, what others compile.

    Args:
        day: the fields of ``bench.gpu_day.day.Day``.
        minutes: when it ends; parts that have not begun then are left out, and a later call runs them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    due = [part for part in parts if not is_done(read(folder, part), key)]
    for part in parts:
        if part not in due:
            say(f"{part.name}: there already, of the same code, card and versions")
    warming = []
    try:
        if day["device"] != "cpu":  # nothing that an interpreter compiles is kept
            warming = [_Process(folder, part, key, {**day, "warm": True}) for part in due if part.warm]
        for i, part in enumerate(due):
            left = end - time.monotonic()
            if left < LEAST:
                say(f"{part.name}: not begun, the {minutes:g} minutes are over; the same command goes on")
                continue
            process = _Process(folder, part, key, day)
            try:
                process.finish(min(part.seconds, left), say)
            finally:
                process.kill()
            if i == 0:  # times are of a machine that does nothing else
                for other in warming:
                    if other.wait(min(other.part.seconds, end - other.begun)) != 0:
                        say(f"{other.part.name}: not compiled beforehand, see {other.log}")
    finally:
        for other in warming:
            other.kill()


class _Process:
    """A part's, and what it starts itself."""

    def __init__(self, folder: Path, part: Part, key: Mapping[str, Any], day: Mapping[str, Any]) -> None:
        self.folder, self.part, self.key, self.warm = folder, part, key, day.get("warm", False)
        self.begun = time.monotonic()
        file = None if self.warm else str(file_of(folder, part))
        job = {"part": part.name, "key": key, "call": part.call, "day": day, "file": file}
        command = [sys.executable, "-m", "bench.gpu_day.child", json.dumps(job)]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if day["device"] == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        self.log = folder / f"{part.name}{'.warm' if self.warm else ''}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=CHECKOUT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None where it runs longer than so many seconds from its start, and is killed."""
        try:
            return self.process.wait(max(seconds - (time.monotonic() - self.begun), 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """It and its compilers, if they still run."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, seconds: float, say: Callable[[str], None]) -> None:
        """Wait for it; where it fails or takes too long, its file says so after the rows that it has made."""
        code = self.wait(seconds)
        found = read(self.folder, self.part)
        if found is None or found["key"] != self.key:  # it ended before it began
            found = {
                "part": self.part.name,
                "key": self.key,
                "state": RUNNING,
                "seconds": 0.0,
                "rows": [],
                "samples": {},
            }
        if found["state"] != DONE or code != 0:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else "nothing in its log"
            why = f"over its {seconds:.0f} s" if code is None else f"exit code {code}: {last}"
            found = {**found, "state": why, "seconds": time.monotonic() - self.begun}
            write(file_of(self.folder, self.part), found)
        say(f"{self.part.name}: {found['state']}, {found['seconds']:.0f} s, {len(found['rows'])} rows")
