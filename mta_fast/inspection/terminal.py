"""render_terminal: the inspection as coloured text; every colour has a character beside it that says the same."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mta_fast.inspection import appearance as look
from mta_fast.inspection.measure import Inspection, LayerPair, Span
from mta_fast.inspection.side import Token
from mta_fast.packages import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LABEL, CELL, GAP, SHORTEST_BLOCK = 22, 2, 3, 8  # columns: span labels, one matrix cell, between matrices, a matrix
WORST = 5
PLAIN_BELOW = 0.375  # times an average token: the first of the eight levels
# strings of eight levels of importance, five of distance (far to near), five of difference (closer to farther)
BARS, SHADES, SIGNS = "▁▂▃▄▅▆▇█", " ░▒▓█", ("--", " -", "  ", " +", "++")
ASCII_BARS, ASCII_SHADES = "12345678", " .:*#"
ASCII = str.maketrans(
    {"←": "<-", "“": '"', "”": '"', "…": "...", "─": "-", "·": ".", "↵": "\\n", "⇥": "\\t", "⋯": ".", "−": "-"}
)


@dataclass(frozen=True)
class _Style:
    """What this console can show."""

    colour: bool
    ascii_only: bool

    @property
    def bars(self) -> str:
        return ASCII_BARS if self.ascii_only else BARS

    @property
    def shades(self) -> str:
        return ASCII_SHADES if self.ascii_only else SHADES

    @property
    def mark(self) -> tuple[str, str, str, str]:
        """Left end, middle, right end, and a mark of one column."""
        return ("\\", "_", "/", "v") if self.ascii_only else ("╰", "─", "╯", "╵")

    def on(self, rgb: Sequence[int]) -> str:
        """A rich style with this background and legible text on it; none without colours."""
        if not self.colour:
            return ""
        bright = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 110
        return f"{'#000000' if bright else '#ffffff'} on rgb({rgb[0]},{rgb[1]},{rgb[2]})"


def render_terminal(inspection: Inspection, console: Console) -> None:
    """Print an inspection.

    Args:
        inspection: of ``inspect_text``.
        console: of rich; without colours the bars, shades and signs remain.

    Raises:
        MissingPackageError: rich is not installed.
    """
    require("rich", "train", "inspect")
    from rich.console import Console

    if not console.options.ascii_only:
        _render(inspection, console, _Style(console.color_system is not None and not console.no_color, False))
        return
    inner = Console(file=io.StringIO(), width=console.width, color_system=None)
    _render(inspection, inner, _Style(False, True))
    lines = inner.file.getvalue().translate(ASCII)  # type: ignore[attr-defined]  # the StringIO above
    console.out(lines.encode("ascii", "backslashreplace").decode(), end="", highlight=False)


def _render(inspection: Inspection, console: Console, style: _Style) -> None:
    from rich.text import Text

    console.rule(Text(look.title(inspection), "bold"))
    for title, sentence in look.EXPLANATION:
        console.print(Text.assemble((f"{title}. ", "bold"), sentence))
    console.print()
    for fact in look.summary(inspection):
        console.print(Text(fact))
    console.print(_legend(style))
    for i, pair in enumerate(inspection.layer_pairs, 1):
        console.print()
        console.rule(Text(f"{i}: {look.heading(pair, inspection)}", "bold"), align="left")
        _print_tokens(inspection.tokens, pair, console, style)
        reason = look.nothing_to_compare(pair)
        if reason is None:
            _print_matrices(pair, console, style)
            _print_worst(pair, console)
        else:
            console.print(Text(reason))
        console.print(Text(look.values(pair)))


def _legend(style: _Style) -> Text:
    from rich.text import Text

    made = Text("Importance, in times that of an average token:\n")
    for level, bar in enumerate(style.bars):
        ratio = level * look.STRONG_IMPORTANCE / len(style.bars)
        made.append(f" {bar} {ratio:.1f} ", _importance_style(ratio, style))
    left, middle, right, short = style.mark
    made.append(f" and more\n{left}{middle}{right} or {short} underlines the spans that a layer pair compares.")
    return made


def _importance_style(ratio: float, style: _Style) -> str:
    """A background for the tokens that stand out; those that are hardly attended to stay plain."""
    if ratio < PLAIN_BELOW:
        return ""
    return style.on(look.colours(look.strength(ratio), look.IMPORTANCE["terminal"]).tolist())


def _bar(share: float, style: _Style) -> str:
    return style.bars[min(int(share * len(style.bars)), len(style.bars) - 1)]


# --- tokens ------------------------------------------------------------------------------------------------------


def _print_tokens(tokens: Sequence[Token], pair: LayerPair, console: Console, style: _Style) -> None:
    """Lines of the text, under each the importance as bars and the marks of the spans."""
    from rich.cells import cell_len
    from rich.text import Text

    lanes = look.lanes(pair.spans)
    for line in look.lines(tokens, cell_len, console.width - 1, 0):
        text, bars = Text(no_wrap=True, overflow="ignore"), Text(no_wrap=True, overflow="ignore")
        for box in line:
            ratio = float(pair.relative_importance[box.token])
            gap = " " * (box.left - bars.cell_len)
            text.append(gap).append(box.text, _importance_style(ratio, style))
            bars.append(gap + _bar(float(look.strength(ratio)), style) * box.width)
        rows = [_marks(pair.spans, lanes, lane, line, style.mark) for lane in range(max(lanes, default=-1) + 1)]
        for row in (text, bars, *(Text(marks, no_wrap=True, overflow="ignore") for marks in rows if marks.strip())):
            console.print(row, crop=False)


def _marks(
    spans: Sequence[Span],
    lanes: Sequence[int],
    lane: int,
    line: Sequence[look.Box[int]],
    mark: tuple[str, str, str, str],
) -> str:
    """The marks of one row; a span that goes on in the next line has no end in this one."""
    if not line:
        return ""
    row = [" "] * (line[-1].left + line[-1].width)
    left, middle, right, short = mark
    for span, its_lane in zip(spans, lanes, strict=True):
        first, last = span.teacher_tokens
        boxes = [box for box in line if first <= box.token < last and box.width]
        if its_lane != lane or not boxes:
            continue
        begin, end = boxes[0].left, boxes[-1].left + boxes[-1].width
        if boxes[0].token == first:
            begin += min(len(boxes[0].text) - len(boxes[0].text.lstrip()), boxes[0].width - 1)
        row[begin:end] = middle * (end - begin)
        starts, stops = boxes[0].token == first, boxes[-1].token == last - 1
        if starts:
            row[begin] = left
        if stops:
            row[end - 1] = short if starts and end - begin == 1 else right
    return "".join(row)


# --- matrices ----------------------------------------------------------------------------------------------------


def _print_matrices(pair: LayerPair, console: Console, style: _Style) -> None:
    """Teacher, student and their difference, as many of the most salient spans as fit."""
    from rich.text import Text

    room = (console.width - 1 - LABEL - 3 * GAP) // (3 * CELL)
    chosen = look.most_salient(pair, max(room, 2))
    size, noun = len(chosen), pair.granularity
    if size < len(pair.spans):
        console.print(Text(f"The {size} most salient of {len(pair.spans)} {noun}s:"))
    width = max(CELL * size, SHORTEST_BLOCK)
    console.print(_columns(f"   {noun}, salience", *(title.ljust(width) for title in _titles(width))))
    numbers = "".join(f"{i if i < 10 or i % 2 == 0 else '':>{CELL}}" for i in range(1, size + 1)).ljust(width)
    console.print(_columns("", numbers, numbers, numbers), style="dim", crop=False)
    select, shares = np.ix_(chosen, chosen), look.weight_shares(pair)
    difference = pair.student_distances - pair.teacher_distances
    blocks = [
        (pair.teacher_distances[select], look.distance_colours(pair.teacher_distances, pair, "light")[select]),
        (pair.student_distances[select], look.distance_colours(pair.student_distances, pair, "light")[select]),
        (difference[select], look.difference_colours(pair, "light")[select]),
    ]
    ends = look.scales(pair)
    for i, index in enumerate(chosen):
        row = Text(no_wrap=True, overflow="ignore")
        name = _fit(f"{i + 1:>2} {look.label(pair.spans[index].text, LABEL - 6)}", LABEL - 2)
        row.append(f"{name}{_bar(float(shares[index]), style)} ")
        for k, (measured, rgb) in enumerate(blocks):
            for value, colour in zip(measured[i], rgb[i], strict=True):
                cell = _difference_sign(value / ends.difference) if k == 2 else _shade(value / ends.distance, style)
                row.append(" " * CELL if style.colour else cell, style.on(colour.tolist()))
            row.append(" " * (width - CELL * size + GAP))
        console.print(row, crop=False)
    _print_scale(pair, console, style)


def _titles(width: int) -> tuple[str, str, str]:
    full = ("teacher: distances", "student: distances", "student - teacher")
    return full if width >= max(map(len, full)) else ("teacher", "student", "diff.")


def _columns(name: str, *blocks: str) -> Text:
    from rich.text import Text

    return Text(_fit(name, LABEL) + "".join(block + " " * GAP for block in blocks), no_wrap=True, overflow="ignore")


def _shade(share: float, style: _Style) -> str:
    """Strong is near, as with the colours."""
    return style.shades[min(int((1 - share) * len(style.shades)), len(style.shades) - 1)] * CELL


def _difference_sign(share: float) -> str:
    return SIGNS[int(np.clip(np.rint(2 * share), -2, 2)) + 2]


def _fit(text: str, width: int) -> str:
    from rich.cells import set_cell_size

    return set_cell_size(text, width)


def _print_scale(pair: LayerPair, console: Console, style: _Style) -> None:
    from rich.text import Text

    ends = look.scales(pair)
    distance, difference = Text(" " * LABEL), Text(" " * LABEL)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        colour = look.colours(np.array(share), look.NEAR_TO_FAR["light"]).tolist()
        distance.append("  " if style.colour else _shade(share, style), style.on(colour))
        signed = 2 * share - 1
        colour = look.colours(np.array(share), look.CLOSER_TO_FARTHER["light"]).tolist()
        difference.append("  " if style.colour else _difference_sign(signed), style.on(colour))
    distance.append(f" distance 0 (the same) to {look.number(ends.distance)} and more")
    end = look.number(ends.difference)
    difference.append(f" student: too close to too far apart, by {end} and more")
    console.print(distance)
    console.print(difference)


def _print_worst(pair: LayerPair, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not pair.worst:
        console.print(Text("The student's distances are the teacher's: nothing to learn here."))
        return
    table = Table(box=box.SIMPLE, title="Where they disagree most", title_justify="left", pad_edge=False)
    table.add_column("span")
    table.add_column("span")
    for column in ("teacher", "student", "share of DSA"):
        table.add_column(column, justify="right")
    table.add_column("student: too")
    for worst in pair.worst[:WORST]:
        first, second = look.quoted((pair.spans[i].text for i in (worst.first, worst.second)), 22)
        table.add_row(
            Text(first),
            Text(second),
            f"{worst.teacher:.3f}",
            f"{worst.student:.3f}",
            f"{100 * worst.share:.1f} %",
            look.verdict(worst.teacher, worst.student).removeprefix("too "),
        )
    console.print(table)
