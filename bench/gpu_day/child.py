"""One part of a GPU day in a process of its own: its rows go to a file as they come.

``python -m bench.gpu_day.child JOB``: a JSON object. torch is imported by the part alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

RUNNING, DONE = "running", "done"


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def run(job: dict[str, Any]) -> None:
    """Call a part and keep what it yields.

    Args:
        job: "part": its name; "key": code, card and versions; "call": "module:function", given a ``Day`` of "day";
            "file": where its rows go, None where it only warms up.
    """
    begun, rows, samples = time.perf_counter(), list[dict[str, Any]](), dict[str, Any]()
    file = None if job["file"] is None else Path(job["file"])

    def keep(state: str) -> None:
        if file is not None:
            content = {"part": job["part"], "key": job["key"], "state": state, "seconds": time.perf_counter() - begun}
            write(file, {**content, "rows": rows, "samples": samples})

    keep(RUNNING)
    module, name = job["call"].split(":")
    function = getattr(importlib.import_module(module), name)
    from bench.gpu_day.day import Day

    day = Day(**job["day"])
    if day.warm:
        day.share()
    for made in function(day):
        if isinstance(made, dict):
            samples |= made
        else:
            rows.append(asdict(made))
            print(made.what, made.median, made.unit, made.note, flush=True)
        keep(RUNNING)
    keep(DONE)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
