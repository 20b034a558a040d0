"""Where the projections of Hid start: 1 - cos on text that no start has seen, for three pairs of models.

Teacher and text are real, rows cut to 128 tokens; ridge is fitted on some rows, with the weights that Hid has, and
every start is judged on others. The students: an evenly cut one, one whose blocks were dropped with more care, and a
fresh narrow one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import Entry, Report, Section, entry, machine, markdown_table, texts_name
from bench.side import Rows, Setting, setting, small_setting
from bench.step import with_spans
from mta_fast import LayerMap, MTAConfig, MTALoss, SpanCollator, capture_layers
from mta_fast.config import default_granularity
from mta_fast.distill.data import load_rows
from mta_fast.distill.students.cut import cut_layers
from mta_fast.distill.students.fresh import Sizes, fresh_config, fresh_student
from mta_fast.errors import InputError
from mta_fast.inputs import model_inputs
from mta_fast.projections import RidgeFit

LENGTH, BATCH = 128, 8
FITTED, HELD_OUT = (4, 16, 64), 16  # rows
USUAL = 64  # of them, as MTATrainer reads
STRENGTHS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
FRESH_LAYERS, FRESH_WIDTH = 8, 160
STARTS = ("default", "identity", *(f"ridge {strength:g}" for strength in STRENGTHS))
Inputs = Mapping[str, Any]  # the arguments of MTALoss.forward
STARTED, SIZED = "Hid of held-out text, by start", "How many rows ridge reads"
TEXT = (
    "1 - cos of projected student states and teacher states, weighted as Hid is, on {held} rows that ridge, fitted on "
    "{fitted} others, has not seen."
)
TEXT_SIZED = "The same with ridge on fewer and more rows, mean over the layer pairs."


def measure(texts: Path | None = None, quick: bool = False) -> Report:
    """Every start at every layer pair of every pair of models."""
    made = small_setting() if quick else setting()
    counts: Sequence[int] = (2, 4) if quick else FITTED
    held = 4 if quick else HELD_OUT
    rows = [dict(row) for row in load_rows("sample" if texts is None else texts).rows[: held + counts[-1]]]
    counts = [count for count in counts if count <= len(rows) - held]
    if not counts:
        raise InputError(f"texts: expected at least {held + FITTED[0]} rows, got {len(rows)}")
    usual = max(count for count in counts if count <= USUAL)
    ends = (0, held, *(held + count for count in counts))
    collate = SpanCollator(made.tokenizer, max_length=min(LENGTH, made.length))
    batches = [[collate(part) for part in _batches(with_spans(rows[a:b]))] for a, b in itertools.pairwise(ends)]
    students = list(_students(made))
    depth = made.teacher.config.num_hidden_layers
    layers = {name: LayerMap.proportional(one.config.num_hidden_layers, depth).pairs for name, one in students}
    wanted = sorted({other for pairs in layers.values() for _, other in pairs})
    taught = [[_states(made.teacher, wanted, batch) for batch in part] for part in batches]
    found: dict[tuple[str, str, int], list[float]] = {}
    for name, student in students:
        print(name, flush=True)
        torch.manual_seed(0)  # of the projections
        config = MTAConfig(layers[name], default_granularity(len(layers[name])), lambda_dsa=0)
        loss = MTALoss.for_models(student, made.teacher, config)
        inputs = [
            [
                {"student_hidden": _states(student, config.student_layers, batch), "spans": batch["spans"]}
                | {"teacher_hidden": states}
                for batch, states in zip(*part, strict=True)
            ]
            for part in zip(batches, taught, strict=True)
        ]
        found |= {(name, *key): values for key, values in _judged(loss, inputs[0], inputs[1:], counts)}
    entries = [
        entry(f"{name}, {own} <- {other}, {start}", [found[name, start, usual][i]], "")
        for name, pairs in layers.items()
        for i, (own, other) in enumerate(pairs)
        for start in STARTS
    ]
    sized = [
        entry(f"{name}, {start}, {count} rows", [sum(values) / len(values)], "")
        for (name, start, count), values in found.items()
        if start.startswith("ridge")
    ]
    sections = [
        Section(STARTED, entries, TEXT.format(held=held, fitted=usual), _by_start(entries)),
        Section(SIZED, sized, TEXT_SIZED, _by_rows(sized, list(layers), counts)),
    ]
    about = {"teacher": made.name.partition(" <- ")[0], "rows": f"cut at {collate.max_length} tokens"}
    facts = machine("transformers", "spacy", **about, texts=texts_name(texts))
    return Report("mta-fast bench projections", facts, sections)


def _students(made: Setting) -> Iterator[tuple[str, Any]]:
    """The students, and what they are called."""
    teacher, depth = made.teacher, made.teacher.config.num_hidden_layers
    yield (f"{made.student_layers} of {depth} layers, evenly", cut_layers(teacher, made.student_layers))
    dropped = range(2 * depth // 5, 4 * depth // 5, 2)
    kept = [block for block in range(depth) if block not in dropped]
    yield (f"{len(kept)} of {depth} layers, without {dropped[0]} to {dropped[-1]}", cut_layers(teacher, kept))
    sizes = Sizes(min(FRESH_LAYERS, depth), min(FRESH_WIDTH, teacher.config.hidden_size // 2))
    yield (
        f"fresh, {sizes.layers} layers of width {sizes.width}",
        fresh_student(fresh_config(teacher.config, sizes), seed=0),
    )


@torch.no_grad()
def _judged(
    loss: MTALoss, held: Sequence[Inputs], parts: Sequence[Sequence[Inputs]], counts: Sequence[int]
) -> Iterator[tuple[tuple[str, int], list[float]]]:
    """Hid of each layer pair on what is held out, of every start; ridge fitted on one part, on two and so on."""
    default = _hid(loss, held)
    for projection in loss.projections:
        projection.start_at_identity()  # type: ignore[operator]  # ModuleList knows modules alone
    identity = _hid(loss, held)
    fit = RidgeFit(loss.projections)  # type: ignore[arg-type]  # likewise
    for part, count in zip(parts, counts, strict=True):
        for batch in part:
            for i, pair in enumerate(loss(**batch, explain=True).layer_pairs):
                fit.add(i, pair.compared, pair.hid_weights)
        yield ("default", count), default
        yield ("identity", count), identity
        for strength in STRENGTHS:
            fit.finish(strength)
            yield (f"ridge {strength:g}", count), _hid(loss, held)


def _batches(rows: Rows) -> Iterator[Rows]:
    return (rows[first : first + BATCH] for first in range(0, len(rows), BATCH))


@torch.no_grad()
def _states(model: Any, layers: Sequence[int], batch: Mapping[str, Any]) -> dict[int, Tensor]:
    with capture_layers(model.eval(), layers) as hidden:
        model(**model_inputs(model, batch), use_cache=False, logits_to_keep=1)
    return hidden


def _hid(loss: MTALoss, batches: Sequence[Inputs]) -> list[float]:
    """Of each layer pair, over all batches."""
    terms = [loss(**batch).per_layer for batch in batches]
    sums = [sum(values) for values in zip(*((each.hid_numerator, each.hid_denominator) for each in terms), strict=True)]
    values: list[float] = (sums[0] / sums[1]).tolist()
    return values


def _by_start(entries: Sequence[Entry]) -> list[str]:
    """A line for each layer pair, a column for each start."""
    lines: dict[str, list[str]] = {}
    for each in entries:
        lines.setdefault(each.what.rpartition(", ")[0], []).append(_cell(each))
    pairs = [line.rpartition(", ") for line in lines]
    return markdown_table(
        ["student", "layers", *STARTS],
        [[name, place, *cells] for (name, _, place), cells in zip(pairs, lines.values(), strict=True)],
    )


def _by_rows(entries: Sequence[Entry], names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A line for each student and number of rows, a column for each strength."""
    cells = {each.what: _cell(each) for each in entries}
    ridges = [start for start in STARTS if start.startswith("ridge")]
    lines = [
        [name, count, *(cells[f"{name}, {start}, {count} rows"] for start in ridges)]
        for name in names
        for count in counts
    ]
    return markdown_table(["student", "rows", *ridges], lines)


def _cell(each: Entry) -> str:
    assert each.median is not None
    return f"{each.median:.3f}"
