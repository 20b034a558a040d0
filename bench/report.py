"""What every benchmark here prints and writes: figures with their target and spread, and the machine.

``publish`` writes OUT.json (everything, the samples too), OUT.csv (one figure a line) and OUT.md (tables).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mta_fast.files import Kind, atomic_file, check_target, marked, user_path, write_whole


@dataclass(frozen=True)
class Row:
    """One figure, what it must reach, and the spread of the rounds.

    Attributes:
        target: such as ">= 2.9"; empty where there is none.
        median, p10, p90: over the rounds; None where nothing was measured, and ``note`` says why.
        reached: None where there is nothing to judge.
    """

    what: str
    unit: str
    target: str
    median: float | None
    p10: float | None
    p90: float | None
    rounds: int
    reached: bool | None
    note: str = ""


def make_row(what: str, unit: str, relation: str, target: float | None, values: Sequence[float], note: str = "") -> Row:
    """A row from the rounds' values; ``relation`` is ">=", "<=" or "<", and ``target`` None where there is none."""
    p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
    if target is None:
        return Row(what, unit, "", median, p10, p90, len(values), None, note)
    reached = {">=": median >= target, "<=": median <= target, "<": median < target}[relation]
    return Row(what, unit, f"{relation} {target:g}", median, p10, p90, len(values), reached, note)


def skipped_row(what: str, why: str, target: str = "") -> Row:
    """A row without a figure, and why."""
    return Row(what, "", target, None, None, None, 0, None, f"skipped: {why}")


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Attributes:
        title: names the table; ``bench.docs`` finds it by this name.
        rows: its figures.
        text: what the figures are, above the table.
        table: lines to print instead of one line a figure; a section may only show figures of others.
    """

    title: str
    rows: Sequence[Row]
    text: str = ""
    table: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        command: how it is run.
        about: machine, versions, data.
        samples: the single measurements, by shape and side.
        figures: PNG files by the ending of their name; each is called with the file to write.
    """

    command: str
    about: Mapping[str, Any]
    sections: Sequence[Section]
    samples: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The figures of all sections."""
        return [row for section in self.sections for row in section.rows]


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)]


def number(value: float | None, unit: str) -> str:
    """Three digits, or two after the point."""
    if value is None:
        return "-"
    digits = 2 if abs(value) < 100 else 0
    if 0 < abs(value) < 0.095:
        digits = 4
    return f"{value:,.{digits}f} {unit}".rstrip()


def verdict(row: Row) -> str:
    """yes, NO, or - where there is nothing to judge."""
    return {True: "yes", False: "NO", None: "-"}[row.reached]


def cell(row: Row) -> str:
    """The figure with its target in one cell of a summary."""
    if row.median is None:
        return row.note
    return number(row.median, row.unit) + (f" ({row.target}: {verdict(row)})" if row.target else "")


def _lines(section: Section) -> list[str]:
    if not section.rows and not section.table:
        return []
    head = ("figure", "target", "median", "p10", "p90", "rounds", "reached")
    made = []
    for row in section.rows:
        note = f" ({row.note})" if row.note else ""
        numbers = [number(value, row.unit) for value in (row.median, row.p10, row.p90)]
        made.append([row.what + note, row.target or "-", *numbers, row.rounds or "-", verdict(row)])
    table = section.table or markdown_table(head, made)
    return ["", f"## {section.title}", "", *([section.text, ""] if section.text else []), *table]


def markdown(report: Report) -> str:
    """The report as OUT.md holds it."""
    lines = [f"`{report.command}`", *(line for s in report.sections for line in _lines(s)), "", "## Machine", ""]
    return "\n".join([*lines, *markdown_table(list(report.about), [list(report.about.values())])]) + "\n"


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
    out = out.with_suffix("") if out.suffix in (".json", ".md", ".csv", ".png") else out
    lead = beside(out, ".json")
    check_target(lead, Kind("an earlier report", marked(b'"mta_fast": "')))
    if not lead.exists():  # the JSON file is written first and tells whose the others are
        for ending in ENDINGS:
            check_target(beside(out, ending), Kind("an empty file", lambda file: False))
    return out


def write_report(out: Path, data: str, text: str) -> None:
    """OUT.json and OUT.md, of a place that ``check_report`` gave."""
    write_whole(beside(out, ".json"), data)
    write_whole(beside(out, ".md"), text)


def publish(report: Report, out: Path | None) -> int:
    """Print the report, write OUT.json, OUT.csv, OUT.md and the pictures; 1 if a target was missed."""
    text = markdown(report)
    print(text, end="")
    rows = report.rows
    if out is not None:
        out = check_report(out)
        content = {
            "command": report.command,
            "machine": dict(report.about),
            "sections": [{"title": s.title, "rows": [asdict(row) for row in s.rows]} for s in report.sections],
            "samples": report.samples,
        }
        write_report(out, json.dumps(content, indent=1) + "\n", text)
        with atomic_file(beside(out, ".csv")) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["section", *(f.name for f in fields(Row))])
            writer.writerows([s.title, *asdict(row).values()] for s in report.sections for row in s.rows)
        for ending, draw in report.figures.items():
            with atomic_file(beside(out, f"{ending}.png")) as partial:
                draw(partial)
    return 1 if any(row.reached is False for row in rows) else 0
