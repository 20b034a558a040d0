"""write_png: the inspection as one picture, a row for each layer pair."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mta_fast.files import PICTURE, check_target, save_figure
from mta_fast.inspection import appearance as look
from mta_fast.inspection.measure import Inspection, LayerPair
from mta_fast.inspection.side import Token
from mta_fast.packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

DPI = 110
# Everything below is in inches
WIDTH, MARGIN = 12.6, 0.35  # at the width of a page, 800 pixels, a point is a pixel high
HEADER, HEADING = 2.1, 0.7  # of the picture, without its summary; of a row
TEXT_WIDTH, THINNEST = 6.0, 0.04  # of the text; of a token
MATRIX, MATRIX_GAP, ROW_LABELS, SCALE = 2.95, 0.35, 1.55, 0.85
SALIENCE = 0.55  # width of the salience bars
LINE, MARK = 0.28, 0.075  # a line of text; a row of span marks
WORST, WORST_LINE, SUMMARY_LINE = 5, 0.24, 0.2
MOST_LABELS, LABEL_LENGTH = 20, 16
TEXT_SIZE, SMALL, LABEL_SIZE = 11.5, 10.5, 9.0  # points
INK, SOFT = "#1d2025", "#646a74"
MARKS = {"word": "#0f766e", "phrase": "#6d4bc3"}
FONT = "DejaVu Sans"  # comes with matplotlib
# used where installed, for characters that DejaVu lacks
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Symbols", "Noto Sans Symbols 2", "Noto Emoji", "Symbola"),
    *("Arial Unicode MS", "Segoe UI Symbol", "FreeSans", "Unifont"),
)
MISSING = "▯"  # stands for a character that no font here has


def write_png(inspection: Inspection, path: str | Path) -> None:
    """Draw the inspection.

    Args:
        inspection: of ``inspect_text``.
        path: the file; an earlier picture there is replaced.

    Raises:
        InputError: another file is there. CheckpointError: it can't be written.
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "train", "inspect")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    place = check_target(path, PICTURE)
    figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    pen = _Pen.make(figure, canvas.get_renderer(), inspection)
    rows = [_Row.make(inspection.tokens, pair, pen) for pair in inspection.layer_pairs]
    summary = textwrap.wrap(" ".join(look.summary(inspection)), 125)
    top = HEADER + SUMMARY_LINE * len(summary)
    figure.set_size_inches(WIDTH, top + sum(row.height for row in rows) + MARGIN)
    _draw_header(inspection, summary, pen)
    for i, row in enumerate(rows, 1):
        _draw_row(i, row, inspection, top, pen)
        top += row.height
    save_figure(figure, place, dpi=DPI)


