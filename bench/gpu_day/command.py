"""``python -m bench gpu --all``: a GPU day in one folder, and its report."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu import device_facts
from bench.gpu_day.child import DONE
from bench.gpu_day.day import Day, failed
from bench.gpu_day.plan import PARTS, Part, check_folder, is_done, key, read, run_day
from bench.report import Entry, Report, Section, machine, nothing, skipped
from mta_fast.choices import check_choice

COMMAND = "mta-fast bench gpu --all"
REPORT = "report"  # of the folder


def measure(folder: Path, parts: Sequence[str] | None, minutes: float, quick: bool) -> Report:
    """Run what is not there yet, and report all that is.

    Args:
        parts: names of those to run; None: all.
        quick: tiny sizes, on a CPU too.

    Raises:
        InputError: no part of that name, or another file in a part's place.
    """
    for name in parts or ():
        check_choice("part", name, [part.name for part in PARTS])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        return nothing(COMMAND, "no CUDA or ROCm device answers; --quick tries every part at tiny sizes without one")
    check_folder(folder, PARTS)
    day, made_of = Day(device, quick), key(quick)
    about = machine(**{**made_of, **(device_facts() if device == "cuda" else {})})
    run_day(folder, [part for part in PARTS if parts is None or part.name in parts], made_of, asdict(day), minutes)
    return report(folder, PARTS, made_of, about)


def report(folder: Path, parts: Sequence[Part], key: Mapping[str, Any], about: Mapping[str, Any]) -> Report:
    """Of all parts that the folder has of this code, card and versions."""
    sections, samples = [], {}
    for part in parts:
        found = read(folder, part)
        if found is None or found["key"] != key:
            sections.append(Section(part.name, [skipped(part.name, "not run; the same command goes on")]))
            continue
        entries = [Entry(**row) for row in found["rows"]]
        if not is_done(found, key):
            entries.append(failed(part.name, found["state"]))
        module, name = part.call.split(":")
        text = getattr(importlib.import_module(module), "TEXT_COMPILED" if name == "compiled_reference" else "TEXT", "")
        sections.append(Section(part.name, entries, text))
        samples[part.name] = {"seconds": found["seconds"], "done": found["state"] == DONE, **found["samples"]}
    return Report(COMMAND, about, sections, samples)
