"""write_html: the inspection as one web page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mta_fast.files import Kind, check_target, marked, write_whole
from mta_fast.inspection import appearance as look
from mta_fast.inspection.measure import Inspection, LayerPair
from mta_fast.inspection.page_assets import SCRIPT, STYLE
from mta_fast.inspection.side import Token

MATRIX_SIZE, LARGEST_CELL = 280, 44  # pixels of the page
LABEL_HEIGHT = 13
LONGEST_LABEL = 24
# the second mark is that of pages made by earlier versions
PAGE = Kind(
    "an earlier page of this package", marked(b'<meta name="generator" content="mta_fast">', b"<title>What MTA s")
)


def write_html(inspection: Inspection, path: str | Path) -> None:
    """Write the page: light or dark as the reader's system is, tooltips on tokens and matrix cells.

    Args:
        inspection: of ``inspect_text``.
        path: the file; an earlier page there is replaced.

    Raises:
        InputError: another file is there. CheckpointError: it can't be written.
    """
    write_whole(check_target(path, PAGE), _page(inspection))


def _page(inspection: Inspection) -> str:
    title = f"What MTA sees: {inspection.teacher} teaches {inspection.student}"
    facts = " ".join(look.summary(inspection))
    steps = "".join(f"<li><b>{_text(name)}</b>{_text(sentence)}</li>" for name, sentence in look.EXPLANATION)
    sections = "\n".join(_section(i, pair, inspection) for i, pair in enumerate(inspection.layer_pairs))
    data = json.dumps([_data(pair) for pair in inspection.layer_pairs], ensure_ascii=False, separators=(",", ":"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="mta_fast">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<ol class="steps">{steps}</ol>
{_legend()}
<p class="facts">{_text(facts)}</p>
{sections}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{_json_in_script(data)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _json_in_script(data: str) -> str:
    """Nothing in it can end the script element."""
    return data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _legend() -> str:
    scales = (
        ("importance", "token importance", "ignored", "3 × average"),
        ("distance", "distance of two spans", "close", "far apart"),
        ("difference", "student − teacher", "too close", "too far apart"),
    )
    rows = "".join(
        f'<div class="scale"><b>{_text(name)}</b><span>{_text(low)}</span>'
        f'<i class="ramp {kind}" aria-hidden="true"></i><span>{_text(high)}</span></div>'
        for kind, name, low, high in scales
    )
    mark = '<div class="scale"><b>span</b><i class="mark"></i></div>'
    return f'<div class="legend" style="{_ramps()}">{rows}{mark}</div>'


def _ramps() -> str:
    """CSS variables of the legend's gradients, from the colours of the matrices."""
    made = []
    for theme in ("light", "dark"):
        for name, ramps in (("distance", look.NEAR_TO_FAR), ("difference", look.CLOSER_TO_FARTHER)):
            stops = ", ".join(f"rgb{rgb} {100 * stop:.0f}%" for stop, rgb in ramps[theme])
            made.append(f"--{name}-{theme}: linear-gradient(to right, {stops})")
    return "; ".join(made)


def _section(i: int, pair: LayerPair, inspection: Inspection) -> str:
    reason = look.nothing_to_compare(pair)
    compared = _matrices(i, pair) + _worst(pair) if reason is None else f'<p class="nothing">{_text(reason)}</p>'
    return f"""<section class="{pair.granularity}" data-pair="{i}">
<h2><span class="count">{i + 1}</span> {_text(look.heading(pair, inspection))}</h2>
<p class="values">{_text(look.values(pair))}</p>
{_tokens(inspection, pair)}
{compared}
</section>"""


# --- tokens ------------------------------------------------------------------------------------------------------


def _tokens(inspection: Inspection, pair: LayerPair) -> str:
    lanes = look.lanes(pair.spans)
    height = max(lanes, default=-1) + 1
    over: list[list[tuple[int, int]]] = [[] for _ in inspection.tokens]  # (lane, span) of each token
    for index, (span, lane) in enumerate(zip(pair.spans, lanes, strict=True)):
        for j in range(*span.teacher_tokens):
            over[j].append((lane, index))
    pieces, ends = [], look.line_ends(inspection.tokens)
    for j, token in enumerate(inspection.tokens):
        pieces.append(_text(look.shown(token.gap)) and f'<span class="gap">{_text(look.shown(token.gap))}</span>')
        pieces.append(_token(j, token, over[j], height, pair))
        if j in ends:
            pieces.append('<span class="break"></span>')
    direction = "rtl" if look.right_to_left(inspection.text) else "ltr"
    return f'<div class="text" dir="{direction}">{"".join(pieces)}</div>'


def _token(j: int, token: Token, over: Sequence[tuple[int, int]], height: int, pair: LayerPair) -> str:
    ratio = float(pair.relative_importance[j])
    spans = [f"{pair.granularity} “{look.label(pair.spans[u].text, 60)}”" for _, u in over]
    salience = [f"{spans[k]}: salience {look.number(pair.salience[u])}" for k, (_, u) in enumerate(over)]
    what = f"further bytes of “{token.text}”" if token.continues else f"“{look.shown(token.text)}”"
    tip = "\n".join([f"{what}: importance {ratio:.2f} × average", *salience])
    marks = []
    for lane in range(height):
        index = next((u for its_lane, u in over if its_lane == lane), None)
        marks.append(_mark(j, token, pair, index))
    kind = " special" if token.special else " more" if token.continues else ""
    held = " ".join(str(u) for _, u in over)
    return (
        f'<span class="token{kind}" title="{_text(tip)}" data-spans="{held}">'
        f'<span class="piece" style="--strength:{100 * float(look.strength(ratio)):.0f}%">{_text(look.visible(token))}'
        f"</span>{''.join(marks)}</span>"
    )


