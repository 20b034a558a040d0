"""Tables of bench/results/ on the pages of the documentation: ``python -m bench.docs`` writes them anew.

A comment such as ``<!-- bench/results/loss.md: Must reach -->`` stands before each of them: the file, and the title of
the section whose first table (or ", table 2") follows.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PLACE = re.compile(r"(<!-- (bench/results/[\w./]+): (.+?)(?:, table (\d+))? -->)\n+(?:\|.*\n)*\n*")


def pages() -> list[Path]:
    """README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def places(text: str) -> list[tuple[str, str]]:
    """The (file, section) of every table on a page."""
    return [(match[2], match[3]) for match in _PLACE.finditer(text)]


def rewrite(text: str) -> str:
    """The page with its tables as the results files hold them, a blank line before and after each."""

    def written(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{_table(match[2], match[3], int(match[4] or 1))}\n"

    return _PLACE.sub(written, text).rstrip("\n") + "\n"


def _table(file: str, title: str, count: int) -> str:
    sections = re.split(r"^## ", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [section for section in sections if section.splitlines()[:1] == [title]]
    tables = re.findall(r"(?:^\|.*\n)+", found[0], re.MULTILINE) if found else []
    if len(tables) < count:
        raise SystemExit(f"bench.docs: expected table {count} under '## {title}' in {file}, got {len(tables)} there")
    return tables[count - 1]


def main() -> None:
    """Write the pages that change."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = rewrite(text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(f"tables of {page.relative_to(ROOT)} written anew")


if __name__ == "__main__":
    main()
