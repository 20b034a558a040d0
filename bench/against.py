"""A run beside an earlier report of the same benchmark: ``--against FILE.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.report import Entry, Report, Section, markdown_table, number
from mta_fast.errors import InputError
from mta_fast.files import user_path

PAGES = 1.0  # MB: what allocators round to
NOISE = 0.1  # medians this near each other say nothing: identical runs differ as much
WORKLOAD = ("sizes", "widths", "pair", "teacher", "batch", "texts")  # what a report's facts say of the work
TESTED = ("mta_fast", "C++ kernels")  # what a comparison is made for; every other fact is the machine's
TITLE = "Compared with"


def read_report(file: Path, command: str) -> Report:
    """An earlier report of ``command``, its entries and facts.

    Raises:
        InputError: it is none.
    """
    try:
        read = json.loads(user_path(file).read_text(encoding="utf-8"))
        sections = [Section(s["title"], [Entry(**row) for row in s["rows"]]) for s in read["sections"]]
        report = Report(read["command"], dict(read["machine"]), sections)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--against: expected a report of {command} in {file}, got {error!r}") from None
    if report.command != command:
        raise InputError(f"--against: expected a report of {command} in {file}, got one of {report.command}")
    return report


def compare(report: Report, earlier: Report, file: Path) -> Section:
    """Every figure that both hold: its median now over its median then, and whether that is more than noise.

    An entry is judged where its better side is known: by its target's relation, and of times and memory.

    Raises:
        InputError: the workload is another one.
    """
    others = _differences(report, earlier, set(WORKLOAD))
    if others:
        raise InputError(f"--against: expected the workload of {file}, got another one: {', '.join(others)}")
    old, new = _figures(earlier), _figures(report)
    machines = _differences(report, earlier, {*report.about, *earlier.about} - {*WORKLOAD, *TESTED})
    compared = [key for key in new if key in old and not (machines and new[key].unit == "ms")]
    if not old.keys() & new.keys():
        raise InputError(f"--against: expected figures of the same sizes and sides in {file}, got none of them")
    made = [_compared(new[key], old[key], f"{key[0]}: {key[1]}") for key in compared]
    head = ("figure", "then", "now", "now / then", "beyond noise")
    table = markdown_table(
        head,
        [
            (each.what, old[key].cell, new[key].cell, number(each.median), each.note or "-")
            for key, each in zip(compared, made, strict=True)
        ],
    )
    return Section(f"{TITLE} {file.name}", made, _text(machines, len(old.keys() ^ new.keys())), table)


def _text(machines: list[str], single: int) -> str:
    text = f"Medians. Beyond noise: more than {NOISE:.0%} (memory: and {PAGES:g} MB) apart, no overlap of p10 to p90."
    if machines:
        text += (
            f" The machine or its versions differ ({', '.join(machines)}): times can't be compared and are left out, "
            f"ratios within a run can."
        )
    return text + (f" {single} figures stand in one of the two alone." if single else "")


def _differences(report: Report, earlier: Report, names: set[str]) -> list[str]:
    def fact(about: Any, name: str) -> str:
        return str(about.get(name, "none"))

    pairs = {name: (fact(earlier.about, name), fact(report.about, name)) for name in sorted(names)}
    return [f"{name} {then} then, {now} now" for name, (then, now) in pairs.items() if then != now]


def _figures(report: Report) -> dict[tuple[str, str], Entry]:
    sections = [section for section in report.sections if not section.title.startswith(TITLE)]
    return {(s.title, each.what): each for s in sections for each in s.entries if each.median is not None}


def _compared(new: Entry, old: Entry, what: str) -> Entry:
    ratio, verdict = _ratio(new, old), _verdict(new, old)
    reached = {"worse": False, "better": True}.get(verdict)
    return replace(new, what=what, unit="x", target="", median=ratio, p10=None, p90=None, reached=reached, note=verdict)


def _ratio(new: Entry, old: Entry) -> float | None:
    """None where one of them is 0 or less, as differences may be."""
    return new.median / old.median if new.median and old.median and min(new.median, old.median) > 0 else None


def _verdict(new: Entry, old: Entry) -> str:
    """better, worse, or other where no side is the better one; empty within the noise."""
    (low, now, high), (least, then, most) = ((e.p10 or 0.0, e.median or 0.0, e.p90 or 0.0) for e in (new, old))
    least_change = PAGES if new.unit == "MB" else 0.0
    if abs(now - then) <= max(NOISE * abs(then), least_change) or (low <= most and least <= high):
        return ""
    relation = (new.target or old.target or ("<" if new.unit in ("ms", "MB") else "")).partition(" ")[0]
    if not relation:
        return "other"
    return "better" if (now < then) == relation.startswith("<") else "worse"
