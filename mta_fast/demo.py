"""The demo: a small teacher teaches the same student on bundled text: without MTA, with it, and with its placebo.

Everything is made on the spot: a byte-level BPE tokenizer, a GPT-2 teacher, and three students from one start that
see the same batches in the same steps. Nothing is downloaded. It has one seed and one learning rate: it shows what MTA
does, and how much of that the placebo does too, not whether MTA helps.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mta_fast.config import MTAConfig, default_granularity
from mta_fast.distill.data import load_sample
from mta_fast.distill.methods.losses import skewed_reverse_kl
from mta_fast.distill.placebo import shuffled, shuffled_positions
from mta_fast.files import RESULTS_FILE, Kind, check_target, marked, save_figure, user_path, write_whole
from mta_fast.layers import LayerMap, capture_layers
from mta_fast.locks import lock_folder
from mta_fast.loss import MTALoss, MTAOutput
from mta_fast.packages import require
from mta_fast.pictures import DPI, GREEN, LINES, frame, legend_below, new_figure, plain_ticks
from mta_fast.spans.collate import IGNORED_LABEL, SpanCollator
from mta_fast.spans.extract import SpanExtractor

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerFast

VOCABULARY, MAX_LENGTH, BATCH, HELD_OUT = 1024, 160, 8, 32
TEACHER_LAYERS, TEACHER_DIM, STUDENT_LAYERS, STUDENT_DIM, HEADS = 8, 128, 4, 64, 4
TEACHER_LR, STUDENT_LR, PROJECTION_LR = 3e-3, 2e-3, 5e-4
EVALUATE_EVERY = 10
ON_LOG_AXES = ("srkl",)
DEMO = Kind(
    "an earlier demo",
    lambda folder: (folder / RESULTS_FILE).is_file() and marked(b'"teacher_cross_entropy"')(folder / RESULTS_FILE),
    folder=True,
)
Batch = dict[str, Any]


@dataclass(frozen=True)
class DemoSettings:
    """What the command line sets."""

    out: Path = Path("mta_demo")
    teacher_steps: int = 250
    steps: int = 200
    seed: int = 42


@dataclass
class Run:
    """One student on its way; the states that a placebo is trained on are permuted by ``shuffle_seed``."""

    name: str
    student: nn.Module
    mta: MTALoss
    optimizer: torch.optim.Optimizer
    with_mta: bool
    shuffle_seed: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo, print its table, and write ``curves.png`` and ``results.json`` into ``settings.out``.

    Raises:
        MissingPackageError: a package of the extras [train] or [spacy] is not installed.
        InputError: the folder holds anything but an earlier demo, or another process is at work in it.
    """
    _require_packages()
    out = user_path(settings.out)
    check_target(out, DEMO)
    with lock_folder(out):
        return _run(settings, out)


def _run(settings: DemoSettings, out: Path) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    with Progress(console=console) as progress:
        train, held_out, tokenizer = _data(settings.seed, progress)
        teacher = _train_teacher(tokenizer, train, settings, progress)
        runs = _distil(teacher, tokenizer, train, held_out, settings, progress)
    results = _results(teacher, runs, held_out, settings) | {"minutes": (time.perf_counter() - started) / 60}
    write_whole(out / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    _draw(runs, results["teacher_cross_entropy"], out / "curves.png")
    _print_table(results, out, console)
    return results


def _require_packages() -> None:
    for package in ("transformers", "tokenizers", "rich", "matplotlib"):
        require(package, "train,spacy", "demo")


# --- data --------------------------------------------------------------------------------------------------------


class Batches:
    """Endless batches of collated rows, shuffled every epoch; the same seed gives the same batches."""

    def __init__(self, rows: Sequence[dict[str, Any]], collator: SpanCollator, seed: int) -> None:
        self.rows, self.collator, self.seed = rows, collator, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            for start in range(0, len(order) - BATCH + 1, BATCH):
                yield self.collator([self.rows[i] for i in order[start : start + BATCH]])


def _data(seed: int, progress: Progress) -> tuple[Batches, Batch, PreTrainedTokenizerFast]:
    task = progress.add_task("words and phrases of the text (spaCy)", total=None)
    sample = load_sample()
    texts = [row["prompt"] + row["output"] for row in sample]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    spans = SpanExtractor()(texts)
    columns = zip(sample, spans["word_spans"], spans["phrase_spans"], strict=True)
    rows = [dict(row) | {"word_spans": words, "phrase_spans": phrases} for row, words, phrases in columns]
    collator = SpanCollator(tokenizer, max_length=MAX_LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]
    progress.update(task, total=1, completed=1)
    return Batches(shuffled[HELD_OUT:], collator, seed), collator(shuffled[:HELD_OUT]), tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts, with one special token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end, bos_token=end)


