"""The inspection of one text: the numbers are the ops', and every view shows them for every kind of text."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import warnings
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_model, make_tokenizer
from torch import nn

from mta_fast import (
    MTAConfig,
    MTALoss,
    SpanBatch,
    SpanExtractor,
    capture_layers,
    entropy_weights,
    normalize_weights,
    pool_spans,
    token_importance,
)
from mta_fast.errors import InputError

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from PIL import Image
from rich.console import Console

from mta_fast.inspection import Inspection, inspect_text, render_terminal, write_html, write_png
from mta_fast.inspection import appearance as look
from mta_fast.inspection.measure import Span
from mta_fast.inspection.run import inspect_models

VOCABULARY = 512
PAIRS = ((1, 2), (3, 6))  # the second: both after the final norm
TEXT = "The old keeper climbed the stairs, because a storm broke the lamp."
LONG = " ".join(f"{TEXT} Number {i} and naïve tea." for i in range(14))
EDGE_TEXTS = {
    "two words": "Hello world",
    "code": "Fix:\n\n```python\n\tdef mean(xs):  # $a_1^2$ <b>&amp;</b>\n```\r\n",
    "control characters": "bell \x07 and \x1b[31mred\x1b[0m\x7f \u202eoverride [bold]x[/bold]",
    "emoji": "Die Katze 🐈 trinkt 日本 tea 👩‍👩‍👧 in Zürich 🙂🙂.",
    "right to left": "مرحبا بالعالم، القطة تشرب الحليب.",
    "combining": "a\u0301 \u0301 e\u0301te\u0301 हिन्दी",
    "no spans": "... !!!",
    "special token": "one<|endoftext|>two three",
    "long": LONG,
}


def char_spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """Words, and every two neighbouring words as a phrase (these overlap)."""
    words = [(m.start(), m.end()) for m in re.finditer(r"[^\W\d]+", text)]
    return {"word": words, "phrase": [(a, d) for (a, _), (_, d) in itertools.pairwise(words)]}


EXTRACTOR = SpanExtractor(char_spans)


@cache
def models() -> tuple[Any, Any]:
    return make_model("gpt2", 6, 48, VOCABULARY).eval(), make_model("gpt2", 3, 32, VOCABULARY).eval()


def make_config(**changes: Any) -> MTAConfig:
    return MTAConfig(**({"layer_pairs": PAIRS, "granularity": ("word", "phrase")} | changes))


def inspect(text: str = TEXT, config: MTAConfig | None = None, **options: Any) -> Inspection:
    teacher, student = models()
    return inspect_text(
        text, teacher, student, make_tokenizer(VOCABULARY), config or make_config(), EXTRACTOR, **options
    )


@cache
def inspected(name: str) -> Inspection:
    return inspect(TEXT if name == "ordinary" else EDGE_TEXTS[name])


def run(model: Any, tokenizer: Any, layers: list[int], text: str = TEXT) -> tuple[Any, Any, torch.Tensor]:
    """Hidden states, offsets and logits, without the inspection's code."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad(), capture_layers(model, layers) as hidden:
        logits = model(input_ids=encoded["input_ids"]).logits
    return hidden, encoded["offset_mapping"], logits


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student_pooling": "own"},
        {"causal": True},
        {"weighting": "uniform"},
        {"weighting": "entropy"},
        {"normalization": "sample", "lambda_dsa": 0.0},
    ],
    ids=str,
)
def test_numbers_are_those_of_the_ops_and_of_mta_loss(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    inspection = inspect(config=config)
    teacher, student = models()
    hidden_t, offsets, logits = run(teacher, make_tokenizer(VOCABULARY), config.teacher_layers)
    hidden_s, _, _ = run(student, make_tokenizer(VOCABULARY), config.student_layers)
    spans = {
        kind: SpanBatch.from_char_spans([found], offsets, texts=[TEXT]) for kind, found in char_spans(TEXT).items()
    }
    certainty = entropy_weights(logits) if config.weighting == "entropy" else None
    loss = MTALoss(make_config(**(changes | {"lambda_dsa": 1.0, "lambda_hid": 0.0})), 32, 48)
    terms = loss(hidden_s, hidden_t, spans, entropy_weights=certainty).per_layer
    for i, pair in enumerate(inspection.layer_pairs):
        assert (pair.student_layer, pair.teacher_layer) == PAIRS[i]
        batch = spans[pair.granularity]
        importance = token_importance(hidden_t[pair.teacher_layer], causal=config.causal)
        np.testing.assert_array_equal(pair.importance, importance[0].double().numpy())
        weights = normalize_weights(importance, batch)
        own = weights.token
        if config.student_pooling == "own":
            own = normalize_weights(token_importance(hidden_s[pair.student_layer]), batch).token
        for distances, hidden, token_weights in (
            (pair.teacher_distances, hidden_t[pair.teacher_layer], weights.token),
            (pair.student_distances, hidden_s[pair.student_layer], own),
        ):
            pooled, _ = pool_spans(hidden, token_weights, batch)
            cosine = torch.cosine_similarity(pooled[:, None].double(), pooled[None].double(), dim=-1)
            np.testing.assert_allclose(distances, 1 - cosine.numpy(), atol=1e-12)
            assert (distances == distances.T).all()
            assert (distances.diagonal() == 0).all()
        dsa = terms.dsa_numerator[i] / terms.dsa_denominator[i]
        assert pair.dsa == pytest.approx(dsa.item(), rel=1e-6)
        assert pair.hid is None
        # the matrices and saliences shown give the DSA shown
        error = np.outer(pair.salience, pair.salience) * (pair.student_distances - pair.teacher_distances) ** 2
        assert error.sum() / (pair.salience.sum() ** 2 - (pair.salience**2).sum()) == pytest.approx(pair.dsa, rel=1e-4)
        assert len(pair.worst) == 10
        first = pair.worst[0]
        assert error[first.first, first.second] == error.max()
        assert first.share == pytest.approx(2 * error.max() / error.sum())
        assert [w.share for w in pair.worst] == sorted((w.share for w in pair.worst), reverse=True)


def test_hid_goes_through_the_given_projections() -> None:
    config = make_config()
    teacher, student = models()
    loss = MTALoss(config, 32, 48)
    inspection = inspect(config=config, projections=loss.projections)
    hidden_t, offsets, _ = run(teacher, make_tokenizer(VOCABULARY), config.teacher_layers)
    hidden_s, _, _ = run(student, make_tokenizer(VOCABULARY), config.student_layers)
    spans = {
        kind: SpanBatch.from_char_spans([found], offsets, texts=[TEXT]) for kind, found in char_spans(TEXT).items()
    }
    terms = loss(hidden_s, hidden_t, spans).per_layer
    expected = (terms.hid_numerator / terms.hid_denominator).tolist()
    assert [pair.hid for pair in inspection.layer_pairs] == pytest.approx(expected)
    with pytest.raises(InputError, match=r"projections: expected \(student, teacher\) widths \[\(32, 48\), .*got \["):
        inspect(projections=MTALoss(config, 16, 48).projections)


def test_two_tokenizers() -> None:
    other = make_tokenizer(300)
    inspection = inspect(teacher_tokenizer=other)
    assert inspection.two_tokenizers
    assert len(inspection.tokens) > len(inspection.student_tokens)
    teacher, student = models()
    config = make_config()
    hidden_t, offsets_t, _ = run(teacher, other, config.teacher_layers)
    hidden_s, offsets_s, _ = run(student, make_tokenizer(VOCABULARY), config.student_layers)
    pairs = {
        kind: SpanBatch.pair([found], (offsets_s, None), (offsets_t, None), texts=[TEXT])
        for kind, found in char_spans(TEXT).items()
    }
    terms = MTALoss(make_config(lambda_hid=0.0), 32, 48)(
        hidden_s,
        hidden_t,
        {kind: pair[0] for kind, pair in pairs.items()},
        teacher_spans={kind: pair[1] for kind, pair in pairs.items()},
    ).per_layer
    for i, pair in enumerate(inspection.layer_pairs):
        assert pair.dsa == pytest.approx((terms.dsa_numerator[i] / terms.dsa_denominator[i]).item())
        assert len(pair.importance) == len(inspection.tokens)
        for span in pair.spans:
            for tokens, (first, last) in (
                (inspection.tokens, span.teacher_tokens),
                (inspection.student_tokens, span.student_tokens),
            ):
                assert "".join(token.text for token in tokens[first:last]).strip() == span.text
    assert "The student's tokenizer makes" in printed(inspection)
    assert not inspect().two_tokenizers


def test_importance_is_relative_to_an_average_token() -> None:
    pair = inspected("ordinary").layer_pairs[0]
    assert pair.relative_importance.mean() == pytest.approx(1)
    assert pair.salience.sum() == pytest.approx(1)


def test_models_and_random_numbers_are_left_alone() -> None:
    teacher, student = models()
    student.transformer.h[0].train()
    before = torch.get_rng_state()
    try:
        inspect()
        assert student.transformer.h[0].training
        assert not student.training
        assert not teacher.training
        assert all(parameter.grad is None for parameter in student.parameters())
        assert torch.equal(before, torch.get_rng_state())
    finally:
        student.eval()


def test_truncation_drops_spans() -> None:
    inspection = inspect(max_length=20)
    assert len(inspection.tokens) == 20
    assert inspection.truncated
    kept, words = inspection.spans["word"], char_spans(TEXT)["word"]
    assert 0 < len(kept) < len(words)
    assert inspection.dropped["word"] == len(words) - len(kept)
    assert [(span.start, span.end) for span in kept] == words[: len(kept)]
    assert "only its beginning was read" in printed(inspection)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "text: expected some characters, got ''"),
        ({"text": " \n"}, "text: expected some characters"),
        ({"text": None}, "text: expected some characters, got None"),
        ({"config": make_config(layer_pairs=((1, 2), (3, 7)))}, "layers: expected hidden-state indices 0 to 6"),
        ({"extractor": SpanExtractor(char_spans, granularity="word")}, "extractor: expected one for phrase, word"),
        (
            {"student_model": make_model("gpt2", 3, 32, 64)},
            "expected ids below 64 .the student's embeddings",
        ),
        ({"text": LONG, "max_length": 2000}, "text: expected at most 1024 tokens .student., got"),
        ({"max_length": 0}, "max_length: expected an integer >= 1"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    teacher, student = models()
    if change.get("max_length"):
        change = change | {"text": LONG * 3}
    arguments = {"text": TEXT, "teacher_model": teacher, "student_model": student, "config": make_config()}
    arguments |= {"tokenizer": make_tokenizer(VOCABULARY), "extractor": EXTRACTOR}
    with pytest.raises(InputError, match=message):
        inspect_text(**(arguments | change))


def test_states_that_are_not_finite_are_named() -> None:
    student = make_model("gpt2", 3, 32, VOCABULARY)
    nn.init.constant_(student.transformer.h[1].mlp.c_fc.weight, torch.nan)
    with pytest.raises(InputError, match="student, layer 3: expected finite hidden states"):
        inspect_text(TEXT, models()[0], student, make_tokenizer(VOCABULARY), make_config(), EXTRACTOR)


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDGE_TEXTS)
def test_tokens_are_the_text(name: str) -> None:
    inspection = inspected(name)
    text = "".join(token.gap + token.text for token in inspection.tokens if not token.continues)
    assert inspection.text.startswith(text)
    assert inspection.truncated or text == inspection.text


