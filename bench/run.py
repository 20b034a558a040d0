"""The benchmark runner: ``python -m bench.run`` (``make bench``).

Measures the reference backend against the public algorithm on the standard workload, and what ``bench.spans``
measures. Compared times are taken in turn within each round; what is printed is the
median of the rounds' ratios (pytest-benchmark times one side at a time, which on a noisy machine compares two
machines). Nothing is timed before the public preset and the public algorithm agree on the loss and every gradient;
the paper preset leaves out the student's importance, so its ratio counts that saving too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report import Row, machine, make_row, publish, seconds
from bench.spans import alignment_row, extraction_rows, read_texts
from bench.workload import (
    STUDENT_DIM,
    TEACHER_DIM,
    Workload,
    loss_and_gradients,
    public_loss_and_gradients,
    standard_workload,
)

PARITY = 1e-5  # relative difference of the loss, and of the norm of every gradient


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=Path, help="JSONL with prompt and output for the extraction; default: sample")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    rows = [
        *_loss_rows(options.rounds),
        alignment_row(options.rounds),
        *extraction_rows(read_texts(options.texts), options.rounds),
    ]
    return publish(rows, machine(options.texts, widths=[STUDENT_DIM, TEACHER_DIM]), options.out)


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
            algorithm = seconds(public_loss_and_gradients, workload)
            paper[shape].append(algorithm / seconds(loss_and_gradients, workload, workload.loss))
            public[shape].append(algorithm / seconds(loss_and_gradients, workload, workload.public_loss))
        large, small = made[64, 256], made[16, 256]
        growth.append(seconds(loss_and_gradients, large, large.loss) / seconds(loss_and_gradients, small, small.loss))
    rows = []
    for (b, s), target in shapes.items():
        what = f"loss, forward + backward, B={b} S={s}: public algorithm / reference"
        rows.append(make_row(f"{what}, paper preset", "x", ">=", target, paper[b, s]))
        rows.append(make_row(f"{what}, public preset (the same numbers)", "x", ">=", target, public[b, s]))
    return [*rows, make_row("loss, paper preset, B=64 S=256 / B=16 S=256", "x", "<", 5.0, growth)]


def _check_parity(shape: tuple[int, int], workload: Workload) -> None:
    for ours, public in zip(
        loss_and_gradients(workload, workload.public_loss), public_loss_and_gradients(workload), strict=True
    ):
        error = ((ours - public).norm() / public.norm()).item()
        if not error < PARITY:
            sys.exit(f"bench: B={shape[0]} S={shape[1]}: expected parity below {PARITY}, got {error}; nothing timed")


if __name__ == "__main__":
    sys.exit(main())