# --- models ------------------------------------------------------------------------------------------------------


def _gpt2(tokenizer: PreTrainedTokenizerFast, layers: int, dim: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=MAX_LENGTH,
        n_layer=layers,
        n_embd=dim,
        n_head=HEADS,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **no_dropout,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _inputs(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _train_teacher(
    tokenizer: PreTrainedTokenizerFast, train: Batches, settings: DemoSettings, progress: Progress
) -> nn.Module:
    teacher = _gpt2(tokenizer, TEACHER_LAYERS, TEACHER_DIM)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=TEACHER_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TEACHER_LR, total_steps=settings.teacher_steps, pct_start=0.1
    )
    task = progress.add_task("teacher", total=settings.teacher_steps)
    for _, batch in zip(range(settings.teacher_steps), train, strict=False):
        everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        loss = _cross_entropy(teacher(**_inputs(batch)).logits, everything)
        _step(loss, teacher, optimizer)
        schedule.step()
        progress.update(task, advance=1, description=f"teacher: cross-entropy {loss.item():.2f}")
    return teacher.eval().requires_grad_(False)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy over the labels that count, logits [B, S, V], labels [B, S]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)


def _step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# --- distillation ------------------------------------------------------------------------------------------------


def _distil(
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    train: Batches,
    held_out: Batch,
    settings: DemoSettings,
    progress: Progress,
) -> list[Run]:
    """All students, step by step side by side, so that their times are taken under the same conditions."""
    layers = LayerMap.proportional(STUDENT_LAYERS, TEACHER_LAYERS)
    config = MTAConfig(layer_pairs=layers.pairs, granularity=default_granularity(len(layers.pairs)))
    start = _gpt2(tokenizer, STUDENT_LAYERS, STUDENT_DIM)
    mta = MTALoss.for_models(start, teacher, config)
    runs = [
        _make_run("SRKL", start, mta, with_mta=False),
        _make_run("SRKL + MTA", start, mta, with_mta=True),
        _make_run("SRKL + placebo", start, mta, with_mta=True, shuffle_seed=settings.seed),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, settings.steps) for run in runs]
    task = progress.add_task("students", total=settings.steps)
    for step, batch in zip(range(settings.steps), train, strict=False):
        if step % EVALUATE_EVERY == 0:
            _record(teacher, runs, held_out, step)
        for run, schedule in zip(runs, schedules, strict=True):
            begun = time.perf_counter()
            base, output = _losses(run, teacher, batch, run.with_mta, run.shuffle_seed)
            _step(base if output is None else base + output.loss, run.student, run.optimizer)
            run.step_seconds.append(time.perf_counter() - begun)
            schedule.step()
        latest = ", ".join(f"{run.name} {run.curves['srkl'][-1]:.2f}" for run in runs)
        progress.update(task, advance=1, description=f"students: held-out {latest}")
    _record(teacher, runs, held_out, settings.steps)
    return runs


def _make_run(name: str, start: nn.Module, mta: MTALoss, *, with_mta: bool, shuffle_seed: int | None = None) -> Run:
    student, loss = copy.deepcopy(start), copy.deepcopy(mta)
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr": STUDENT_LR}]
    if with_mta:
        groups.append({"params": list(loss.parameters()), "lr": PROJECTION_LR})
    return Run(name, student.train(), loss, torch.optim.AdamW(groups, weight_decay=0.01), with_mta, shuffle_seed)


def _losses(
    run: Run, teacher: nn.Module, batch: Batch, with_mta: bool, shuffle_seed: int | None = None
) -> tuple[Tensor, MTAOutput | None]:
    """The base loss, and MTA's output where asked for; to permuted states of the teacher with a seed for them."""
    config = run.mta.config
    if not with_mta:
        with torch.no_grad():
            teacher_logits = teacher(**_inputs(batch)).logits
        return skewed_reverse_kl(run.student(**_inputs(batch)).logits, teacher_logits, batch["labels"]), None
    with torch.no_grad(), capture_layers(teacher, config.teacher_layers) as teacher_hidden:
        teacher_logits = teacher(**_inputs(batch)).logits
    with capture_layers(run.student, config.student_layers) as student_hidden:
        student_logits = run.student(**_inputs(batch)).logits
    read: Mapping[int, Tensor] = teacher_hidden
    if shuffle_seed is not None:
        positions = shuffled_positions(batch["input_ids"], batch["attention_mask"], shuffle_seed)
        read = {layer: shuffled(states, positions) for layer, states in teacher_hidden.items()}
    base = skewed_reverse_kl(student_logits, teacher_logits, batch["labels"])
    return base, run.mta(student_hidden, read, batch["spans"])