def test_bytes_and_special_tokens_are_visible() -> None:
    cat = [token for token in inspected("emoji").tokens if token.text == "🐈"]
    assert [token.continues for token in cat] == [False, True, True, True]
    assert [look.visible(token) for token in cat] == ["🐈", "⋯", "⋯", "⋯"]
    special = next(token for token in inspected("special token").tokens if token.special)
    assert special.text == "<|endoftext|>"


def test_shown_hides_nothing_and_steers_nothing() -> None:
    assert look.shown("a\n\tb\r") == "a↵⇥b␍"
    assert look.shown("  ") == "··"
    assert look.shown(" word") == " word"
    assert look.shown("\x1b[0m\x7f\x9b\u202e") == "␛[0m␡��"
    assert look.shown("\u0301") == "◌\u0301"
    assert look.shown("\u200d") == "U+200D"
    assert look.label("one \n two three", 9) == "one two…"
    assert look.right_to_left("12 مرحبا abc")
    assert not look.right_to_left("12 ... abc مرحبا")


def test_spans_that_share_tokens_get_lanes_of_their_own() -> None:
    spans = [Span("", 0, 1, tokens, tokens) for tokens in ((4, 6), (0, 3), (2, 5), (3, 4), (0, 9), (6, 7))]
    lanes = look.lanes(spans)
    for i, first in enumerate(spans):
        for j in range(i):
            (a, b), (c, d) = first.teacher_tokens, spans[j].teacher_tokens
            assert lanes[i] != lanes[j] or b <= c or d <= a
    assert max(lanes) == 2  # at most three spans share a token


