"""What padding costs on rows as they come: ``python -m bench padding``.

Real rows in random order, in batches of 16 padded to their longest, against the same rows sorted by length before they
are dealt out, and against the same batches packed without padding. Forward and backward of the live teacher, the base
loss and MTA, with SmolLM2-135M and its 10-layer cut; a round is a pass over all rows.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import Call, Effort, alternate
from bench.report import Report, Section, entry, machine, markdown_table, milliseconds, texts_name
from bench.side import Rows, Setting, setting, small_setting
from bench.step import with_spans
from mta_fast import LayerMap, MTAConfig, SpanCollator
from mta_fast.distill.data import load_rows

PADDED, GROUPED, PACKED = "padded, random order", "padded, like lengths together", "packed, random order"
TARGET = ">= 1.4"
BATCH, QUICK_BATCH = 16, 4
Batches = list[dict[str, Any]]


def measure(rounds: int | None = None, texts: Path | None = None, quick: bool = False, count: int = 64) -> Report:
    """Passes over ``count`` rows, and how much faster they are than with today's collator."""
    made = small_setting() if quick else setting()
    batches, tokens = _batches(made, _rows(made, texts, min(count, 8) if quick else count), quick)
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Call] = {
            side: partial(_pass, _trainer(made, side, folder), of) for side, of in batches.items()
        }
        times = alternate(sides, Effort(rounds or (1 if quick else 2)), warm_up=False, collect=True)
    found = [
        entry(f"{PADDED} / {side}", times.ratio(PADDED, side), "x", "" if quick or side == PACKED else TARGET)
        for side in (GROUPED, PACKED)
    ]
    lines = [
        [side, milliseconds("", values).cell, f"{sum(b['input_ids'].numel() for b in batches[side]):,}"]
        for side, values in times.items()
    ]
    table = markdown_table(("batches", "a pass", f"positions, of which {tokens:,} tokens"), lines)
    title = f"{count:,} rows of at most {made.length} tokens in batches of {QUICK_BATCH if quick else BATCH}"
    sections = [Section("Padding", found, f"{title}; forward + backward."), Section("Passes", (), "", table)]
    about = machine("transformers", pair=made.name, batch=title, texts=texts_name(texts))
    return Report("mta-fast bench padding", about, sections, {"seconds": times})


def _rows(made: Setting, texts: Path | None, count: int) -> Rows:
    rows = list(load_rows("sample" if texts is None else texts).rows)
    random.Random(0).shuffle(rows)
    return with_spans([{"prompt": row["prompt"], "output": row["output"]} for row in rows[:count]])


def _batches(made: Setting, rows: Rows, quick: bool) -> tuple[dict[str, Batches], int]:
    """The batches of every side, and the rows' tokens."""
    size = QUICK_BATCH if quick else BATCH
    collate = SpanCollator(made.tokenizer, max_length=made.length)
    lengths = [collate([row])["input_ids"].shape[1] for row in rows]
    ordered = [rows[i] for i in sorted(range(len(rows)), key=lengths.__getitem__)]
    found = {PADDED: _dealt(collate, rows, size), GROUPED: _dealt(collate, ordered, size)}
    found[PACKED] = _dealt(SpanCollator(made.tokenizer, max_length=made.length, flatten=True), rows, size)
    return found, sum(lengths)


def _dealt(collate: SpanCollator, rows: Sequence[dict[str, Any]], size: int) -> Batches:
    return [dict(collate(rows[first : first + size])) for first in range(0, len(rows), size)]


def _trainer(made: Setting, side: str, folder: str) -> Any:
    from mta_fast.distill import MTATrainer, MTATrainingArguments
    from mta_fast.distill.students.cut import cut_layers

    student = cut_layers(made.teacher, made.student_layers)
    layers = LayerMap.proportional(made.student_layers, made.teacher.config.num_hidden_layers)
    kinds: Any = ("word", *["phrase"] * (len(layers.pairs) - 1))
    config, packed = MTAConfig(layers.pairs, kinds), side == PACKED
    arguments = MTATrainingArguments(output_dir=folder, report_to=[], max_length=made.length, padding_free=packed)
    trainer = MTATrainer(student, made.teacher, config, arguments, processing_class=made.tokenizer)
    trainer.model.train()
    return trainer


def _pass(trainer: Any, batches: Batches) -> None:
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()
        trainer.model.zero_grad()
