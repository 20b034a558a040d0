"""SpanCache."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT, wait_for

from mta_fast import SpanExtractor
from mta_fast.errors import InputError
from mta_fast.spans import cache as cache_module
from mta_fast.spans.cache import SpanCache, describe_cache, look_up, summarize_cache

TESTS = Path(__file__).parent
TEXTS = ["The old dog has often barked.", "", "Café ☕ costs 3.50 €.", "Stop!"]


class Source:
    """A function source that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> dict[str, Any]:
        self.asked.append(text)
        if text == "wrong":
            raise KeyError(text)
        return {"word": [(i, i + 1) for i in range(len(text))], "phrase": [(0, len(text))] if text else []}


def _cache(folder: Path, source: Source | None = None, **options: Any) -> SpanCache:
    return SpanCache(SpanExtractor(source or Source(), name="letters-v1", **options), folder)


def test_equals_the_extractor_and_asks_for_each_missing_text_once(tmp_path: Path) -> None:
    source = Source()
    texts = [*TEXTS, *TEXTS[:2]]
    expected = SpanExtractor(Source())(texts)
    assert _cache(tmp_path, source)(texts) == expected
    assert source.asked == TEXTS
    assert _cache(tmp_path, source)(["new", *texts])["word_spans"][1:] == expected["word_spans"]
    assert source.asked == [*TEXTS, "new"]
    assert len(_cache(tmp_path)) == 5
    assert _cache(tmp_path)([]) == {"word_spans": [], "phrase_spans": []}


def test_batches_of_datasets_and_arrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    cache, extractor = _cache(tmp_path), SpanExtractor(Source())
    table = pa.table({"text": TEXTS})
    assert cache(table).equals(extractor(table))
    assert cache({"text": TEXTS}) == extractor({"text": TEXTS})
    assert cache.fill({"text": ["new"]}) == 1
    assert pickle.loads(pickle.dumps(cache))(TEXTS) == extractor(TEXTS)
    with pytest.raises(InputError, match="text of row 1: expected a string, got None"):
        cache(["a", None])


def test_words_and_phrases_are_kept_apart(tmp_path: Path) -> None:
    source = Source()
    words = _cache(tmp_path, source, granularity="word")
    assert words(TEXTS) == SpanExtractor(Source(), granularity="word")(TEXTS)
    assert words.summary().phrase_texts == 0
    assert look_up(words.path, "Stop!") == {"word_spans": [[i, i + 1] for i in range(5)]}
    assert _cache(tmp_path, source)(TEXTS) == SpanExtractor(Source())(TEXTS)
    assert source.asked == TEXTS * 2
    phrases = _cache(tmp_path, source, granularity="phrase")
    assert phrases(TEXTS) == SpanExtractor(Source(), granularity="phrase")(TEXTS)
    assert words(TEXTS) == SpanExtractor(Source(), granularity="word")(TEXTS)
    assert source.asked == TEXTS * 2


