"""What spans of texts generated during training cost a step: ``python -m bench on-policy``.

A step is here what lies between generated texts and MTA's loss: tokenising, the spans, the teacher's pass, and their
alignment. The spans are known before (what is left is the floor), parsed in the step, parsed by a ParserPool while the
teacher runs, or parsed in the public scripts' way, which start four spaCy processes in each step. What holds the step
up is timed within it, above the same parts of the step whose spans are known; that the teacher runs slower while its
cores parse shows in the whole step's time alone.

The teacher is SmolLM2-135M in float32 on the CPU, on one thread (a core stays free) and on all; and a wait of a given
time in its place, which leaves the CPU alone as a GPU does.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Effort, Times, alternate
from bench.plots import Panel, dots
from bench.report import (
    Entry,
    Report,
    Section,
    entry,
    machine,
    markdown_table,
    milliseconds,
    nothing,
    number,
    texts_name,
)  # fmt: skip
from bench.side import Setting, setting, small_setting
from bench.step import full_rows, with_spans
from mta_fast import SpanCollator, SpanExtractor
from mta_fast.errors import MissingPackageError
from mta_fast.spans.extract import DEFAULT_MODEL, load_pipeline
from mta_fast.spans.lazy import pending_batch
from mta_fast.spans.parser_pool import ParserPool
from mta_fast.spans.rules import phrases, words

KNOWN, IN_STEP, PUBLIC = "spans known", "parsed in the step", "four new spaCy processes a step"
PUBLIC_PROCESSES = 4
POOLS = (1, 2)  # processes
WAITS = (0.05, 0.1, 0.2, 0.4)  # seconds that a teacher on a device takes
ROUNDS = 6
ENOUGH = 0.4  # seconds in which one process parses a batch
SHARE = "<= 0.1"  # that a pool may leave of the stall of parsing in the step, where a core and the time are there
Rows = list[dict[str, Any]]


def measure(rounds: int | None = None, texts: Path | None = None, quick: bool = False) -> Report:
    """Every way to the spans, with every teacher."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the public way forks
    command = "mta-fast bench on-policy"
    try:
        made = small_setting() if quick else setting()
    except MissingPackageError as error:
        return nothing(command, error)
    rows, effort = generated_rows(made, texts), Effort(rounds or (2 if quick else ROUNDS))
    with ExitStack() as stack:
        pools = {_pool(n): stack.enter_context(ParserPool(SpanExtractor(), n_process=n)) for n in POOLS}
        for pool in pools.values():
            pool.start()
        with_teachers = teachers(made, WAITS[:1] if quick else WAITS)
        taken = [run(made, teacher, rows, pools, effort) for teacher in with_teachers]
    about = {"teacher": made.name.partition(" <- ")[0], "batch": f"B={made.batch} S={made.length}"}
    samples = {t.teacher.name: {"whole": t.times, "held up": t.held_up} for t in taken}
    stalls, whole = [e for t in taken for e in t.stalls()], [e for t in taken for e in t.whole()]
    left = [e for t in taken for e in t.left("" if quick else SHARE)]
    sections = [
        Section("Stall", stalls, STALL_TEXT, pivot(stalls)),
        Section("What a pool leaves of it", left, LEFT_TEXT),
        Section("Whole step", whole, STEP_TEXT, pivot(whole)),
    ]
    facts = machine("transformers", "spacy", **about, texts=texts_name(texts))
    return Report(command, facts, sections, samples, {"": partial(draw, whole)})


STALL_TEXT = "Medians. What the step spends outside of the teacher's pass, above the same with the spans known before."
LEFT_TEXT = "The stall with a pool / the stall of parsing in the step. A target where a core is free and time enough."
STEP_TEXT = (
    f"Medians; {KNOWN}: the time, others: over it. A teacher that takes all cores shares them with the pool and loses "
    f"the time that the pool saves: there it is no gain."
)


def _pool(n_process: int) -> str:
    return f"a pool of {n_process}"


