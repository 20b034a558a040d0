"""All of bench/results/ that is measured on a CPU, bar the training step: ``mta-fast bench all`` (``make bench``).

Each benchmark runs in a process of its own, one after the other: what one leaves behind does not slow the next.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from mta_fast.files import user_path

NAMES = ("loss", "ops", "memory", "spans", "model")
WITH_TEXTS, NEEDS = ("spans",), {"model": "triton"}


def main(out: Path, texts: Path | None = None, quick: bool = False) -> int:
    """Run them, write OUT/NAME.*, and return 1 if a target was missed or one failed."""
    out = user_path(out)
    begun, failed = time.perf_counter(), []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for name in NAMES:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"bench {name}: skipped, {NEEDS[name]} is not installed", flush=True)
            continue
        command = [sys.executable, "-m", "mta_fast", "bench", name, "--out", str(out / name)]
        command += ["--texts", str(texts)] if texts is not None and name in WITH_TEXTS else []
        command += ["--quick"] if quick and name not in NEEDS else []
        started = time.perf_counter()
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
        print(f"\nbench {name}: {(time.perf_counter() - started) / 60:.1f} minutes\n", flush=True)
    missed = f"; a target was missed, or it failed: {', '.join(failed)}" if failed else ""
    print(f"bench all: {(time.perf_counter() - begun) / 60:.1f} minutes, reports in {out}{missed}")
    return 1 if failed else 0