def test_spacy_is_not_imported_when_nothing_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("spacy", reason="needs spaCy")
    script = (
        "import json, sys; from mta_fast import SpanExtractor; from mta_fast.spans.cache import SpanCache\n"
        "spans = SpanCache(SpanExtractor(), sys.argv[1])(json.loads(sys.argv[2]))\n"
        "print(json.dumps([spans, 'spacy' in sys.modules]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(TEXTS)]
    expected = SpanExtractor()(TEXTS)
    assert SpanCache(SpanExtractor(), tmp_path)(TEXTS) == expected
    assert json.loads(subprocess.check_output(command)) == [expected, False]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("en_core_web_sm")
    assert "spaCy pipeline en_core_web_sm" in summarize_cache(path).made_by


def test_numbers_and_description(tmp_path: Path) -> None:
    cache = SpanCache(SpanExtractor(Source(), name="letters-v1"), tmp_path)
    cache.fill(TEXTS)
    numbers = cache.summary()
    assert (numbers.texts, numbers.words, numbers.phrases) == (4, sum(map(len, TEXTS)), 3)
    assert numbers.bytes == cache.path.stat().st_size
    for path in (cache.path, tmp_path):
        assert describe_cache(path).splitlines() == [
            f"{cache.path}",
            "made by  function letters-v1",
            "texts    4",
            f"words    {sum(map(len, TEXTS))} in 4 texts",
            "phrases  3 in 4 texts",
            f"size     {numbers.bytes:,} bytes",
        ]
    assert look_up(cache.path, "Stop!") == {"word_spans": [[i, i + 1] for i in range(5)], "phrase_spans": [[0, 5]]}
    assert look_up(cache.path, "never seen") is None


def test_progress_says_how_many_were_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = _cache(tmp_path)
    cache(TEXTS[:2])
    cache([*TEXTS, TEXTS[0]], progress=True)
    told = capsys.readouterr().err
    assert f"spans: 3 of 5 texts from {cache.path}" in told
    assert "2/2" in told
    cache(TEXTS, progress=True)
    assert capsys.readouterr().err == f"spans: 4 of 4 texts from {cache.path}\n"


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_FAST_CACHE", str(tmp_path / "a/b"))
    extractor = SpanExtractor(Source(), name="v1/ü x")
    assert SpanCache(extractor).path.parent == tmp_path / "a/b"
    monkeypatch.delenv("MTA_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SpanCache(extractor).path.parent == tmp_path / ".cache/mta_fast/spans"


# --- who made it -------------------------------------------------------------------------------------------------


def test_each_source_and_version_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy", reason="needs spaCy")
    paths = {SpanCache(SpanExtractor(Source(), name=name), tmp_path).path for name in ("a", "b")}
    paths.add(SpanCache(SpanExtractor(), tmp_path).path)
    monkeypatch.setattr("mta_fast.spans.extract.SPAN_RULES", 2)
    paths.add(SpanCache(SpanExtractor(), tmp_path).path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    paths.add(SpanCache(SpanExtractor(), tmp_path).path)
    assert len(paths) == 5


def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy", reason="needs spaCy")
    file = tmp_path / "spans.sqlite"
    SpanCache(SpanExtractor(), file=file)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    with pytest.raises(InputError, match=r"spaCy 9\.9, rules 1, got one made by spaCy .*spaCy 3.*delete this one"):
        SpanCache(SpanExtractor(), file=file)
    with pytest.raises(InputError, match="expected one made by function b, got one made by spaCy pipeline en_core"):
        SpanCache(SpanExtractor(Source(), name="b"), file=file)


def test_a_folder_trained_again_is_another_source(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="needs spaCy")
    model = tmp_path / "model"
    spacy.blank("en").to_disk(model)
    extractor = SpanExtractor(str(model), granularity="word")
    before = SpanCache(extractor, tmp_path / "cache").path
    assert SpanCache(extractor, tmp_path / "cache").path == before
    (model / "vocab/strings.json").write_text('["other"]')
    assert SpanCache(extractor, tmp_path / "cache").path != before


def test_a_function_needs_a_name_and_a_model_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name: expected one for a function .* name='sentences-v1'"):
        SpanCache(SpanExtractor(Source()), tmp_path)
    pytest.importorskip("spacy", reason="needs spaCy")
    with pytest.raises(InputError, match="name: expected one only with a function, got 'x'"):
        SpanExtractor(name="x")


# --- what goes wrong ---------------------------------------------------------------------------------------------

_FILL = """
import os, resource, sys
from pathlib import Path
from processes import hold
from mta_fast import SpanExtractor
from mta_fast.spans import cache as cache_module
from mta_fast.spans.cache import SpanCache

folder, stop, limit, together = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cache_module.COMMIT_TEXTS, cache_module.COMMIT_SECONDS = 10, float("inf")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def letters(text):
    if text == "5":  # begin together
        (folder / f"begun-{os.getpid()}").touch()
        hold(os.getppid(), lambda: len(list(folder.glob("begun-*"))) >= together)
    if text == stop:
        (folder / "there").touch()
        hold(os.getppid())
    with (folder / "asked").open("a") as asked:
        asked.write(text + "\\n")
    return {"word": [(0, 1)] * 100, "phrase": []}

SpanCache(SpanExtractor(letters, name="letters-v1"), folder)([str(i) for i in range(200)])
"""


def _filling(folder: Path, stop: str = "", limit: int = 0, together: int = 1) -> subprocess.Popen[str]:
    """A process that fills the cache up to the text at which it stops for ever."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _FILL, str(folder), stop, str(limit), str(together)]
    path = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("stop", "kept"), [(signal.SIGKILL, 40), (signal.SIGTERM, 40), (signal.SIGINT, 45)])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, stop: signal.Signals, kept: int) -> None:
    process = _filling(tmp_path, stop="45")
    wait_for(lambda: (tmp_path / "there").exists() or process.poll() is not None)
    process.send_signal(stop)
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == -stop, told
    assert (tmp_path / "asked").read_text().split() == [str(i) for i in range(45)]
    (file,) = tmp_path.glob("*.sqlite")
    assert summarize_cache(file).texts == kept
    source = Source()
    _cache(tmp_path, source)([str(i) for i in range(200)])
    assert source.asked == [str(i) for i in range(kept, 200)]


def test_no_space_left_keeps_the_earlier_texts(tmp_path: Path) -> None:
    process = _filling(tmp_path, limit=100_000)
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    (file,) = tmp_path.glob("*.sqlite")
    assert f"OSError: span cache {file}: can't be written" in told
    assert "free space on that disk and run again" in told
    kept = summarize_cache(file).texts
    assert 50 < kept < 150
    assert kept % 10 == 0
    assert look_up(file, str(kept - 1)) == {"word_spans": [[0, 1]] * 100, "phrase_spans": []}
    assert _cache(tmp_path).fill([str(i) for i in range(200)]) == 200 - kept


def test_two_processes_fill_one_file(tmp_path: Path) -> None:
    both = [_filling(tmp_path, together=2) for _ in range(2)]
    for process in both:
        _, told = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, told
    (file,) = tmp_path.glob("*.sqlite")
    assert (summarize_cache(file).texts, summarize_cache(file).words) == (200, 20_000)


def test_the_second_to_make_the_file_waits(tmp_path: Path) -> None:
    file = _write(tmp_path / "spans.sqlite", b"")
    first = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    first.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, first.rollback)
    release.start()
    assert len(SpanCache(SpanExtractor(Source(), name="letters-v1"), file=file)) == 0
    release.join()
    first.close()


def test_an_error_of_the_source_keeps_what_came_before(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    with pytest.raises(KeyError, match="wrong"):
        cache(["a", "b", "wrong", "c"])
    assert len(cache) == 2


def test_errors_name_the_row_of_the_call(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="needs spaCy")
    cache = SpanCache(SpanExtractor(granularity="word"), tmp_path)
    cache(["a"])
    assert isinstance(cache.extractor._nlp, spacy.language.Language)
    cache.extractor._nlp.max_length = 3
    with pytest.raises(InputError, match="text of row 2: expected at most 3 characters"):
        cache(["a", "b", "abcd", "abcd"])


class Deadly(Source):
    """Ends its process over "bad", until it may live."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __call__(self, text: str) -> dict[str, Any]:
        if text == "bad" and not (self.folder / "live").exists():
            os._exit(3)
        return super().__call__(text)


@pytest.mark.filterwarnings("ignore:span extraction. expected its processes to live")
def test_a_text_left_without_spans_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    cache = _cache(tmp_path, Deadly(tmp_path), skip_unparsable=True)
    texts = ["good one", "bad", "other", "bad"]
    with pytest.warns(UserWarning, match="text of row 1: .* it is left without spans"):
        assert cache.fill(texts) == 2
    assert len(cache) == 2
    assert look_up(cache.path, "bad") is None
    expected = Source()
    with pytest.warns(UserWarning, match="text of row 1: .* it is left without spans"):
        made = cache(texts)
    wanted = SpanExtractor(expected)(texts)
    assert made == {
        name: [[] if text == "bad" else spans for text, spans in zip(texts, column, strict=True)]
        for name, column in wanted.items()
    }
    (tmp_path / "live").touch()
    assert cache(texts) == wanted
    assert len(cache) == 3


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE spans (x)")
    connection.close()
    wrong: Iterable[tuple[Path, str]] = (
        (
            _write(tmp_path / "notes.txt", b"hello, this is no database " * 99),
            "expected a whole SQLite file, got a dam",
        ),
        (other, "expected a span cache of this version, got another file"),
        (tmp_path, "expected a file, found a folder"),
    )
    extractor = SpanExtractor(Source(), name="letters-v1")
    for path, message in wrong:
        for use in (lambda path: SpanCache(extractor, file=path), lambda path: look_up(path, "a")):
            with pytest.raises(InputError, match=f"span cache {path}: {message}"):
                use(path)
    for path, message in ((tmp_path / "absent", "found none"), (_write(tmp_path / "empty", b""), "got another file")):
        with pytest.raises(InputError, match=message):
            describe_cache(path)
    with pytest.raises(InputError, match=r"expected a folder with \.sqlite files, found none in it"):
        describe_cache((tmp_path / "nothing").mkdir() or tmp_path / "nothing")
    with pytest.raises(InputError, match="expected directory or file, got both"):
        SpanCache(extractor, tmp_path, file=other)


@pytest.mark.parametrize("part", [0.9, 0.3, 0.01])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    cache = _cache(tmp_path)
    cache([f"{i} {'x' * 50}" for i in range(500)])
    whole = cache.path.read_bytes()
    cache.path.write_bytes(whole[: int(len(whole) * part)])
    for use in (lambda: _cache(tmp_path), lambda: describe_cache(cache.path)):
        with pytest.raises(InputError, match=f"span cache {cache.path}: expected a whole SQLite file.*move it away"):
            use()


FIXTURE = Path(__file__).parent / "fixtures" / "spans-layout-1.sqlite"  # made before records had checksums


def test_a_file_without_checksums_opens_with_one_warning(tmp_path: Path) -> None:
    file = _write(tmp_path / "spans.sqlite", FIXTURE.read_bytes())
    source = Source()
    extractor = SpanExtractor(source, name="letters-v1")
    assert look_up(file, "Stop!") == {"word_spans": [[i, i + 1] for i in range(5)], "phrase_spans": [[0, 5]]}
    with pytest.warns(UserWarning, match="made by an earlier version, without checksums; what it holds is tak") as told:
        cache = SpanCache(extractor, file=file)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache(TEXTS) == SpanExtractor(Source())(TEXTS)
        assert source.asked == []
        assert SpanCache(extractor, file=file)(["words only", *TEXTS])["phrase_spans"][0] == [[0, 10]]
    assert source.asked == ["words only"]
    assert summarize_cache(file).words == 64
    _flip(file, file.read_bytes().index(bytes.fromhex("00000000 01000000 01000000 02000000")) * 8)
    with pytest.warns(UserWarning, match=r"the spans of \d of 5 texts were damaged on disk"):
        assert SpanCache(extractor, file=file)(["words only", *TEXTS])["word_spans"][1:] == cache(TEXTS)["word_spans"]


def test_a_file_without_checksums_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(tmp_path / "spans.sqlite", FIXTURE.read_bytes())
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path.replace("=rw", "=ro"), **options))
    with pytest.warns(UserWarning, match="without checksums; it can only be read, so damage in it can't be seen"):
        cache = SpanCache(SpanExtractor(Source(), name="letters-v1"), file=file)
    assert cache(TEXTS) == SpanExtractor(Source())(TEXTS)
    assert file.read_bytes() == FIXTURE.read_bytes()


def _flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_a_flipped_bit_gives_the_right_spans_or_an_error(tmp_path: Path) -> None:
    texts = [f"text {i} of some length" for i in range(12)]
    file, extractor = tmp_path / "spans.sqlite", SpanExtractor(Source(), name="letters-v1")
    expected = SpanCache(extractor, file=file)(texts)
    whole, seen = file.read_bytes(), Counter[str]()
    generator = random.Random(0)
    for bit in (generator.randrange(8 * len(whole)) for _ in range(300)):
        file.write_bytes(whole)
        _flip(file, bit)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                right = SpanCache(extractor, file=file)(texts) == expected
            except (InputError, OSError):
                seen["refused"] += 1
            else:
                assert right, bit
                seen["warned" if told else "right"] += 1
    assert seen["warned"] > 20, seen
    assert seen["refused"] > 3, seen


def test_damaged_spans_are_counted_and_mended(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    expected = cache(TEXTS)
    _flip(cache.path, cache.path.read_bytes().index(bytes.fromhex("00000000 05000000")) * 8)  # the phrase "Stop!"
    assert (cache.summary().damaged, cache.summary().phrases) == (1, 2)
    assert "damaged  1 texts, extracted anew when they are needed" in describe_cache(cache.path)
    with pytest.raises(InputError, match="expected the spans of this text as they were written, got damaged ones"):
        look_up(cache.path, "Stop!")
    source = Source()
    with pytest.warns(UserWarning, match="the spans of 1 of 4 texts were damaged on disk; they are extracted anew"):
        assert _cache(tmp_path, source)(TEXTS) == expected
    assert source.asked == ["Stop!"]
    assert cache.summary().damaged == 0


@pytest.mark.parametrize("change", ["json = replace(json, 'letters', 'letterz')", "seal = NULL", "json = '[1]'"])
def test_who_made_it_has_a_checksum_too(tmp_path: Path, change: str) -> None:
    cache = _cache(tmp_path)
    with sqlite3.connect(cache.path) as connection:
        connection.execute(f"UPDATE identity SET {change}")
    connection.close()
    for use in (lambda: _cache(tmp_path), lambda: describe_cache(cache.path)):
        with pytest.raises(InputError, match="it doesn't say what it was made by"):
            use()


def test_home_folders_are_those_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    extractor = SpanExtractor(Source(), name="letters-v1")
    assert SpanCache(extractor, file="~/a.sqlite").path == tmp_path / "a.sqlite"
    assert SpanCache(extractor, "~/folder").path.parent == tmp_path / "folder"
    assert look_up("~/a.sqlite", "x") is None
    monkeypatch.setenv("MTA_FAST_CACHE", "~/cache")
    assert SpanCache(extractor).path.parent == tmp_path / "cache"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "file", b"")
    with pytest.raises(OSError, match=r"can't be made \(Not a directory\); give a folder that can be written, or set"):
        _cache(tmp_path / "file" / "folder")

    def forbidden(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(PermissionError, match=r"can't be made \(Permission denied\)"):
        _cache(tmp_path / "new")


def test_a_file_that_can_only_be_read_serves_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _cache(tmp_path)
    cache(TEXTS)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path.replace("=rw", "=ro"), **options))
    assert _cache(tmp_path)(TEXTS) == SpanExtractor(Source())(TEXTS)
    with pytest.raises(PermissionError, match="can't be written .*; give a folder that can be"):
        cache(["new"])


def test_a_locked_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _cache(tmp_path)
    monkeypatch.setattr(cache_module, "BUSY_SECONDS", 0.05)
    holder = sqlite3.connect(cache.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match="another process kept it locked for 0 s; try again later"):
        cache(["a"])
    holder.close()
    assert cache(["a"])["word_spans"] == [[[0, 1]]]


@pytest.mark.parametrize("spans", [[(0, 1, 2)], [0, 1], [(0, 2**31)], ["ab"]])
def test_what_is_no_span_is_refused(spans: list[Any]) -> None:
    with pytest.raises(InputError, match=r"spans: expected \(start, end\) pairs of 32-bit integers, got"):
        SpanExtractor(lambda text: {"word": spans}, granularity="word")(["a"])
