"""``python -m bench experiment SETUP``: the runs that are missing, then the report of those that are there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.experiment import report
from bench.experiment.arms import (
    BASE,
    BY_SIMILARITY,
    END,
    ENDS,
    POINTS,
    RIDGE,
    Arm,
    RunSettings,
    ablations,
    arms,
    remedies,
)
from bench.experiment.plan import (
    COMPARISON,
    REMEDIES,
    ROWS,
    STAGES,
    SWEEP,
    Planned,
    Results,
    Submit,
    at_once,
    attempted,
    best_rates,
    carry_out,
    comparison,
    rows,
    sweep,
)
from bench.experiment.prepare import Prepared, Sources
from bench.experiment.runs import run, trainer_of
from bench.experiment.setups import SETUPS, TEACHER, Setup
from bench.experiment.similarity import pairs_by_similarity
from bench.gpu import device_facts
from bench.report import Report, machine, texts_name
from mta_fast.choices import check_choice
from mta_fast.distill.ablation import ablation_rows
from mta_fast.distill.models import choose_device
from mta_fast.distill.training.settings import DataSettings, StudentSettings, TeacherSettings, TrainSettings
from mta_fast.errors import InputError
from mta_fast.files import write_whole
from mta_fast.layers import depth_of
from mta_fast.locks import lock_folder


class Experiment:
    """A set-up with its sources, the folder of its results, and the device of its runs."""

    def __init__(self, setup: Setup, sources: Sources, out: Path, device: str = "cpu") -> None:
        self.setup, self.sources = setup, sources
        self.prepared = Prepared(setup, sources, device)
        self.results = Results(out, setup, self.prepared.digest)
        self.arms = arms(self.prepared.full)

    def plan(self, stage: str) -> list[Planned]:
        """The runs of a stage.

        Raises:
            InputError: the sweep, which the other stages take learning rates from, is not done.
        """
        if stage == SWEEP:
            return list(sweep(self.setup, self.arms))
        if stage == COMPARISON:
            return list(comparison(self.results, self.arms))
        if stage == REMEDIES:
            return list(rows(self.results, self.arms, remedies(self.prepared.full), REMEDIES))
        return list(rows(self.results, self.arms, self.row_arms()))

    def reported(self, stages: Sequence[str]) -> dict[str, list[Planned]]:
        """The runs of the later stages, as far as they can be told."""
        if not all(self.results.read(planned) is not None for planned in self.plan(SWEEP)):
            return {COMPARISON: [], ROWS: [], REMEDIES: []}
        known = ROWS in stages or self._layers_file.is_file()
        of_rows = self.plan(ROWS) if known else []
        return {COMPARISON: self.plan(COMPARISON), ROWS: of_rows, REMEDIES: self.plan(REMEDIES)}

    def row_arms(self) -> dict[str, Arm]:
        """The paper's rows, and two of our own."""
        full = self.prepared.full
        made = ablations(ablation_rows(self._settings(), *self.prepared.depths), full)
        made[RIDGE] = Arm(RIDGE, full, start="ridge")
        made[BY_SIMILARITY] = Arm(BY_SIMILARITY, replace(full, layer_pairs=self._similar_pairs()))
        return made

    def _settings(self) -> TrainSettings:
        """What ``mta-fast ablate`` would make its rows from."""
        return TrainSettings(
            student=StudentSettings("student"),
            teacher=TeacherSettings(self.sources.teacher),
            data=DataSettings("rows.jsonl"),
            output_dir="runs",
            mta=self.prepared.full.to_dict(),
        )

    @property
    def _layers_file(self) -> Path:
        return self.results.folder / "layers-by-similarity.json"

    def _similar_pairs(self) -> Any:
        """Teacher layers most similar to the layers of the sweep's best base student; kept beside the runs."""
        if not self._layers_file.is_file():
            rate = best_rates(self.results, self.arms)[BASE]
            best = next(
                each for each in self.plan(SWEEP) if each.arm.name == BASE and each.settings.learning_rate == rate
            )
            write_whole(self._layers_file, json.dumps(pairs_by_similarity(self.prepared, self.kept(best))) + "\n")
        return json.loads(self._layers_file.read_text(encoding="utf-8"))

    def kept(self, planned: Planned) -> Path:
        """Where the student of a run is, named by all that decides the run."""
        content = json.dumps(self.results.settings(planned), sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        return self.sources.work / self.setup.name / f"{planned.name}-{digest}"

    # --- before the runs -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fill the teacher's cache, and heal a cut student; what is there stays."""
        prepared = self.prepared
        every = Arm("cache", prepared.every_layer)
        settings = RunSettings(0, 0.0, 1)
        teacher, student = prepared.teacher(), prepared.student(0)
        if depth_of(student.config) != self.setup.layers:
            raise InputError(f"student: expected {self.setup.layers} blocks, got {depth_of(student.config)}")
        for part in prepared.rows:
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(prepared, every, settings, folder, teacher=teacher, part=part, student=student)
                trainer.fill_teacher_cache()
        if self.setup.healing and not prepared.healed.is_dir():
            healing = Planned("healing", self.arms[BASE], RunSettings(0, self.setup.healing_rate, self.setup.healing))
            self.results.write(
                healing, {"error": None, **run(prepared, healing.arm, healing.settings, keep=prepared.healed)}
            )

    def do(self, planned: Planned) -> dict[str, Any]:
        """One run; those of rows and remedies leave no student behind."""
        keep = self.kept(planned) if planned.stage in (SWEEP, COMPARISON) else None
        points = {SWEEP: ENDS, COMPARISON: POINTS, ROWS: END, REMEDIES: ENDS}[planned.stage]
        norms = planned.stage == REMEDIES  # those of the sweep decide how long the longer base trains
        return run(self.prepared, planned.arm, planned.settings, points=points, keep=keep, norms=norms)


def measure(
    setup: str, dolly: Path, outside: Path, work: Path, out: Path, stages: Sequence[str], minutes: float | None,
    steps: int | None = None, teacher: str = TEACHER, jobs: int = 1, device: str = "cpu",
) -> Report:  # fmt: skip
    """Carry out stages as far as the time goes, and report what there is.

    With several jobs each is a process with its share of the processors: small models gain little from more than one.
    """
    check_choice("setup", setup, SETUPS)
    for stage in stages:
        check_choice("stage", stage, STAGES)
    for name, file in (("dolly", dolly), ("outside", outside)):
        if not file.is_file():
            raise InputError(f"--{name}: expected a JSONL file, there is none at {file}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    check_choice("device", device, ("cpu", "cuda"))
    choose_device(device)
    chosen = SETUPS[setup] if steps is None else replace(SETUPS[setup], steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        experiment = Experiment(chosen, Sources(dolly, outside, work, teacher), out, device)
        experiment.reported(stages)  # refuses runs of other settings before anything is made
        card = device_facts() if device == "cuda" else {}
        about = machine("transformers", "spacy", code=code_version(), texts=texts_name(dolly), **card)
        ready = False
        with _submitting(experiment, jobs) as submit:
            for stage in stages:
                planned = experiment.plan(stage)
                missing = any(experiment.results.read(each) is None for each in planned)
                if missing and not ready and (deadline is None or time.monotonic() < deadline):
                    experiment.prepare()
                    ready = True
                if not carry_out(experiment.results, planned, submit, deadline, about, jobs):
                    print("time is up; the same command goes on", flush=True)
                    break
        known = experiment.reported(stages)
        command = f"python -m bench experiment {setup}"
        return report.make(experiment.results, experiment.arms, known, about, command)


@contextmanager
def _submitting(experiment: Experiment, jobs: int) -> Iterator[Submit]:
    """How runs are begun: here, or each in one of several processes."""
    if jobs == 1:
        yield at_once(experiment.do)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    own = experiment.setup, experiment.sources, experiment.results.folder, experiment.prepared.device, threads
    context = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
    with ProcessPoolExecutor(jobs, context, _begin_worker, own) as pool:
        yield lambda planned: pool.submit(_work, planned)


_worker: list[Experiment] = []  # of this process, where it is one of several


def _begin_worker(setup: Setup, sources: Sources, out: Path, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker.append(Experiment(setup, sources, out, device))


def _work(planned: Planned) -> dict[str, Any]:
    return attempted(_worker[0].do, planned)


def code_version() -> str:
    """The commit of this checkout; with a plus where files differ from it."""
    call = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    commit = call(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = call(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return commit + ("+" if changed else "")
