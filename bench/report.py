"""What every benchmark here prints and writes: one figure a row, its target, the spread, the machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mta_fast import __version__


@dataclass(frozen=True)
class Row:
    """One figure, what it must reach, and the spread of the rounds."""

    what: str
    unit: str
    target: str
    median: float
    lowest: float
    highest: float
    reached: bool


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run(*args)
    return time.perf_counter() - begun


def make_row(what: str, unit: str, relation: str, target: float, values: Sequence[float]) -> Row:
    """A row from the rounds' values; ``relation`` is ">=", "<=" or "<"."""
    median = statistics.median(values)
    reached = {">=": median >= target, "<=": median <= target, "<": median < target}[relation]
    return Row(what, unit, f"{relation} {target:g}", median, min(values), max(values), reached)


def machine(texts: Path | None, **more: Any) -> dict[str, Any]:
    """Processor, versions and data of a run."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "spacy": importlib.metadata.version("spacy"),
        "mta_fast": __version__,
        "texts": "bundled sample" if texts is None else "/".join(texts.parts[-2:]),
        **more,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def _markdown(report: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = ["| figure | target | median | lowest | highest | reached |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        numbers = (f"{row[name]:.2f} {row['unit']}" for name in ("median", "lowest", "highest"))
        lines.append(
            f"| {row['what']} | {row['target']} | {' | '.join(numbers)} | {'yes' if row['reached'] else 'NO'} |"
        )
    return "\n".join([f"{machine}.", "", *lines])


def publish(rows: Sequence[Row], about: dict[str, Any], out: Path | None) -> int:
    """Print the rows, write OUT.json and OUT.md, and return 1 if a target was missed."""
    report = {"machine": about, "rows": [asdict(row) for row in rows]}
    text = _markdown(report)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.reached for row in rows) else 1
