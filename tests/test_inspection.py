"""The inspection of one text: the numbers are the ops', and the command prints and writes them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspections import (
    EDGE_TEXTS,
    EXTRACTOR,
    LONG,
    PAIRS,
    TEXT,
    VOCABULARY,
    char_spans,
    inspect,
    inspected,
    make_config,
    models,
    printed,
    run,
)
from models import make_model, make_tokenizer
from torch import nn

from mta_fast import (
    MTALoss,
    SpanBatch,
    SpanExtractor,
    entropy_weights,
    normalize_weights,
    pool_spans,
    token_importance,
)
from mta_fast.distill.training.checkpoints import save_mta
from mta_fast.errors import InputError

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from rich.console import Console

from mta_fast.inspection import appearance as look
from mta_fast.inspection import inspect_text
from mta_fast.inspection.measure import Span
from mta_fast.inspection.run import inspect_models

# --- numbers -----------------------------------------------------------------------------------------------------


def terms_of_the_loss(loss: MTALoss, teacher_tokenizer: Any = None) -> tuple[list[float], list[float]]:
    """DSA and Hid of each layer pair of TEXT, without the inspection's code."""
    config, (teacher, student) = loss.config, models()
    own, other = make_tokenizer(VOCABULARY), teacher_tokenizer or make_tokenizer(VOCABULARY)
    hidden_t, offsets_t, logits = run(teacher, other, config.teacher_layers)
    hidden_s, offsets_s, _ = run(student, own, config.student_layers)
    spans, teacher_spans = {}, {}
    for kind, found in char_spans(TEXT).items():
        spans[kind], teacher_spans[kind] = SpanBatch.pair([found], (offsets_s, None), (offsets_t, None), texts=[TEXT])
    output = loss(
        hidden_s,
        hidden_t,
        spans,
        teacher_spans=None if teacher_tokenizer is None else teacher_spans,
        entropy_weights=entropy_weights(logits) if config.weighting == "entropy" else None,
    )
    dsa, hid = output.per_layer.quotients()
    return dsa.tolist(), hid.tolist()


ABLATIONS: list[dict[str, Any]] = [
    {},
    {"student_pooling": "own"},
    {"causal": True},
    {"count_padding": True},
    {"weighting": "uniform"},
    {"weighting": "entropy"},
    {"normalization": "sample"},
    {"normalization": "sample", "weighting": "uniform", "student_pooling": "own"},
]


@pytest.mark.parametrize("two_tokenizers", [False, True])
@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_what_is_shown_makes_the_terms_of_the_loss(changes: dict[str, Any], two_tokenizers: bool) -> None:
    config, other = make_config(**changes), make_tokenizer(300) if two_tokenizers else None
    loss = MTALoss(config, 32, 48)
    inspection = inspect(config=config, projections=loss.projections, teacher_tokenizer=other)
    dsa, hid = terms_of_the_loss(loss, other)
    assert [pair.dsa for pair in inspection.layer_pairs] == dsa
    assert [pair.hid for pair in inspection.layer_pairs] == hid
    for pair in inspection.layer_pairs:
        error = np.outer(pair.salience, pair.salience) * (pair.student_distances - pair.teacher_distances) ** 2
        weights = pair.salience.sum() ** 2 - (pair.salience**2).sum()
        assert error.sum() / weights == pytest.approx(pair.dsa, rel=1e-5)
        assert len(pair.worst) == 10
        first = pair.worst[0]
        assert error[first.first, first.second] == error.max()
        assert first.share == pytest.approx(2 * error.max() / error.sum())
        assert [w.share for w in pair.worst] == sorted((w.share for w in pair.worst), reverse=True)


def test_a_term_the_config_leaves_out_is_measured_all_the_same() -> None:
    loss = MTALoss(make_config(), 32, 48)
    whole = inspect(config=loss.config, projections=loss.projections).layer_pairs
    for left_out in ("lambda_dsa", "lambda_hid"):
        made = inspect(config=make_config(**{left_out: 0.0}), projections=loss.projections).layer_pairs
        assert [(pair.dsa, pair.hid) for pair in made] == [(pair.dsa, pair.hid) for pair in whole]


@pytest.mark.parametrize("changes", ABLATIONS[:6], ids=str)
def test_numbers_are_those_of_the_ops(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    inspection = inspect(config=config)
    teacher, student = models()
    hidden_t, offsets, logits = run(teacher, make_tokenizer(VOCABULARY), config.teacher_layers)
    hidden_s, _, _ = run(student, make_tokenizer(VOCABULARY), config.student_layers)
    options = {"causal": config.causal, "count_padding": config.count_padding}
    for i, pair in enumerate(inspection.layer_pairs):
        assert (pair.student_layer, pair.teacher_layer) == PAIRS[i]
        assert pair.hid is None
        batch = SpanBatch.from_char_spans([char_spans(TEXT)[pair.granularity]], offsets, texts=[TEXT])
        importance = token_importance(hidden_t[pair.teacher_layer], rows=batch.rows, **options)
        np.testing.assert_array_equal(pair.importance, importance[0].double().numpy())
        weights = normalize_weights(importance, batch)
        salience = weights.span
        if config.weighting != "importance":
            certain = config.weighting == "entropy"
            salience = normalize_weights(entropy_weights(logits), batch).span if certain else torch.ones_like(salience)
        np.testing.assert_array_equal(pair.salience, salience.double().numpy())
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


def test_projections_of_other_widths_are_refused() -> None:
    with pytest.raises(InputError, match=r"projections: expected \(student, teacher\) widths \[\(32, 48\), .*got \["):
        inspect(projections=MTALoss(make_config(), 16, 48).projections)


def test_two_tokenizers() -> None:
    inspection = inspect(teacher_tokenizer=make_tokenizer(300))
    assert inspection.two_tokenizers
    assert len(inspection.tokens) > len(inspection.student_tokens)
    for pair in inspection.layer_pairs:
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


def test_a_checkpoint_brings_its_settings_and_projections(tmp_path: Path) -> None:
    teacher, student = models()
    torch.manual_seed(3)
    loss = MTALoss(make_config(granularity="word", lambda_hid=0.5), 32, 48)
    for name, model in (("big", teacher), ("checkpoint", student)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer(VOCABULARY).save_pretrained(tmp_path / name)
    save_mta(tmp_path / "checkpoint", loss, loss.state_dict())
    folders = str(tmp_path / "big"), str(tmp_path / "checkpoint")
    made = inspect_models(TEXT, *folders, extractor=EXTRACTOR, console=Console(file=io.StringIO()))
    expected = inspect(config=loss.config, projections=loss.projections)
    assert [pair.granularity for pair in made.layer_pairs] == ["word", "word"]
    assert [pair.hid for pair in made.layer_pairs] == pytest.approx([pair.hid for pair in expected.layer_pairs])
