"""compute-sanitizer over every kernel, where it is on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from bench.gpu_day.day import Day, Made, attempt
from bench.peak import CHECKOUT
from bench.report import entry, skipped

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
TEXT = "Errors (memcheck) and hazards of shared memory (racecheck) in one pass of every kernel at small sizes."


def measure(day: Day) -> Iterator[Made]:
    """A row each."""
    if shutil.which(TOOL) is None:
        yield skipped(TOOL, "not present on the PATH")
        return
    for check in CHECKS:
        yield from attempt(check, partial(_checked, check, day.device))


def _checked(check: str, device: str) -> Iterator[Made]:
    command = [TOOL, "--tool", check, sys.executable, "-m", "bench.gpu_day.every_kernel", device]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation of its own
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    found = SUMMARY.findall(done.stdout + done.stderr)
    kernels = re.search(r"kernels: (.+)", done.stdout)
    if not found or kernels is None:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise RuntimeError(
            f"expected a summary of {check} and the kernels' names, got exit code {done.returncode}, {last}"
        )
    count = sum(int(number) for pair in found for number in pair if number)
    yield entry(f"{check}, {len(kernels[1].split())} kernels", [count], "errors", "<= 0")
