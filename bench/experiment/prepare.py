"""What every run of a set-up shares: rows with their spans, the teacher's states on disk, tokenizer and students."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.experiment.setups import (
    EVALUATED,
    HELD_OUT,
    OUTSIDE,
    OUTSIDE_LENGTH,
    SELECT,
    TEACHER,
    TRAIN,
    Setup,
)
from mta_fast import LayerMap, MTAConfig, SpanCollator
from mta_fast.config import default_granularity
from mta_fast.distill.data import LoadedRows, PromptRow, drop_long_rows, load_rows
from mta_fast.distill.models import load_config, load_model, load_tokenizer, model_depth
from mta_fast.distill.responses.evaluation import load_references
from mta_fast.distill.students.cut import cut_layers
from mta_fast.distill.students.fresh import Sizes, fresh_config, fresh_student
from mta_fast.distill.students.greedy import greedy_layers
from mta_fast.distill.students.vocabulary import numbers_of, teacher_ids, trim_tokenizer
from mta_fast.distill.training.caching import TeacherCache
from mta_fast.errors import InputError
from mta_fast.spans.cache import SpanCache
from mta_fast.spans.extract import SpanExtractor

Rows = list[dict[str, Any]]
BATCH = 16  # rows, where students are measured
CUT_ROWS = 8  # that blocks are chosen by


@dataclass(frozen=True)
class Sources:
    """Where things come from, and a folder for what takes long to make.

    Attributes:
        dolly: rows that are trained on, chosen by, and held out; outside: rows of another origin.
        work: made where it is missing; holds spans, the teacher's states and students.
        teacher: as ``load_model`` takes it.
    """

    dolly: Path
    outside: Path
    work: Path
    teacher: str = TEACHER


class Prepared:
    """A set-up's rows and models; each is made when it is first asked for.

    Attributes:
        device: "cpu" or "cuda": where students are trained and measured.
    """

    def __init__(self, setup: Setup, sources: Sources, device: str = "cpu") -> None:
        self.setup, self.sources, self.device = setup, sources, device
        self.teacher_states: dict[str, Any] = {}  # of the sets that students are measured on; filled by runs

    @cached_property
    def teacher_tokenizer(self) -> Any:
        """The teacher's."""
        return load_tokenizer(self.sources.teacher)

    @cached_property
    def tokenizer(self) -> Any:
        """The student's: a fresh one's knows the tokens that are most common in the training rows."""
        if self.setup.kind != "fresh":
            return self.teacher_tokenizer
        texts = [row["prompt"] + row["output"] for row in self.rows[TRAIN]]
        return trim_tokenizer(self.teacher_tokenizer, texts, size=self.setup.vocabulary)

    @cached_property
    def teacher_ids(self) -> Any:
        """[V] the teacher's id of each of the student's tokens; None where they are the same."""
        if self.setup.kind != "fresh":
            return None
        return teacher_ids(self.tokenizer, self.teacher_tokenizer)

    @cached_property
    def rows(self) -> Mapping[str, Rows]:
        """Each set's rows with their spans; those of another origin with their first reference."""
        setup = self.setup
        known: LoadedRows[PromptRow] = load_rows(self.sources.dolly)
        known = drop_long_rows(
            known, self.teacher_tokenizer, max_length=setup.max_length, max_prompt_length=setup.max_prompt
        )
        rows = [dict(row) for row in known.rows]
        random.Random(0).shuffle(rows)
        first = setup.selected + setup.held
        if len(rows) <= first:
            raise InputError(f"{self.sources.dolly}: expected more than {first} rows, got {len(rows)}")
        outside: Rows = [
            {"prompt": row["prompt"], "output": row["references"][0]}
            for row in load_references(self.sources.outside).rows
        ]
        parts: dict[str, Rows] = {
            TRAIN: rows[first:][: setup.most_rows],
            SELECT: rows[: setup.selected],
            HELD_OUT: rows[setup.selected : first],
            OUTSIDE: outside[: setup.most_rows],
        }
        return {name: self._with_spans(part) for name, part in parts.items()}

    @cached_property
    def digest(self) -> str:
        """Of all rows and the teacher's name: what decides a run beside its set-up."""
        content = json.dumps([self.sources.teacher, self.rows], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def _with_spans(self, rows: Rows) -> Rows:
        cache = SpanCache(SpanExtractor(), self.sources.work / "spans")
        spans = cache([row["prompt"] + row["output"] for row in rows])
        return [row | {name: column[i] for name, column in spans.items()} for i, row in enumerate(rows)]

    def length(self, part: str) -> int:
        """Tokens that a set's rows are cut at."""
        return OUTSIDE_LENGTH if part == OUTSIDE else self.setup.max_length

    @cached_property
    def depths(self) -> tuple[int, int]:
        """Blocks of student and teacher."""
        return self.setup.layers, model_depth(self.sources.teacher)

    @cached_property
    def full(self) -> MTAConfig:
        """The paper's choice of layers and weights: half, three quarters and all of the student's depth."""
        pairs = LayerMap.proportional(*self.depths).pairs
        return MTAConfig(pairs, default_granularity(len(pairs)))

    @cached_property
    def every_layer(self) -> MTAConfig:
        """What the teacher's cache is made for: each of its layers, so that every arm finds its own."""
        return MTAConfig(tuple((1, layer) for layer in range(1, self.depths[1] + 1)), ("phrase",))

    @property
    def cache(self) -> TeacherCache:
        """The teacher's states, as ``mta-fast teach`` keeps them."""
        return TeacherCache(self.sources.work / "teacher")

    def student(self, seed: int) -> Any:
        """Where a run begins: a fresh student of that seed, or the healed one, the same for every seed."""
        if self.setup.kind == "fresh":
            sizes = Sizes(self.setup.layers, self.setup.width, self.setup.heads)
            numbers = numbers_of(self.tokenizer, self.teacher_tokenizer)
            return fresh_student(fresh_config(load_config(self.sources.teacher), sizes, numbers), seed)
        return load_model(str(self.healed)) if self.healed.is_dir() else self.cut

    @property
    def healed(self) -> Path:
        """The folder of the healed student; named by what it was made of."""
        setup = self.setup
        made_of = json.dumps([self.digest, setup.layers, setup.healing, setup.healing_rate, setup.tokens])
        digest = hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()
        return self.sources.work / setup.name / f"healed-{digest}"

    @cached_property
    def cut(self) -> Any:
        """Blocks of the teacher that a greedy search on training rows keeps."""
        teacher, rows = self.teacher(), self.rows[TRAIN][:CUT_ROWS]
        return cut_layers(teacher, greedy_layers(teacher, self.teacher_tokenizer, rows, self.setup.layers))

    def teacher(self) -> Any:
        """The model."""
        return load_model(self.sources.teacher)

    @cached_property
    def batches(self) -> Mapping[str, Sequence[dict[str, Any]]]:
        """The sets that students are measured on, in batches of rows of like length."""
        made = {}
        for part in EVALUATED:
            collate = SpanCollator(self.tokenizer, max_length=self.length(part), teacher_ids=self.teacher_ids)
            rows = sorted(self.rows[part], key=lambda row: len(row["prompt"]) + len(row["output"]))
            made[part] = [dict(collate(rows[first : first + BATCH])) for first in range(0, len(rows), BATCH)]
        return made