def generated_rows(made: Setting, texts: Path | None) -> Rows:
    """Rows as generation leaves them, of exactly ``length`` tokens, with their spans for the floor."""
    rows: Rows = []
    for row in full_rows(made, texts):
        text, options = row["prompt"] + row["output"], {"truncation": True, "max_length": made.length}
        end = made.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"][-1][1]
        prompt = row["prompt"][:end]
        rows.append({"prompt": prompt, "output": text[len(prompt) : end]})
    return with_spans(rows[: len(rows) // made.batch * made.batch])


@dataclass(frozen=True, eq=False)
class Teacher:
    """What runs while a pool parses."""

    name: str
    threads: int  # of torch
    run: Callable[[Tensor, Tensor], Any]  # called with input_ids and attention_mask
    judged: bool  # whether it leaves a core and the time to parse


def teachers(made: Setting, waits: Sequence[float]) -> list[Teacher]:
    """The model on one thread and on all, and waits."""

    @torch.no_grad()
    def run(ids: Tensor, mask: Tensor) -> None:
        made.teacher(input_ids=ids, attention_mask=mask, use_cache=False)

    cores = torch.get_num_threads()
    models = [Teacher(f"{n} of {cores} threads", n, run, n < cores) for n in dict.fromkeys((1, cores))]
    return models + [
        Teacher(f"a device, {1e3 * wait:.0f} ms", cores, lambda *_, wait=wait: time.sleep(wait), wait >= ENOUGH)
        for wait in waits
    ]


Prepared = tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]  # a batch, and its spans when they are needed


@dataclass
class Step:
    """One way to the spans; a call is a step."""

    teacher: Teacher
    batches: Iterator[Rows]
    prepare: Callable[[Rows], Prepared]
    held_up: list[float] = field(default_factory=list)  # seconds of each call outside of the teacher's pass
    keeps_its_own = True  # of the harness: once in each round

    def __call__(self) -> list[Tensor]:
        """The index tensors of the batch's spans."""
        rows, begun = next(self.batches), time.perf_counter()
        batch, spans = self.prepare(rows)
        prepared = time.perf_counter()
        self.teacher.run(batch["input_ids"], batch["attention_mask"])
        taught = time.perf_counter()
        found = spans()
        self.held_up.append(prepared - begun + time.perf_counter() - taught)
        return [tensor for kind in found.values() for tensor in kind.index_tensors()]


@dataclass(frozen=True)
class Taken:
    """Seconds of each way's steps with a teacher, whole and outside of the teacher's pass, round by round."""

    teacher: Teacher
    times: Times
    held_up: dict[str, list[float]]

    def stall(self, way: str) -> list[float]:
        """Seconds outside of the teacher's pass above those with the spans known."""
        return [a - b for a, b in zip(self.held_up[way], self.held_up[KNOWN], strict=True)]

    def stalls(self) -> list[Entry]:
        """Of each way."""
        return [milliseconds(f"{self.teacher.name}: {way}", self.stall(way)) for way in self.held_up if way != KNOWN]

    def left(self, share: str) -> list[Entry]:
        """Of each pool, over parsing in the step."""
        made, target = [], share if self.teacher.judged else ""
        for pool in map(_pool, POOLS):
            ratios = [a / b for a, b in zip(self.stall(pool), self.stall(IN_STEP), strict=True)]
            made.append(entry(f"{self.teacher.name}: {pool}", ratios, target=target))
        return made

    def whole(self) -> list[Entry]:
        """The time with the spans known, and what the other ways take over that."""
        name, ways = self.teacher.name, [way for way in self.held_up if way != KNOWN]
        known = milliseconds(f"{name}: {KNOWN}", self.times[KNOWN])
        return [known, *(entry(f"{name}: {way}", self.times.ratio(way, KNOWN)) for way in ways)]


def run(made: Setting, teacher: Teacher, rows: Rows, pools: Mapping[str, ParserPool], effort: Effort) -> Taken:
    """Time the ways in turn, each round on another batch, after the spans of the first were compared."""
    batches = [rows[first : first + made.batch] for first in range(0, len(rows), made.batch)]
    steps = {way: Step(teacher, itertools.cycle(batches), prepare) for way, prepare in ways(made, pools).items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(teacher.threads)
    try:
        times = alternate(steps, effort, _check, collect=True)
    finally:
        torch.set_num_threads(threads)
    return Taken(teacher, times, {way: step.held_up[1:] for way, step in steps.items()})


def ways(made: Setting, pools: Mapping[str, ParserPool]) -> dict[str, Callable[[Rows], Prepared]]:
    """From rows to a batch and its spans."""
    collator = SpanCollator(made.tokenizer, max_length=made.length)
    extractor, pipeline = SpanExtractor(), load_pipeline(DEFAULT_MODEL)

    def known(rows: Rows) -> Prepared:
        batch = collator(rows)
        return batch, lambda: batch["spans"]

    def parsed(extract: Callable[[Sequence[str]], Any], rows: Rows) -> Prepared:
        tokenized = collator.tokenize(rows)
        spans = collator.align(tokenized, extract(tokenized.texts))["spans"]
        return tokenized.batch, lambda: spans

    def pooled(pool: ParserPool, rows: Rows) -> Prepared:
        batch = pending_batch(pool, collator, rows)
        return batch, batch["spans"].result

    def public(texts: Sequence[str]) -> dict[str, Any]:
        docs = list(pipeline.pipe(texts, n_process=PUBLIC_PROCESSES))
        return {"word_spans": [words(doc) for doc in docs], "phrase_spans": [phrases(doc) for doc in docs]}

    return {
        KNOWN: known,
        IN_STEP: partial(parsed, extractor),
        **{name: partial(pooled, pool) for name, pool in pools.items()},
        PUBLIC: partial(parsed, public),
    }


def _check(made: Mapping[str, list[Tensor]]) -> None:
    for way, tensors in made.items():
        if not all(map(torch.equal, tensors, made[KNOWN])):
            sys.exit(f"bench: on-policy, {way}: expected the spans known before, got others; nothing timed")


def pivot(entries: Sequence[Entry]) -> list[str]:
    """A line a teacher, a column a way."""
    cells: dict[str, dict[str, str]] = {}
    for each in entries:
        teacher, _, way = each.what.partition(": ")
        cells.setdefault(teacher, {"teacher": teacher})[way] = number(each.median, each.unit)
    lines = [list(line.values()) for line in cells.values()]
    return markdown_table(list(next(iter(cells.values()))), lines)


def draw(entries: Sequence[Entry], path: Path) -> None:
    """The whole step of each way over that with known spans, a line a teacher."""
    points = [(*each.what.partition(": ")[::2], each) for each in entries if each.unit == "x"]
    panel = Panel("Tokenising, spans and the teacher's pass", f"time / time with {KNOWN}", points)
    dots([panel], path, "Spans of texts generated during training")