class _Pen:
    """Draws on the figure in inches from its upper left corner."""

    def __init__(self, figure: Figure, renderer: Any, fonts: list[str], covered: frozenset[int]) -> None:
        self.figure, self.renderer, self.fonts, self.covered = figure, renderer, fonts, covered

    @classmethod
    def make(cls, figure: Figure, renderer: Any, inspection: Inspection) -> _Pen:
        """With the fonts that this text needs."""
        needed = {ord(c) for c in look.shown(inspection.text + inspection.teacher + inspection.student)}
        needed |= {ord(c) for token in inspection.tokens for c in look.visible(token)}
        fonts, covered = [FONT], _characters(FONT)
        for name in FALLBACK_FONTS:
            if needed - covered and needed & (_characters(name) - covered):
                fonts.append(name)
                covered = covered | _characters(name)
        return cls(figure, renderer, fonts, covered)

    def drawable(self, text: str) -> str:
        return "".join(c if ord(c) in self.covered else MISSING for c in text)

    def font(self, size: float, bold: bool = False) -> FontProperties:
        from matplotlib.font_manager import FontProperties

        return FontProperties(family=self.fonts, size=size, weight="bold" if bold else "normal")

    def width(self, text: str, size: float) -> float:
        """Of the drawn text, in inches."""
        pixels, _, _ = self.renderer.get_text_width_height_descent(self.drawable(text), self.font(size), False)
        return float(pixels) / DPI

    def text(self, x: float, y: float, text: str, size: float, colour: str = INK, bold: bool = False) -> None:
        """Text whose first line's top is at y."""
        self.figure.text(
            x / WIDTH,
            1 - y / self.figure.get_figheight(),
            self.drawable(text),
            fontproperties=self.font(size, bold),
            color=colour,
            va="top",
            parse_math=False,
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at (x, y)."""
        whole = self.figure.get_figheight()
        return self.figure.add_axes((x / WIDTH, 1 - (y + height) / whole, width / WIDTH, height / whole))


def _characters(font: str) -> frozenset[int]:
    """The code points an installed font has; none if it isn't installed."""
    from matplotlib.font_manager import fontManager, get_font

    path = next((entry.fname for entry in fontManager.ttflist if entry.name == font), None)
    return frozenset() if path is None else frozenset(get_font(path).get_charmap()) | {0x0A}


# --- layout ------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A layer pair, with its text broken into lines."""

    pair: LayerPair
    lines: list[list[look.Box[float]]]
    lanes: list[int]
    text_height: float
    matrices: float  # from the heading's end to their upper edge
    height: float

    @classmethod
    def make(cls, tokens: Sequence[Token], pair: LayerPair, pen: _Pen) -> _Row:
        lanes = look.lanes(pair.spans)
        lines = look.lines(tokens, lambda text: pen.width(text, TEXT_SIZE), TEXT_WIDTH, THINNEST)
        text_height = len(lines) * _line_height(lanes)
        texts = max(text_height + 0.4, WORST_LINE * (1 + min(len(pair.worst), WORST)) + 0.1)
        if look.nothing_to_compare(pair):
            return cls(pair, lines, lanes, text_height, 0.0, HEADING + texts + 0.2)
        labels = max(pen.width(look.label(span.text, LABEL_LENGTH), LABEL_SIZE) for span in pair.spans)
        matrices = texts + labels + 0.15
        return cls(pair, lines, lanes, text_height, matrices, HEADING + matrices + MATRIX + SCALE + 0.2)


def _line_height(lanes: Sequence[int]) -> float:
    return LINE + MARK * (max(lanes, default=0) + 1) + 0.05


# --- drawing -----------------------------------------------------------------------------------------------------


def _draw_header(inspection: Inspection, summary: Sequence[str], pen: _Pen) -> None:
    pen.text(MARGIN, 0.25, look.title(inspection), 17, bold=True)
    pen.text(MARGIN, 0.6, "\n".join(summary), SMALL, SOFT)
    top = 0.72 + SUMMARY_LINE * len(summary)
    column = (WIDTH - 2 * MARGIN) / len(look.EXPLANATION)
    for i, (title, sentence) in enumerate(look.EXPLANATION):
        pen.text(MARGIN + i * column, top, title, 12, bold=True)
        pen.text(MARGIN + i * column, top + 0.25, textwrap.fill(sentence, 50), SMALL)


def _draw_row(i: int, row: _Row, inspection: Inspection, top: float, pen: _Pen) -> None:
    pair = row.pair
    rule = pen.axes(MARGIN, top, WIDTH - 2 * MARGIN, 0.01)
    rule.set(facecolor="#d5d2cb", xticks=[], yticks=[])
    rule.spines[:].set_visible(False)
    pen.text(MARGIN, top + 0.12, f"{i}   {look.heading(pair, inspection)}", 13, bold=True)
    pen.text(MARGIN, top + 0.38, look.values(pair), SMALL, SOFT)
    top += HEADING
    _draw_text(row, look.right_to_left(inspection.text), top, pen)
    _draw_importance_scale(top + row.text_height + 0.08, pen)
    reason = look.nothing_to_compare(pair)
    right = MARGIN + TEXT_WIDTH + MATRIX_GAP
    if reason is not None:
        pen.text(right, top + 0.03, textwrap.fill(reason, 55), 11)
        return
    _draw_worst(pair, right, top, pen)
    _draw_matrices(pair, MARGIN + ROW_LABELS, top + row.matrices, pen)


def _draw_text(row: _Row, right_to_left: bool, top: float, pen: _Pen) -> None:
    from matplotlib.patches import Rectangle

    axes = pen.axes(MARGIN, top, TEXT_WIDTH, row.text_height)
    axes.set(xlim=(TEXT_WIDTH, 0) if right_to_left else (0, TEXT_WIDTH), ylim=(row.text_height, 0))
    axes.axis("off")
    strength = look.strength(row.pair.relative_importance)
    face = look.colours(strength, look.IMPORTANCE["light"]) / 255
    for n, line in enumerate(row.lines):
        y = n * _line_height(row.lanes)
        for box in line:
            axes.add_patch(Rectangle((box.left, y), box.width, LINE, facecolor=face[box.token], linewidth=0))
            # centred, so that it is right in both directions
            axes.text(
                box.left + box.width / 2,
                y + 0.74 * LINE,
                pen.drawable(box.text),
                fontproperties=pen.font(TEXT_SIZE),
                color=INK,
                ha="center",
                parse_math=False,
            )
        _draw_marks(axes, row, line, y + LINE, pen)


def _draw_marks(axes: Axes, row: _Row, line: Sequence[look.Box[float]], y: float, pen: _Pen) -> None:
    space = pen.width(" ", TEXT_SIZE)
    for span, lane in zip(row.pair.spans, row.lanes, strict=True):
        first, last = span.teacher_tokens
        boxes = [box for box in line if first <= box.token < last]
        if not boxes:
            continue
        begin, end = boxes[0].left, boxes[-1].left + boxes[-1].width
        if boxes[0].token == first:
            begin += space if boxes[0].text.startswith(" ") else 0.015
        if boxes[-1].token == last - 1:
            end -= 0.015
        at = y + MARK * (lane + 0.6)
        colour = MARKS[row.pair.granularity]
        axes.plot([begin, end], [at, at], color=colour, linewidth=2.2, solid_capstyle="butt")


def _draw_importance_scale(top: float, pen: _Pen) -> None:
    pen.text(MARGIN, top, "importance: ignored", LABEL_SIZE + 1, SOFT)
    left = MARGIN + pen.width("importance: ignored ", LABEL_SIZE + 1) + 0.05
    axes = pen.axes(left, top, 1.2, 0.12)
    ramp = look.colours(np.linspace(0, 1, 64)[None], look.IMPORTANCE["light"])
    axes.imshow(ramp, aspect="auto")
    axes.set(xticks=[], yticks=[])
    pen.text(left + 1.27, top, f"{look.STRONG_IMPORTANCE:g} × average", LABEL_SIZE + 1, SOFT)


def _draw_worst(pair: LayerPair, left: float, top: float, pen: _Pen) -> None:
    if not pair.worst:
        pen.text(left, top, "The student's distances are the teacher's: nothing to learn here.", SMALL)
        return
    pen.text(left, top, "Where they disagree most", SMALL, bold=True)
    right = left + 3.2
    pen.text(right, top, "teacher", SMALL, SOFT)
    pen.text(right + 0.72, top, "student", SMALL, SOFT)
    for k, worst in enumerate(pair.worst[:WORST], 1):
        y = top + k * WORST_LINE
        first, second = look.quoted((pair.spans[u].text for u in (worst.first, worst.second)), 17)
        far = worst.student > worst.teacher
        pen.text(left, y, first, SMALL)
        pen.text(left + 1.6, y, second, SMALL)
        pen.text(right + 0.05, y, f"{worst.teacher:.3f}", SMALL)
        pen.text(right + 0.8, y, f"{worst.student:.3f}", SMALL)
        pen.text(right + 1.42, y, look.verdict(worst.teacher, worst.student), SMALL, "#c81e1e" if far else "#1d4ed8")


def _draw_matrices(pair: LayerPair, left: float, top: float, pen: _Pen) -> None:
    images = {
        "Teacher": look.distance_colours(pair.teacher_distances, pair, "light"),
        "Student": look.distance_colours(pair.student_distances, pair, "light"),
        "Student − teacher": look.difference_colours(pair, "light"),
    }
    size = len(pair.spans)
    shown = range(0, size, -(-size // MOST_LABELS))
    for k, (title, rgb) in enumerate(images.items()):
        axes = pen.axes(left + k * (MATRIX + MATRIX_GAP), top, MATRIX, MATRIX)
        axes.imshow(rgb, interpolation="nearest", aspect="auto")
        axes.xaxis.tick_top()
        names = [pen.drawable(look.label(pair.spans[j].text, LABEL_LENGTH)) for j in shown]
        _label(axes.set_xticks, shown, names, pen, rotation=90)
        _label(axes.set_yticks, shown, names if k == 0 else [], pen)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_color("#d5d2cb")
        axes.set_xlabel(title, fontproperties=pen.font(10.5, bold=True), color=INK)
    ends = look.scales(pair)
    below = top + MATRIX + 0.36
    _draw_scale(left, below, 2 * MATRIX + MATRIX_GAP, look.NEAR_TO_FAR["light"], pen)
    words = ("0 (same)", f"distance {look.number(ends.distance)} and more")
    _draw_scale_words(left, below + 0.17, 2 * MATRIX + MATRIX_GAP, words, pen)
    third, end = left + 2 * (MATRIX + MATRIX_GAP), look.number(ends.difference)
    _draw_scale(third, below, MATRIX, look.CLOSER_TO_FARTHER["light"], pen)
    _draw_scale_words(third, below + 0.17, MATRIX, (f"−{end}: too close", f"+{end}: too far apart"), pen)
    _draw_salience(pair, third + MATRIX + 0.08, top, pen)


def _label(set_ticks: Any, at: Iterable[int], names: Sequence[str], pen: _Pen, rotation: int = 0) -> None:
    """Tick labels whose dollars are no formulas."""
    positions = list(at)[: len(names)]
    set_ticks(positions, names, fontproperties=pen.font(LABEL_SIZE), rotation=rotation, color=SOFT, parse_math=False)


def _draw_scale(left: float, top: float, width: float, ramp: look.Ramp, pen: _Pen) -> None:
    axes = pen.axes(left, top, width, 0.12)
    axes.imshow(look.colours(np.linspace(0, 1, 128)[None], ramp), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#d5d2cb")


def _draw_scale_words(left: float, top: float, width: float, words: tuple[str, str], pen: _Pen) -> None:
    pen.text(left, top, words[0], LABEL_SIZE + 1, SOFT)
    pen.text(left + width - pen.width(words[1], LABEL_SIZE + 1), top, words[1], LABEL_SIZE + 1, SOFT)


def _draw_salience(pair: LayerPair, left: float, top: float, pen: _Pen) -> None:
    axes = pen.axes(left, top, SALIENCE, MATRIX)
    size = len(pair.spans)
    axes.barh(range(size), look.weight_shares(pair), height=0.8, color="#f07c20")
    axes.set(xlim=(0, 1), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel("salience", fontproperties=pen.font(LABEL_SIZE + 1), color=SOFT)
