"""The benchmark runner: ``python -m bench.run`` (``make bench``).

Measures the reference backend against the public algorithm on the standard workload, alignment in the collator,
and span extraction against bare spaCy. Compared times are taken in turn within each round; what is printed is the
median of the rounds' ratios (pytest-benchmark times one side at a time, which on a noisy machine compares two
machines). Nothing is timed before the public preset and the public algorithm agree on the loss and every gradient;
the paper preset leaves out the student's importance, so its ratio counts that saving too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.public_algorithm import public_loss
from bench.workload import STUDENT_DIM, TEACHER_DIM, Workload, standard_workload
from mta_fast import MTALoss, SpanBatch, SpanExtractor, __version__
from mta_fast.distill.data import load_sample

PARITY = 1e-5  # relative difference of the loss, and of the norm of every gradient
ROW_TOKENS = 512  # of the alignment benchmark


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=Path, help="JSONL with prompt and output for the extraction; default: sample")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [*_loss_rows(options.rounds), _alignment_row(options.rounds), *_extraction_rows(options)]
    report = {"machine": _machine(options.texts), "rows": [asdict(row) for row in rows]}
    text = _markdown(report)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.reached for row in rows) else 1


# --- the loss against the public algorithm -----------------------------------------------------------------------


def _loss_rows(rounds: int) -> list[Row]:
    shapes = {(16, 256): 2.5, (16, 512): 3.8}
    made = {shape: standard_workload(*shape) for shape in (*shapes, (64, 256))}
    for shape in shapes:
        _check_parity(shape, made[shape])
    paper: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    public: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    growth = []
    for _ in range(rounds):
        for shape in shapes:
            workload = made[shape]
            algorithm = _seconds(_algorithm, workload)
            paper[shape].append(algorithm / _seconds(_ours, workload, workload.loss))
            public[shape].append(algorithm / _seconds(_ours, workload, workload.public_loss))
        large, small = made[64, 256], made[16, 256]
        growth.append(_seconds(_ours, large, large.loss) / _seconds(_ours, small, small.loss))
    rows = []
    for (b, s), target in shapes.items():
        what = f"loss, forward + backward, B={b} S={s}: public algorithm / reference"
        rows.append(_row(f"{what}, paper preset", "x", ">=", target, paper[b, s]))
        rows.append(_row(f"{what}, public preset (the same numbers)", "x", ">=", target, public[b, s]))
    return [*rows, _row("loss, paper preset, B=64 S=256 / B=16 S=256", "x", "<", 5.0, growth)]


def _ours(workload: Workload, mta: MTALoss) -> tuple[Tensor, ...]:
    loss = mta(workload.student_hidden, workload.teacher_hidden, workload.spans).loss
    return loss, *torch.autograd.grad(loss, workload.learnt())


def _algorithm(workload: Workload) -> tuple[Tensor, ...]:
    loss = public_loss(
        workload.loss.projections,
        workload.attention_mask,
        workload.student_hidden,
        workload.teacher_hidden,
        workload.offset_mapping,
        workload.pair_spans(),
    )
    return loss, *torch.autograd.grad(loss, workload.learnt())


def _check_parity(shape: tuple[int, int], workload: Workload) -> None:
    for ours, public in zip(_ours(workload, workload.public_loss), _algorithm(workload), strict=True):
        error = ((ours - public).norm() / public.norm()).item()
        if not error < PARITY:
            sys.exit(f"bench: B={shape[0]} S={shape[1]}: expected parity below {PARITY}, got {error}; nothing timed")


# --- spans -------------------------------------------------------------------------------------------------------


def _alignment_row(rounds: int) -> Row:
    """SpanBatch of words and phrases per row of 512 tokens, with the text at hand, batches of 16."""
    rows, text = 16, ("abcd " * ROW_TOKENS).strip()
    offsets = torch.tensor([[max(5 * j - 1, 0), 5 * j + 4] for j in range(ROW_TOKENS)]).expand(rows, -1, -1)
    words = [(5 * j, 5 * j + 4) for j in range(ROW_TOKENS)]
    phrases = [(words[j][0], words[j + 1][1]) for j in range(0, ROW_TOKENS - 1, 2)]
    mask = torch.ones(rows, ROW_TOKENS)

    def align() -> list[SpanBatch]:
        return [
            SpanBatch.from_char_spans([spans] * rows, offsets, mask, texts=[text] * rows) for spans in (words, phrases)
        ]

    if [batch.num_spans for batch in align()] != [rows * len(words), rows * len(phrases)]:
        sys.exit("bench: alignment: expected every span to find its tokens; nothing timed")
    times = [1000 * _seconds(align) / rows for _ in range(5 * rounds)]
    return _row("alignment in the collator, words and phrases, per row of 512 tokens", "ms", "<", 1.0, times)


def _extraction_rows(options: argparse.Namespace) -> list[Row]:
    texts = _texts(options.texts)
    extract, words = SpanExtractor(), SpanExtractor(granularity="word")
    pipeline = extract._nlp
    assert pipeline is not None
    overhead, speedup = [], []
    for _ in range(options.rounds):
        bare = _seconds(lambda: sum(1 for _ in pipeline.pipe(texts, batch_size=extract.batch_size)))
        ours = _seconds(extract, texts)
        overhead.append(ours / bare)
        speedup.append(ours / _seconds(words, texts))
    return [
        _row(f"extraction of {len(texts)} texts / bare nlp.pipe of the same components", "x", "<=", 1.15, overhead),
        _row("extraction / words alone", "x", ">=", 10.0, speedup),
    ]


def _texts(path: Path | None) -> list[str]:
    if path is None:
        return [row["prompt"] + row["output"] for row in load_sample()]
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row["prompt"] + row["output"] for row in rows]


# --- measuring and printing --------------------------------------------------------------------------------------


def _seconds(run: Callable[..., Any], *args: Any) -> float:
    begun = time.perf_counter()
    run(*args)
    return time.perf_counter() - begun


def _row(what: str, unit: str, relation: str, target: float, values: Sequence[float]) -> Row:
    median = statistics.median(values)
    reached = {">=": median >= target, "<=": median <= target, "<": median < target}[relation]
    return Row(what, unit, f"{relation} {target:g}", median, min(values), max(values), reached)


def _machine(texts: Path | None) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "spacy": importlib.metadata.version("spacy"),
        "mta_fast": __version__,
        "texts": "bundled sample" if texts is None else "/".join(texts.parts[-2:]),
        "widths": [STUDENT_DIM, TEACHER_DIM],
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


if __name__ == "__main__":
    sys.exit(main())