@torch.no_grad()
def _record(teacher: nn.Module, runs: Sequence[Run], held_out: Batch, step: int) -> None:
    """Measure every student on the held-out rows, each against the teacher's states as they are."""
    for run in runs:
        base, output = _losses(run, teacher, held_out, with_mta=True)
        assert output is not None
        cross_entropy = _cross_entropy(run.student(**_inputs(held_out)).logits, held_out["labels"])
        measured = {"step": float(step), "srkl": base.item(), "cross_entropy": cross_entropy.item()}
        measured |= {"dsa": output.dsa.item(), "hid": output.hid.item()}
        for name, value in measured.items():
            run.curves.setdefault(name, []).append(value)


# --- results -----------------------------------------------------------------------------------------------------


def _results(teacher: nn.Module, runs: Sequence[Run], held_out: Batch, settings: DemoSettings) -> dict[str, Any]:
    base, with_mta = (run.step_seconds for run in runs[:2])
    share = statistics.median(1 - plain / full for plain, full in zip(base, with_mta, strict=True))
    with torch.no_grad():
        teacher_loss = _cross_entropy(teacher(**_inputs(held_out)).logits, held_out["labels"]).item()
    return {
        "settings": {"teacher_steps": settings.teacher_steps, "steps": settings.steps, "seed": settings.seed},
        "teacher_cross_entropy": teacher_loss,
        "runs": [
            {
                "name": run.name,
                "with_mta": run.with_mta,
                "placebo": run.shuffle_seed is not None,
                **{name: values[-1] for name, values in run.curves.items() if name != "step"},
                "median_step_seconds": statistics.median(run.step_seconds),
                "curves": run.curves,
            }
            for run in runs
        ],
        "mta_share_of_step": share,
    }


def _print_table(results: dict[str, Any], out: Path, console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"After {results['settings']['steps']} steps, on {HELD_OUT} held-out rows")
    for column in ("student", "SRKL", "cross-entropy", "dsa", "hid", "step (median)"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for run in results["runs"]:
        seconds = f"{1000 * run['median_step_seconds']:.0f} ms"
        hid = f"{run['hid']:.3f}" + ("" if run["with_mta"] else " *")
        numbers = (f"{run['srkl']:.3f}", f"{run['cross_entropy']:.3f}", f"{run['dsa']:.4f}", hid, seconds)
        table.add_row(run["name"], *numbers)
    console.print(table)
    console.print("* through the random projections of the start: SRKL alone trains none")
    base, with_mta, placebo = (run["srkl"] for run in results["runs"])
    console.print(
        f"SRKL against SRKL alone: MTA {with_mta - base:+.3f}, its placebo {placebo - base:+.3f}. The placebo "
        f"is MTA on the teacher's token states permuted within each row: the same spans and cost, but no token has its "
        f"own state. Only what MTA gains over it ({with_mta - placebo:+.3f}) can come from what the teacher says about "
        f"tokens; and with one seed, at one learning rate, this is an illustration, no evidence."
    )
    console.print(f"teacher: cross-entropy {results['teacher_cross_entropy']:.3f} on the same rows")
    console.print(f"share of MTA in the step: {100 * results['mta_share_of_step']:.0f} % (median of paired steps)")
    console.print(
        f"{results['minutes']:.1f} minutes; curves in {out / 'curves.png'}, numbers in {out / 'results.json'}"
    )


def _draw(runs: Sequence[Run], teacher_loss: float, path: Path) -> None:
    panels = {
        "srkl": "SRKL to the teacher",
        "cross_entropy": "Cross-entropy of the responses",
        "dsa": "DSA: difference of span-pair cosines",
        "hid": "Hid: distance to the teacher's states",
    }
    of_teacher = {"cross_entropy": teacher_loss}
    figure = new_figure((8, 6.4), "One seed, one learning rate: the same start, the same batches; held-out rows")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for run, (colour, style) in zip(runs, LINES, strict=False):
            axes.plot(run.curves["step"], run.curves[name], color=colour, linestyle=style, label=run.name, linewidth=2)
        if name in of_teacher:
            axes.axhline(of_teacher[name], color=GREEN, linewidth=1.2, label="the teacher")
        axes.set_xlabel("step")
        if name in ON_LOG_AXES:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        axes.set_ylim(bottom=0 if name in ("dsa", "hid") else None)
        frame(axes, title)
    legend_below(figure, columns=4)
    save_figure(figure, path, dpi=DPI)
