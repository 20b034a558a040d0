"""write_html: the inspection as one web page that needs nothing but itself (``templates/``)."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from mta_fast.files import Kind, check_target, marked, write_whole
from mta_fast.inspection import appearance as look
from mta_fast.inspection.measure import Inspection, LayerPair
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
    place = check_target(path, PAGE)
    data = [_data(pair) for pair in inspection.layer_pairs]
    write_whole(place, _template().render(inspection=inspection, data=data))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mta_fast.inspection"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.globals.update(look=look, tokens_of=_tokens, matrices_of=_matrices)
    return environment.get_template("page.html.jinja")


class _Token(NamedTuple):
    """A token as the page shows it."""

    gap: str
    text: str
    kind: str
    tip: str
    strength: str  # per cent
    spans: str  # positions of the spans over it
    marks: list[str]  # CSS classes, a mark for each lane; "" where no span is
    ends_line: bool


def _tokens(tokens: Sequence[Token], pair: LayerPair) -> Iterator[_Token]:
    lanes, ends = look.lanes(pair.spans), look.line_ends(tokens)
    for j, token in enumerate(tokens):
        over = [u for u, span in enumerate(pair.spans) if j in range(*span.teacher_tokens)]
        marks = [""] * (max(lanes, default=-1) + 1)
        for u in over:
            marks[lanes[u]] = _mark(j, token, *pair.spans[u].teacher_tokens)
        ratio = float(pair.relative_importance[j])
        what = f"further bytes of “{token.text}”" if token.continues else f"“{look.shown(token.text)}”"
        salience = [
            f"{pair.granularity} “{look.label(pair.spans[u].text, 60)}”: salience {look.number(pair.salience[u])}"
            for u in over
        ]
        yield _Token(
            gap=look.shown(token.gap),
            text=look.visible(token),
            kind=" special" if token.special else " more" if token.continues else "",
            tip="\n".join([f"{what}: importance {ratio:.2f} × average", *salience]),
            strength=f"{100 * float(look.strength(ratio)):.0f}",
            spans=" ".join(map(str, over)),
            marks=marks,
            ends_line=j in ends,
        )


def _mark(j: int, token: Token, first: int, last: int) -> str:
    """The CSS classes of a span's mark, the span [first, last), below token j."""
    spaced = j == first and token.text[:1].isspace() and token.text.strip()
    parts = (("on", True), ("first", j == first), ("spaced", spaced), ("last", j == last - 1))
    return " ".join(name for name, holds in parts if holds)


class _Label(NamedTuple):
    """A span's name beside a matrix."""

    text: str
    at: str  # pixels to its middle
    share: str  # per cent that its bar is of the longest


class _Matrices(NamedTuple):
    """The three matrices of a layer pair: what they share, and {title: {theme: data URL of a picture}}."""

    width: str  # pixels
    above: int  # pixels for the names of the columns
    labels: list[_Label]
    bars: bool  # every span has a label, and on it a bar for its salience
    smooth: bool  # cells of less than 2 pixels
    images: dict[str, dict[str, str]]


def _matrices(pair: LayerPair) -> _Matrices:
    size = len(pair.spans)
    # a whole number of pixels a cell where it can be 2 or more, else what fills the matrix, smoothed
    cell = min(float(MATRIX_SIZE // size), LARGEST_CELL) if 2 * size <= MATRIX_SIZE else MATRIX_SIZE / size
    step = math.ceil(LABEL_HEIGHT / cell)  # every how many spans have room for a label
    names = [look.label(span.text, LONGEST_LABEL) for span in pair.spans]
    shares = look.weight_shares(pair) if step == 1 else np.zeros(size)  # thinned labels stand for several spans
    images: dict[str, dict[str, str]] = {"Teacher": {}, "Student": {}, "Student − teacher": {}}
    for theme in ("light", "dark"):
        colours = (
            look.distance_colours(pair.teacher_distances, pair, theme),
            look.distance_colours(pair.student_distances, pair, theme),
            look.difference_colours(pair, theme),
        )
        for image, rgb in zip(images.values(), colours, strict=True):
            image[theme] = "data:image/png;base64," + base64.b64encode(_png(rgb)).decode()
    return _Matrices(
        width=f"{cell * size:g}",
        above=min(max(map(len, names)) * 6 + 12, 92),
        labels=[_Label(names[j], f"{(j + 0.5) * cell:g}", f"{100 * shares[j]:.0f}") for j in range(0, size, step)],
        bars=step == 1,
        smooth=cell < 2,
        images=images,
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
