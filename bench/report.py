"""What every benchmark prints and writes: entries with their target and spread, and the machine.

``publish`` is the one way out: OUT.json (everything, the samples too), OUT.csv (an entry a line), OUT.md (tables) and
OUT.png. The JSON calls entries "rows", as reports always have.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import operator
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mta_fast import __version__
from mta_fast._extension import build_info, why_missing
from mta_fast.files import Kind, atomic_file, check_target, marked, user_path, write_whole


@dataclass(frozen=True)
class Entry:
    """One figure, what it must reach, and the spread of the rounds."""

    what: str
    unit: str
    target: str  # such as ">= 2.9"; empty where there is none
    median: float | None  # over the rounds; None where nothing was measured, and ``note`` says why
    p10: float | None
    p90: float | None
    rounds: int
    reached: bool | None  # None where there is nothing to judge
    note: str = ""

    @property
    def verdict(self) -> str:
        """yes, NO, or - where there is nothing to judge."""
        return {True: "yes", False: "NO", None: "-"}[self.reached]

    @property
    def cell(self) -> str:
        """The figure with its target in one cell of a summary."""
        if self.median is None:
            return self.note
        return number(self.median, self.unit) + (f" ({self.target}: {self.verdict})" if self.target else "")


RELATIONS: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def entry(what: str, values: Sequence[float], unit: str = "x", target: str = "", note: str = "") -> Entry:
    """An entry from the rounds' values; ``target`` is a relation and a number, such as "< 1"."""
    p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
    relation, _, limit = target.partition(" ")
    reached = RELATIONS[relation](median, float(limit)) if target else None
    return Entry(what, unit, target, median, p10, p90, len(values), reached, note)


def milliseconds(what: str, seconds: Sequence[float], target: str = "") -> Entry:
    """A time."""
    return entry(what, [1e3 * value for value in seconds], "ms", target)


def skipped(what: str, why: object, target: str = "") -> Entry:
    """An entry without a figure, and why."""
    return Entry(what, "", target, None, None, None, 0, None, f"skipped: {why}")


@dataclass(frozen=True)
class Section:
    """One table of a report."""

    title: str  # names the table; ``bench.docs`` finds it by this name
    entries: Sequence[Entry]
    text: str = ""  # what the figures are, above the table
    table: Sequence[str] = ()  # lines to print instead of one line an entry; they may show figures of others


@dataclass(frozen=True)
class Report:
    """What one benchmark found."""

    command: str  # how it is run
    about: Mapping[str, Any]  # machine, versions, data
    sections: Sequence[Section]
    samples: Mapping[str, Any] = field(default_factory=dict)  # the single measurements, by shape and side
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)  # PNG files by the ending of their name
    content: Mapping[str, Any] = field(default_factory=dict)  # OUT.json where its figures are no entries
    text: str = ""  # OUT.md likewise

    @property
    def missed(self) -> bool:
        """Whether an entry misses its target."""
        return any(each.reached is False for section in self.sections for each in section.entries)

    def markdown(self) -> str:
        """As OUT.md holds it."""
        if self.text:
            return self.text
        lines = [f"`{self.command}`", *(line for section in self.sections for line in _lines(section))]
        about = markdown_table(list(self.about), [list(self.about.values())])
        return "\n".join([*lines, "", "## Machine", "", *about]) + "\n"

    def json(self) -> str:
        """As OUT.json holds it."""
        sections = [{"title": s.title, "rows": [asdict(each) for each in s.entries]} for s in self.sections]
        named = {"command": self.command, "machine": dict(self.about), "sections": sections, "samples": self.samples}
        return json.dumps(self.content or named, indent=1) + "\n"


def nothing(command: str, why: object) -> Report:
    """The report of a benchmark that can't run here."""
    return Report(command, machine(), [Section("Skipped", [skipped("all", why)])])


def markdown_table(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines)]


def number(value: float | None, unit: str = "") -> str:
    """Three digits, or two after the point."""
    if value is None:
        return "-"
    digits = 2 if abs(value) < 100 else 0
    if 0 < abs(value) < 0.095:
        digits = 4
    return f"{value:,.{digits}f} {unit}".rstrip()


def _lines(section: Section) -> list[str]:
    if not section.entries and not section.table:
        return []
    made = []
    for each in section.entries:
        note = f" ({each.note})" if each.note else ""
        numbers = [number(value, each.unit) for value in (each.median, each.p10, each.p90)]
        made.append([each.what + note, each.target or "-", *numbers, each.rounds or "-", each.verdict])
    head = ("figure", "target", "median", "p10", "p90", "rounds", "reached")
    table = section.table or markdown_table(head, made)
    return ["", f"## {section.title}", "", *([section.text, ""] if section.text else []), *table]


ENDINGS = (".json", ".md", ".csv", ".png", "_crossover.png")  # of every benchmark


def beside(out: Path, ending: str) -> Path:
    """A file of the report OUT."""
    return out.with_name(out.name + ending)


def check_report(out: Path) -> Path:
    """OUT without an ending of the report's files; nothing but an earlier report may be there.

    Raises:
        InputError: another file is there, or nothing can be written there.
    """
    out = user_path(out)
    out = out.with_suffix("") if out.suffix in ENDINGS else out
    lead = beside(out, ".json")
    check_target(lead, Kind("an earlier report", marked(b'"mta_fast": "')))
    if not lead.exists():  # the JSON file is written first and tells whose the others are
        for ending in ENDINGS:
            check_target(beside(out, ending), Kind("an empty file", lambda file: False))
    return out


def publish(report: Report, out: Path | None = None) -> int:
    """Print the report, write OUT.json, OUT.csv, OUT.md and the pictures; 1 if a target was missed."""
    text = report.markdown()
    print(text, end="")
    if out is not None:
        out = check_report(out)
        write_whole(beside(out, ".json"), report.json())
        write_whole(beside(out, ".md"), text)
        with atomic_file(beside(out, ".csv")) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["section", *(f.name for f in fields(Entry))])
            writer.writerows([s.title, *asdict(each).values()] for s in report.sections for each in s.entries)
        for ending, draw in report.figures.items():
            with atomic_file(beside(out, f"{ending}.png")) as partial:
                draw(partial)
    return int(report.missed)


# --- the machine -------------------------------------------------------------------------------------------------


def machine(*packages: str, **more: Any) -> dict[str, Any]:
    """What a run was measured on: processor, threads, memory, versions, and how the C++ kernels were built.

    Args:
        packages: further distributions whose version matters.
        more: further facts.
    """
    found = {
        "processor": _proc("/proc/cpuinfo", "model name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "memory": f"{int((_proc('/proc/meminfo', 'MemTotal') or '0').split()[0]) / 2**20:.0f} GB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mta_fast": __version__,
    }
    built = str(build_info()) if why_missing() is None else ""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return found | ({"C++ kernels": built} if built else {}) | versions | more


def texts_name(texts: Path | None) -> str:
    """The text file as a report names it: the last two parts of its path."""
    return "bundled sample" if texts is None else "/".join(texts.parts[-2:])


def _proc(path: str, name: str) -> str:
    """What a file of the system says of a name; empty where there is none."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
