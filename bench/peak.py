"""Peak memory of a call, above its inputs and what it returns: a process of its own, by the system's count (Linux).

The process makes the inputs, runs the same code once on a tiny size (libraries load, threads start), gives free
memory back, forgets its peak, and makes one call: the largest resident set from then on, less the resident set
before and less the tensors that the call returns. What a first call allocates and keeps counts.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.harness import Call

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Probe:
    """A call to measure."""

    maker: str  # "module:function", called with ``arguments``; it makes the inputs and returns the call
    arguments: dict[str, Any]  # JSON values
    warm_up: dict[str, Any] = field(default_factory=dict)  # of the tiny size: the arguments that differ

    def call(self, tiny: bool = False) -> Call:
        """Make the call; ``tiny``: of the size that warms up."""
        module, name = self.maker.split(":")
        made: Call = getattr(importlib.import_module(module), name)(**self.arguments | (self.warm_up if tiny else {}))
        return made


def why_not() -> str | None:
    """Why peaks can't be measured here, or None."""
    return (
        None
        if Path("/proc/self/clear_refs").exists()
        else "the system does not count a process's peak (/proc/self/clear_refs, Linux)"
    )


def peaks(probes: Sequence[Probe]) -> list[float]:
    """Peak of each probe in MB (10^6 bytes), one after the other in a new process, all warmed up before."""
    command = [sys.executable, "-m", "bench.peak", json.dumps([asdict(probe) for probe in probes])]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    made: list[float] = json.loads(done.stdout.splitlines()[-1])
    return made


def _measure(probes: Sequence[Probe]) -> list[float]:
    for probe in {repr((probe.maker, probe.arguments | probe.warm_up)): probe for probe in probes}.values():
        probe.call(tiny=True)()
    return [_peak(probe.call()) for probe in probes]


def _peak(call: Call) -> float:
    gc.collect()
    _trim()
    before = forget_peak()
    result = call()
    peak = status("VmHWM")
    return (peak - before - _size(result)) / 1e6


def forget_peak(process: int | str = "self") -> int:
    """Let the peak of a process be what it holds now: the resident set in bytes."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return status("VmRSS", process)


def status(name: str, process: int | str = "self") -> int:
    """VmRSS (resident set) or VmHWM (its peak) of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _trim() -> None:
    """Give freed memory back to the system, so that a call can't hide in what earlier ones left (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _size(tensors: Sequence[Tensor]) -> int:
    """Bytes of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    print(json.dumps(_measure([Probe(**fields) for fields in json.loads(sys.argv[1])])))
