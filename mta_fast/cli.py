"""The commands: mta-fast doctor | demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Multi-Granular Trajectory Alignment: a span-level distillation loss.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def doctor() -> None:
    """Versions, devices, backends and packages, and why something is missing."""
    from mta_fast.doctor import report

    typer.echo(report())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("mta_demo"),
    teacher_steps: Annotated[int, typer.Option(min=1, help="Training steps of the teacher.")] = 250,
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps of each student.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 42,
) -> None:
    """Train a small teacher on bundled text, then distil it twice: without MTA and with it."""
    from mta_fast.demo import DemoSettings, run_demo

    run_demo(DemoSettings(out=out, teacher_steps=teacher_steps, steps=steps, seed=seed))
