"""Every view of an inspection shows its numbers, for every kind of text."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from inspections import (
    EDGE_TEXTS,
    EXTRACTOR,
    LONG,
    PAIRS,
    TEXT,
    VOCABULARY,
    inspect,
    inspected,
    make_config,
    models,
    printed,
)
from models import make_tokenizer

from mta_fast import (
    SpanExtractor,
)

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from PIL import Image
from rich.console import Console

from mta_fast.inspection import Inspection, inspect_text, render_terminal, write_html, write_png
from mta_fast.inspection import appearance as look

# --- terminal ----------------------------------------------------------------------------------------------------


def test_terminal_without_colours_shows_importance_and_spans() -> None:
    inspection = inspected("ordinary")
    output = printed(inspection)
    assert "\x1b" not in output
    lines = output.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("The old keeper"))
    text, bars, marks = (line.ljust(100) for line in lines[at : at + 3])
    assert set(bars.strip()) <= set("▁▂▃▄▅▆▇█")
    assert len(set(bars.strip())) > 1
    assert len(bars.strip()) == len(text.rstrip())
    for word in ("The", "old", "keeper"):
        begin = text.index(word)
        assert (marks[begin], marks[begin + len(word) - 1]) == ("╰", "╯")
        assert marks[begin + len(word)] == " "
    for title in ("teacher: distances", "student: distances", "student - teacher", "Where they disagree most"):
        assert title in output
    assert all(len(line) <= 100 for line in lines)
    pair = inspection.layer_pairs[0]
    assert f"DSA {look.number(pair.dsa)}" in output
    assert f"{pair.worst[0].teacher:.3f}" in output


def test_terminal_with_colours_and_with_ascii_only() -> None:
    inspection = inspected("emoji")
    coloured = printed(inspection, force_terminal=True, color_system="truecolor")
    assert "48;2;" in coloured
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render_terminal(inspection, Console(file=file, width=80))
    file.flush()
    plain = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "\\U0001f408" in plain
    assert re.search(r"^[1-8 ]+$", plain, re.MULTILINE)


@pytest.mark.parametrize("name", EDGE_TEXTS)
@pytest.mark.parametrize("width", [40, 120])
def test_terminal_takes_every_text(name: str, width: int) -> None:
    output = printed(inspected(name), width)
    assert "\x1b" not in output
    assert output.count("DSA ") >= len(PAIRS)
    nothing = "No words were found in this text: MTA has nothing to compare here, DSA is 0."
    assert (nothing in " ".join(output.split())) == (name == "no spans")


# --- page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What the tests read of a page; fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[list[str]] = []
        self.titles: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        values = dict(attrs)
        if tag == "section":
            self.pieces.append([])
        if values.get("class") == "piece":
            self.pieces[-1].append("")
        if "title" in values:
            self.titles.append(values["title"] or "")
        if tag not in ("meta", "img", "source"):
            self.open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, values = self.open[-1] if self.open else ("", {})
        if values.get("class") == "piece":
            self.pieces[-1][-1] += data
        if tag == "script":
            self.scripts.append(data)
        else:
            self.words += data


def make_page(inspection: Inspection, tmp_path: Path) -> tuple[str, Page]:
    write_html(inspection, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("name", EDGE_TEXTS)
def test_page_shows_every_token_of_every_text(name: str, tmp_path: Path) -> None:
    inspection = inspected(name)
    text, page = make_page(inspection, tmp_path)
    assert page.pieces == [[look.visible(token) for token in inspection.tokens]] * len(PAIRS)
    assert len(page.titles) == len(PAIRS) * len(inspection.tokens)
    assert "importance" in page.titles[0]
    for name_of, value in page.attributes:  # nothing is fetched
        assert name_of not in ("src", "srcset", "href") or (value or "").startswith("data:image/png;base64,")
    assert "http" not in text
    assert len(text) < 3_000_000


def test_page_escapes_the_text(tmp_path: Path) -> None:
    text = "He wrote <script>alert('x')</script> & \"quoted\" <!-- </title> it all."

    def by_space(text: str) -> dict[str, list[tuple[int, int]]]:
        return {"word": [m.span() for m in re.finditer(r"\S+", text)]}

    config = make_config(layer_pairs=PAIRS[:1], granularity="word")
    extractor = SpanExtractor(by_space, granularity="word")
    inspection = inspect_text(text, *models(), make_tokenizer(VOCABULARY), config, extractor)
    written, page = make_page(inspection, tmp_path)
    assert len(page.scripts) == 2  # the data and the page's own
    assert "<script>alert" not in written
    assert "".join(page.pieces[0]) == text
    assert json.loads(page.scripts[0])[0]["spans"] == text.split()


def test_page_tooltips_know_both_distances(tmp_path: Path) -> None:
    inspection = inspected("ordinary")
    _, page = make_page(inspection, tmp_path)
    for pair, data in zip(inspection.layer_pairs, json.loads(page.scripts[0]), strict=True):
        upper = np.triu_indices(len(pair.spans), 1)
        assert data["spans"] == [span.text for span in pair.spans]
        np.testing.assert_allclose(data["teacher"], pair.teacher_distances[upper], atol=5.1e-4)
        np.testing.assert_allclose(data["student"], pair.student_distances[upper], atol=5.1e-4)
        n = len(pair.spans)
        for u, v in ((0, 1), (2, 5), (n - 2, n - 1)):  # the place the script looks at
            at = u * (2 * n - u - 1) // 2 + v - u - 1
            assert data["teacher"][at] == pytest.approx(pair.teacher_distances[u, v], abs=5.1e-4)


def test_page_matrices_are_pictures_of_the_distances(tmp_path: Path) -> None:
    inspection = inspected("ordinary")
    _, page = make_page(inspection, tmp_path)
    sources = [value for name, value in page.attributes if name == "src" and value]
    assert len(sources) == 3 * len(PAIRS)
    pair = inspection.layer_pairs[1]
    for source, expected in zip(
        sources[3:],
        (
            look.distance_colours(pair.teacher_distances, pair, "light"),
            look.distance_colours(pair.student_distances, pair, "light"),
            look.difference_colours(pair, "light"),
        ),
        strict=True,
    ):
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
    near, far = look.NEAR_TO_FAR["light"][0][1], look.NEAR_TO_FAR["light"][-1][1]
    colours = look.distance_colours(pair.teacher_distances, pair, "light")
    assert tuple(colours[0, 0]) == near
    farthest = np.unravel_index(pair.teacher_distances.argmax(), pair.teacher_distances.shape)
    assert np.abs(colours[farthest].astype(int) - far).max() < 60


def test_equal_models_have_nothing_to_learn(tmp_path: Path) -> None:
    teacher, _ = models()
    config = make_config(layer_pairs=((2, 2),), granularity="word")
    inspection = inspect_text(TEXT, teacher, teacher, make_tokenizer(VOCABULARY), config, EXTRACTOR)
    assert inspection.layer_pairs[0].dsa == 0
    assert inspection.layer_pairs[0].worst == ()
    assert "nothing to learn here" in printed(inspection)
    assert "nothing to learn here" in make_page(inspection, tmp_path)[1].words


# --- picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ordinary", "code", "control characters", "emoji", "right to left", "no spans"])
def test_picture(name: str, tmp_path: Path) -> None:
    inspection = inspected(name)
    if name != "ordinary":
        inspection = replace(inspection, layer_pairs=inspection.layer_pairs[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: no glyph for a character
        write_png(inspection, tmp_path / "picture.png")
    image = Image.open(tmp_path / "picture.png")
    image.load()
    assert image.format == "PNG"
    assert 1200 < image.width < 1600  # at the width of a page, 800 pixels, its words are read
    assert 300 < image.height < 3000
    assert _right_edge_is_empty(image)


def test_picture_of_a_long_text(tmp_path: Path) -> None:
    long = inspect(LONG, make_config(layer_pairs=PAIRS[:1], granularity="word"))
    assert len(long.tokens) == 256
    write_png(long, tmp_path / "picture.png")
    image = Image.open(tmp_path / "picture.png")
    assert 700 < image.height < 3000
    assert _right_edge_is_empty(image)


def _right_edge_is_empty(image: Image.Image) -> bool:
    """Nothing is cut off there."""
    return np.asarray(image.convert("L"))[:, -10:].min() == 255