def _mark(j: int, token: Token, pair: LayerPair, index: int | None) -> str:
    if index is None:
        return "<i></i>"
    first, last = pair.spans[index].teacher_tokens
    ends = [" first"] if j == first else []
    if j == first and token.text[:1].isspace() and token.text.strip():
        ends.append(" spaced")
    if j == last - 1:
        ends.append(" last")
    return f'<i class="on{"".join(ends)}"></i>'


# --- matrices ----------------------------------------------------------------------------------------------------


def _matrices(i: int, pair: LayerPair) -> str:
    titles = (("teacher", "Teacher"), ("student", "Student"), ("difference", "Student − teacher"))
    figures = "".join(_matrix(i, kind, title, pair) for kind, title in titles)
    ends = look.scales(pair)
    bars = f"The bar behind a name is the {pair.granularity}’s salience. " if _label_step(len(pair.spans)) == 1 else ""
    return (
        f'<div class="matrices">{figures}</div>'
        f'<p class="ends">Colour scales: distances from 0 to {look.number(ends.distance)}, differences from '
        f"−{look.number(ends.difference)} to +{look.number(ends.difference)}; stronger ones have the last colour. "
        f"{bars}Point at a cell to see its two {pair.granularity}s.</p>"
    )


def _cell(size: int) -> float:
    """Width of a cell in pixels: a whole number where it can be 2 or more, else what fills the matrix, smoothed."""
    return min(float(MATRIX_SIZE // size), LARGEST_CELL) if 2 * size <= MATRIX_SIZE else MATRIX_SIZE / size


def _label_step(size: int) -> int:
    """Every how many spans have room for a label."""
    return math.ceil(LABEL_HEIGHT / _cell(size))


def _matrix(i: int, kind: str, title: str, pair: LayerPair) -> str:
    size = len(pair.spans)
    cell, step = _cell(size), _label_step(size)
    names = [look.label(span.text, LONGEST_LABEL) for span in pair.spans]
    shares = look.weight_shares(pair) if step == 1 else np.zeros(size)  # thinned labels stand for several spans
    rows, columns = (
        "".join(
            f'<span style="--at:{(j + 0.5) * cell:g}px;--share:{100 * share[j]:.0f}%">{_text(names[j])}</span>'
            for j in range(0, size, step)
        )
        for share in (shares, np.zeros(size))
    )
    smooth = ' class="smooth"' if cell < 2 else ""
    images = {}
    for theme in ("light", "dark"):
        if kind == "difference":
            rgb = look.difference_colours(pair, theme)
        else:
            rgb = look.distance_colours(getattr(pair, f"{kind}_distances"), pair, theme)
        images[theme] = "data:image/png;base64," + base64.b64encode(_png(rgb)).decode()
    return (
        f'<figure><figcaption>{title}</figcaption><div class="matrix" style="--size:{cell * size:g}px;'
        f'--above:{min(max(map(len, names)) * 6 + 12, 92)}px">'
        f'<div class="rows">{rows}</div><div class="columns">{columns}</div>'
        f'<div class="cells" data-pair="{i}" data-size="{size}">'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{images["dark"]}">'
        f'<img src="{images["light"]}"{smooth} alt="{title}: {size} × {size} span pairs"></picture>'
        f'<i class="cursor" hidden></i></div></div></figure>'
    )


def _png(rgb: np.ndarray) -> bytes:
    """[height, width, 3] bytes as a PNG file, a pixel for a cell."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = rgb.shape
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rgb.reshape(height, -1)], 1)  # filter 0: as they are
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _data(pair: LayerPair) -> dict[str, Any]:
    """What the tooltips need: span texts, and the upper triangles of both matrices, row after row."""
    upper = np.triu_indices(len(pair.spans), 1)
    return {
        "spans": [look.label(span.text, 60) for span in pair.spans],
        "salience": [float(f"{w:.3g}") for w in pair.salience],
        "teacher": np.round(pair.teacher_distances[upper], 3).tolist(),
        "student": np.round(pair.student_distances[upper], 3).tolist(),
    }


def _worst(pair: LayerPair) -> str:
    if not pair.worst:
        return '<p class="nothing">The student’s distances are the teacher’s: nothing to learn here.</p>'
    most = pair.worst[0].share
    rows = []
    for worst in pair.worst:
        first, second = (f"<bdi>{_text(look.label(pair.spans[u].text, 60))}</bdi>" for u in (worst.first, worst.second))
        verdict = look.verdict(worst.teacher, worst.student)
        rows.append(
            f'<tr data-first="{worst.first}" data-second="{worst.second}"><td>{first}</td><td>{second}</td>'
            f"<td>{worst.teacher:.3f}</td><td>{worst.student:.3f}</td>"
            f'<td class="{verdict.split()[-1]}">{verdict}</td>'
            f'<td><i class="bar" style="--share:{worst.share / most:.2f}"></i>{100 * worst.share:.1f} %</td></tr>'
        )
    head = "".join(
        f"<th>{name}</th>" for name in ("Span", "Span", "Teacher", "Student", "The student has them", "Share of DSA")
    )
    return (
        f'<h3>Where they disagree most</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