# --- terminal ----------------------------------------------------------------------------------------------------


def printed(inspection: Inspection, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    render_terminal(inspection, Console(file=file, width=width, **options))
    return file.getvalue()


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
    assert 1500 < image.width < 2500
    assert 300 < image.height < 3000


def test_picture_of_a_long_text(tmp_path: Path) -> None:
    long = inspect(LONG, make_config(layer_pairs=PAIRS[:1], granularity="word"))
    assert len(long.tokens) == 256
    write_png(long, tmp_path / "picture.png")
    assert 700 < Image.open(tmp_path / "picture.png").height < 3000


# --- command -----------------------------------------------------------------------------------------------------


def test_inspect_models_prints_and_writes(tmp_path: Path) -> None:
    for name, model in zip(("big", "small"), models(), strict=True):
        model.save_pretrained(tmp_path / name)
        make_tokenizer(VOCABULARY).save_pretrained(tmp_path / name)
    file = io.StringIO()
    inspection = inspect_models(
        TEXT,
        str(tmp_path / "big"),
        str(tmp_path / "small"),
        html=tmp_path / "out" / "page.html",
        png=tmp_path / "out" / "picture.png",
        extractor=EXTRACTOR,
        console=Console(file=file, width=100),
    )
    assert "What MTA sees: big teaches small" in file.getvalue()
    assert [(p.student_layer, p.teacher_layer) for p in inspection.layer_pairs] == [(2, 4), (3, 6)]
    assert [p.granularity for p in inspection.layer_pairs] == ["word", "phrase"]
    assert not inspection.two_tokenizers
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["page.html", "picture.png"]
