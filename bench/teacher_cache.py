"""What stored teacher states change: gradients of a step against those with the teacher itself, and bytes a token.

The pair is that of ``bench step``; real rows, cut to 128 tokens. A student at its start, and one that a few steps have
trained towards the teacher: what is near is harder to tell apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import Entry, Report, Section, entry, machine, markdown_table, texts_name
from bench.side import Rows, Setting, setting, small_setting
from bench.step import with_spans
from mta_fast import LayerMap, MTAConfig, MTALoss
from mta_fast.config import default_granularity
from mta_fast.distill.data import load_rows

ROWS, LENGTH, TRAINED_STEPS = 4, 128, 10
TERMS = {"dsa": "DSA", "hid": "Hid", "base": "SRKL"}
DTYPES = ("int8", "bfloat16", "float32")
TARGETS = {"dsa": "<= 0.005", "hid": "<= 0.004", "base": "<= 0.005"}
EXACT = "<= 1e-05"  # of SRKL from a float32 state
TEXT = "Norm of the difference to the gradient with the teacher itself, over that one's norm; of the student's weights."


def measure(texts: Path | None = None, quick: bool = False) -> Report:
    """The error of every dtype, for both students, and the size of what is stored."""
    from mta_fast.distill.students.cut import cut_layers

    made = small_setting() if quick else setting()
    found_rows = load_rows("sample" if texts is None else texts).rows[: 16 * ROWS]
    short = sorted(found_rows, key=lambda row: len(row["prompt"]))[:ROWS]  # their responses are not cut off
    rows = with_spans([dict(row) for row in short])
    layers = LayerMap.proportional(made.student_layers, made.teacher.config.num_hidden_layers)
    student = cut_layers(made.teacher, made.student_layers)
    loss = MTALoss.for_models(student, made.teacher, MTAConfig(layers.pairs, default_granularity(len(layers))))
    found: dict[tuple[str, str, str], float] = {}
    sizes: list[Entry] = []
    with tempfile.TemporaryDirectory() as folder:
        live = _trainer(made, student, loss, rows, Path(folder))
        for dtype in DTYPES:
            sizes.append(_fill(made, student, loss, rows, Path(folder), dtype))
        steps = 2 if quick else TRAINED_STEPS
        for state in ("at its start", f"after {steps} steps"):
            if state != "at its start":
                live.train()
            expected = _gradients(live)
            print(f"gradients of a student {state}", flush=True)
            for dtype in DTYPES:
                cached = _gradients(_trainer(made, student, loss, rows, Path(folder), dtype))
                found |= {(state, dtype, term): _error(cached[term], expected[term]) for term in TERMS}
    entries = [
        entry(f"{TERMS[term]}, {dtype}, student {state}", [value], "", _target(state, dtype, term))
        for (state, dtype, term), value in found.items()
    ]
    about = {"pair": made.name, "rows": f"{len(rows)} of up to {LENGTH} tokens"}
    sections = [
        Section("Gradients with the teacher on disk", entries, TEXT, _table(entries)),
        Section("Size on disk", sizes, "Layers of MTA, their importance and the state before the LM head."),
    ]
    facts = machine("transformers", "spacy", **about, texts=texts_name(texts))
    return Report("mta-fast bench cache", facts, sections)


def _trainer(made: Setting, student: Any, loss: MTALoss, rows: Rows, folder: Path, dtype: str | None = None) -> Any:
    """With the teacher itself, or with its states from the cache of a dtype alone."""
    from mta_fast.distill import MTATrainer, MTATrainingArguments
    from mta_fast.distill.training.caching import TeacherCache

    arguments = MTATrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2 if made.length < LENGTH else TRAINED_STEPS,
        per_device_train_batch_size=len(rows) // 2,
        learning_rate=1e-4,
        max_length=LENGTH,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    cache = None if dtype is None else TeacherCache(folder / dtype, dtype)
    stored = cache is not None and (folder / str(dtype) / "teacher.json").is_file()
    teacher = None if stored else made.teacher
    return MTATrainer(
        student, teacher, loss, arguments, processing_class=made.tokenizer, teacher_cache=cache, train_dataset=rows
    )


def _fill(made: Setting, student: Any, loss: MTALoss, rows: Rows, folder: Path, dtype: str) -> Entry:
    """The bytes a token of what was written."""
    trainer = _trainer(made, student, loss, rows, folder, dtype)
    trainer.fill_teacher_cache()
    written = sum(path.stat().st_size for path in (folder / dtype).glob("rows-*"))
    tokens = int(trainer.data_collator(rows)["attention_mask"].sum())
    return entry(f"{dtype}: bytes a token", [written / tokens], "B")


def _gradients(trainer: Any) -> Mapping[str, Tensor]:
    """Of each term on all of the student's weights, over the rows."""
    parameters = [p for p in trainer._module.student.parameters() if p.requires_grad]
    trainer.model.train()
    trainer._totals = None  # of its last step: what this batch's own sums are not divided by
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    output = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
    made = {}
    for term in TERMS:
        gradients = torch.autograd.grad(getattr(output, term), parameters, retain_graph=True, allow_unused=True)
        made[term] = torch.cat([g.flatten() for g in gradients if g is not None])
    return made


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _target(state: str, dtype: str, term: str) -> str:
    if state != "at its start":
        return ""
    if dtype == "float32":
        return EXACT if term == "base" else ""
    return TARGETS[term] if dtype == "int8" else ""


def _table(entries: Sequence[Entry]) -> list[str]:
    """A line for each dtype and student, a column for each term."""
    cells = {each.what: each for each in entries}
    lines = []
    for what in cells:
        term, dtype, student = what.split(", ")
        if term == "DSA":
            row = [cells[f"{name}, {dtype}, {student}"] for name in TERMS.values()]
            lines.append([dtype, student, *(_cell(each) for each in row)])
    return markdown_table(["stored as", "", *TERMS.values()], lines)


def _cell(each: Entry) -> str:
    assert each.median is not None
    return f"{each.median:.1e}" + (f" ({each.target}: {each.verdict})" if each.target else "")
