"""ParserPool and batches whose spans still come."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import LIMIT, alive, wait_for, wait_until_gone

from mta_fast import SpanBatch, SpanCollator, SpanExtractor
from mta_fast.errors import InputError, MissingPackageError, MTAFastError
from mta_fast.spans import parser_pool, processes
from mta_fast.spans.cache import SpanCache
from mta_fast.spans.lazy import LazySpans, pending_batch
from mta_fast.spans.parser_pool import ParserPool, PendingSpans

TESTS = Path(__file__).parent


class _TwoPartError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def spans_of(text: str) -> dict[str, Any]:
    """The whole text; what comes before a colon is done first."""
    what, _, rest = text.partition(":")
    if what == "sleep":  # longer than any test; says who sleeps
        Path(rest, str(os.getpid())).touch()
        time.sleep(2 * LIMIT)
    if what == "until":  # a file is there; says who waits for it
        Path(f"{rest}.{os.getpid()}").touch()
        wait_for(Path(rest).exists)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "odd":
        raise _TwoPartError("can't be pickled", "")
    if what == "wrong":
        raise KeyError("mine")
    return {"word": [(0, len(text))], "phrase": [(0, 1)]}


def _pids(pool: ParserPool) -> list[int]:
    return [each._process.pid for each in pool._processes._processes if each._process.pid is not None]


def _kill(pid: int, noticed: Callable[[], bool]) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(noticed)
    wait_until_gone([pid])


EXTRACTOR = SpanExtractor(spans_of)


@pytest.fixture(scope="module")
def pool() -> Iterator[ParserPool]:
    """Two processes that the tests share; those that end them make their own."""
    with ParserPool(EXTRACTOR, n_process=2) as pool:
        pool.start()
        yield pool
        left = _pids(pool)
    assert not {child.pid for child in multiprocessing.active_children()} & set(left)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Deaths on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_order_is_kept_within_and_between_submits(pool: ParserPool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = [f"until:{go}", *(f"{'x' * i}" for i in range(9))]
    second = [f"other {'y' * i}" for i in range(7)]
    pending, other = pool.submit(first), pool.submit(second)
    assert other.result() == EXTRACTOR(second)
    assert not pending.done()
    go.touch()
    assert pending.result() == EXTRACTOR(first)
    assert pending.done()
    assert pending.result() == EXTRACTOR(first)  # and again


def test_one_submit_is_parsed_by_all_processes(pool: ParserPool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    pending = pool.submit([f"until:{go}"] * 2)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    assert {int(path.suffix[1:]) for path in tmp_path.iterdir()} == set(_pids(pool))
    go.touch()
    assert len(pending.result()["word_spans"]) == 2


def test_no_texts_and_wrong_ones(pool: ParserPool) -> None:
    assert pool.submit([]).result() == {"word_spans": [], "phrase_spans": []}
    with pytest.raises(InputError, match="text of row 1: expected a string, got NoneType"):
        pool.submit(["a", None])  # type: ignore[list-item]


def test_an_exception_of_the_extractor_is_raised_by_result(pool: ParserPool) -> None:
    before = _pids(pool)
    pending = {kind: pool.submit(["a", "b", "c", f"{kind}:"]) for kind in ("wrong", "odd")}
    with pytest.raises(KeyError, match="mine") as caught:
        pending["wrong"].result()
    assert "spans_of" in caught.value.__notes__[0]
    with pytest.raises(MTAFastError, match="_TwoPartError in a worker process: can't be pickled"):
        pending["odd"].result()
    assert pool.submit(["a"]).result() == EXTRACTOR(["a"])
    assert _pids(pool) == before


def test_the_time_that_result_waits_is_counted(
    pool: ParserPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, seconds in (("a", 0), (f"until:{tmp_path / 'go'}", 3)):
        pending = pool.submit([text])
        if not seconds:
            wait_for(pending.done)
        before = pool.stall_seconds

        def now(pending: PendingSpans = pending) -> float:
            """The text is parsed from the first look at the clock on, which shows 3 when it is done."""
            done = pending.done()
            (tmp_path / "go").touch()
            return 3.0 * done

        with monkeypatch.context() as patch:
            patch.setattr(parser_pool, "time", SimpleNamespace(perf_counter=now))
            pending.result()
        assert pool.stall_seconds == before + seconds
        (tmp_path / "go").unlink()


def test_submit_waits_for_room(pool: ParserPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool._processes, "_max_pending", 3)
    monkeypatch.setattr(pool, "max_pending", 3)
    go, made, waits = tmp_path / "go", list[Any](), threading.Event()
    held = pool.submit([f"until:{go}"] * 2)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    fits = pool.submit(["a"])
    until = pool._processes._changed.wait_for

    def noted(condition: Callable[[], Any], timeout: float) -> Any:
        if threading.current_thread() is thread and not condition():
            waits.set()
        return until(condition, timeout)

    monkeypatch.setattr(pool._processes._changed, "wait_for", noted)
    monkeypatch.setattr(parser_pool, "time", SimpleNamespace(perf_counter=lambda: 3.0 * go.exists()))
    before = pool.stall_seconds
    thread = threading.Thread(target=lambda: made.append(pool.submit(["b"] * 20)))
    thread.start()
    assert waits.wait(LIMIT)
    assert thread.is_alive()
    assert pool._processes._pending == 3
    go.touch()
    thread.join(LIMIT)
    assert pool.stall_seconds == before + 3
    assert made[0].result() == EXTRACTOR(["b"] * 20)
    assert fits.result() == EXTRACTOR(["a"])
    assert held.done()
    assert pool._processes._pending == 0


def test_a_killed_process_is_replaced_and_its_texts_parsed_again(
    pool: ParserPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kept, go = os.pipe, list[int](), tmp_path / "go"

    def pipe() -> tuple[int, int]:
        reader, writer = make()
        kept.append(os.dup(writer))  # as a process does that is forked before the parent closes it
        return reader, writer

    monkeypatch.setattr(os, "pipe", pipe)
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.1)
    texts = ["a", f"until:{go}", "bc", "def"]
    replaced, before = pool.replaced, _pids(pool)
    pending = pool.submit(texts)
    for deaths in (1, 2):  # the second dies behind a pipe that stays open
        wait_for(lambda n=deaths: len(list(tmp_path.iterdir())) == n)  # type: ignore[misc]
        (killed,) = {int(path.suffix[1:]) for path in tmp_path.iterdir()} & set(_pids(pool))
        with pytest.warns(
            UserWarning, match="span extraction: expected its processes to live, one stopped .signal 9, often"
        ):
            _kill(killed, lambda n=deaths: pool.replaced == replaced + n)  # type: ignore[misc]
    go.touch()
    assert pending.result() == EXTRACTOR(texts)
    assert len(set(_pids(pool)) & set(before)) == 1
    assert len(_pids(pool)) == 2
    for end in kept:
        os.close(end)


@pytest.mark.usefixtures("quiet")
def test_a_text_that_kills_is_named_and_the_others_are_parsed(
    pool: ParserPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ATTEMPTS", 2)
    replaced, poison = pool.replaced, f"die: {'long ' * 30}"
    pending, spared = pool.submit(["a", poison]), pool.submit(["x", "y"])
    assert spared.result() == EXTRACTOR(["x", "y"])
    message = re.escape(
        f"text of row 1: expected a process to parse it, 2 stopped over it (signal 9, often the system's "
        f"out-of-memory killer); try a smaller n_process or batch_size if memory ran out, leave it out, or allow it to "
        f"have no spans (skip_unparsable); it begins with {poison[:60]!r}"
    )
    with pytest.raises(MTAFastError, match=message):
        pending.result()
    assert pool.replaced == replaced + 2
    monkeypatch.setattr(processes, "ATTEMPTS", 1)
    monkeypatch.setattr(pool._processes, "_skip", True)
    with pytest.warns(UserWarning, match="text of row 1: .* it is left without spans, 1 so far; it begins with 'die:'"):
        made = pool.submit(["a", "die:"]).result()
    assert made == {"word_spans": [[[0, 1]], []], "phrase_spans": [[[0, 1]], []]}
    assert pool.skipped == 1
    assert pool.submit(["a", "b", "c"]).result() == EXTRACTOR(["a", "b", "c"])


def test_a_fork_is_refused(pool: ParserPool) -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def submit() -> None:
        try:
            told.put(str(pool.submit(["a"])))
        except InputError as error:
            told.put(str(error))

    process = context.Process(target=submit, daemon=True)
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    assert "ParserPool: expected use in the process that made it, got a fork" in told.get()
    assert pool.submit(["a"]).result() == EXTRACTOR(["a"])  # the fork's end left the processes alone


def test_close_leaves_no_process(tmp_path: Path) -> None:
    started, pool = threading.active_count(), ParserPool(EXTRACTOR)
    held, waiting = pool.submit([f"sleep:{tmp_path}"]), pool.submit(["a"])
    wait_for(lambda: any(tmp_path.iterdir()))
    (process,) = (each._process for each in pool._processes._processes)
    pool.close()
    assert process.exitcode == -signal.SIGKILL
    wait_for(lambda: threading.active_count() == started)
    for call in (held.result, waiting.result, lambda: pool.submit(["a"]), pool.start, pool.__enter__):
        with pytest.raises(
            MTAFastError, match="ParserPool: expected an open pool, got one that was closed; make a new"
        ):
            call()
    assert pool.replaced == 0
    pool.close()


def test_a_pool_that_is_dropped_stops_its_processes() -> None:
    pool = ParserPool(EXTRACTOR)
    pool.start()
    pids = _pids(pool)
    assert all(map(alive, pids))
    del pool
    gc.collect()
    wait_until_gone(pids)


_SCRIPT = """
import sys
from test_live_spans import EXTRACTOR
from mta_fast.spans.parser_pool import ParserPool

if __name__ == "__main__":
    pool = ParserPool(EXTRACTOR)
    pending = pool.submit([f"sleep:{sys.argv[1]}"])
    if sys.argv[2] == "wait":
        pending.result()
    sys.stdin.readline()
"""


def _script(folder: Path, what: str) -> tuple[subprocess.Popen[str], int]:
    """A process with a pool, and that one's process, which would go on for long."""
    (folder / "script.py").write_text(_SCRIPT)
    (folder / "pids").mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(folder / "pids"), what],
        start_new_session=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))},
    )  # fmt: skip
    wait_for(lambda: any((folder / "pids").iterdir()) or parent.poll() is not None)
    (worker,) = (folder / "pids").iterdir()
    return parent, int(worker.name)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_process_ends_with_its_parent(tmp_path: Path, stop: signal.Signals) -> None:
    parent, worker = _script(tmp_path, "wait")
    (os.killpg if stop == signal.SIGINT else os.kill)(parent.pid, stop)
    _, stderr = parent.communicate(timeout=LIMIT)
    assert parent.returncode == -stop
    assert stderr.count("Traceback") == (stop == signal.SIGINT), stderr
    wait_until_gone([worker])


def test_an_exit_without_close_does_not_hang(tmp_path: Path) -> None:
    parent, worker = _script(tmp_path, "leave")
    _, stderr = parent.communicate("\n", timeout=LIMIT)
    assert (parent.returncode, stderr) == (0, "")
    assert not alive(worker)


class _OnlyHere:
    """A function that no other process can load."""

    def __call__(self, text: str) -> dict[str, Any]:
        return spans_of(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (os.getpid(),)


def _load(pid: int) -> _OnlyHere:
    if pid != os.getpid():
        sys.exit(3)
    return _OnlyHere()


def test_processes_that_cannot_start_close_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ATTEMPTS", 1)
    before = set(multiprocessing.active_children())
    pool = ParserPool(SpanExtractor(_OnlyHere()))
    pending = pool.submit(["a"])
    for call in (pending.result, pool.start, lambda: pool.submit(["a"])):
        with pytest.raises(MTAFastError, match="expected a process to load its pipeline, 1 stopped before .exit code"):
            call()
    pool.close()
    assert set(multiprocessing.active_children()) == before


def test_errors_name_expected_and_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SpanCache(SpanExtractor(spans_of, name="whole"), tmp_path)
    with pytest.raises(
        InputError, match="extractor: expected a SpanExtractor, got SpanCache; of a SpanCache give .ext"
    ):
        ParserPool(cache)  # type: ignore[arg-type]
    for name in ("n_process", "max_pending"):
        with pytest.raises(InputError, match=f"{name}: expected an integer >= 1, got 0"):
            ParserPool(EXTRACTOR, **{name: 0})
    assert ParserPool(SpanExtractor(spans_of, skip_unparsable=True))._processes._skip
    with pytest.raises(InputError, match="extractor: expected one that can be pickled for the processes, got one that"):
        ParserPool(SpanExtractor(lambda text: {}))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="span extraction: expected a process that may have children, got"):
        ParserPool(EXTRACTOR)


# --- with spaCy and a tokenizer ----------------------------------------------------------------------------------


ROWS = [
    {"prompt": "Name a river.\n", "output": "The Danube flows quickly; it has often flooded — see Wien."},
    {"prompt": "Hi\n", "output": "Yo"},
    {"prompt": "", "output": "The old dog has often barked loudly at night."},
]


@pytest.fixture(scope="module")
def parsing() -> Iterator[ParserPool]:
    """spaCy in one process."""
    pytest.importorskip("spacy", reason="needs spaCy")
    with ParserPool(SpanExtractor(n_process=2), max_pending=2) as pool:  # the extractor's own number does not count
        yield pool


def _same(made: Mapping[str, SpanBatch], expected: Mapping[str, SpanBatch]) -> None:
    assert made.keys() == expected.keys()
    for kind, spans in made.items():
        assert spans.num_spans > 0
        for one, other in zip(spans.index_tensors(), expected[kind].index_tensors(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("vocabulary", [None, 300])
def test_a_pending_batch_becomes_the_collators(parsing: ParserPool, vocabulary: int | None) -> None:
    pytest.importorskip("transformers")
    from models import make_tokenizer

    teacher = None if vocabulary is None else make_tokenizer(vocabulary)
    collator = SpanCollator(make_tokenizer(), teacher, max_length=24)
    columns = SpanExtractor()([row["prompt"] + row["output"] for row in ROWS])
    expected = collator([row | {name: column[i] for name, column in columns.items()} for i, row in enumerate(ROWS)])
    batch = pending_batch(parsing, collator, ROWS)
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        if name.endswith("spans"):
            assert isinstance(value, LazySpans)
            _same(value.result(), expected[name])
        else:
            assert torch.equal(value, expected[name])


def test_lazy_spans_move_without_being_asked_for(pool: ParserPool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.utils import send_to_device
    from models import make_tokenizer

    go = tmp_path / "go"
    rows = [{"text": f"until:{go}"}, {"text": "a b c"}]
    batch = pending_batch(pool, SpanCollator(make_tokenizer()), rows)
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert moved["input_ids"].device.type == "meta"
    assert moved["spans"] is batch["spans"]
    assert not isinstance(moved["spans"], Mapping)
    go.touch()
    spans = moved["spans"].result()
    assert spans.keys() == {"word", "phrase"}
    assert all(batch.device.type == "meta" and batch.host.device.type == "cpu" for batch in spans.values())
    assert moved["spans"].result() is spans
    assert moved["spans"].to("cpu").result()["word"].device.type == "cpu"


def test_a_pool_of_other_granularity_is_refused() -> None:
    pytest.importorskip("transformers")
    from models import make_tokenizer

    words = ParserPool(SpanExtractor(spans_of, granularity="word"))
    collator = SpanCollator(make_tokenizer())
    with pytest.raises(InputError, match="pool: expected an extractor of the collator's granularity word, phrase, got"):
        pending_batch(words, collator, [{"text": "a"}])
    with pytest.raises(InputError, match="columns: expected phrase_spans, got ..word_spans..; extract those spans too"):
        collator.align(collator.tokenize([{"text": "a"}]), {"word_spans": [[]]})


def test_long_texts_and_lost_pipelines_are_told(parsing: ParserPool, tmp_path: Path) -> None:
    import shutil

    import spacy

    with pytest.raises(InputError, match="text of row 3: expected at most 1000000 characters"):
        parsing.submit(["a", "b", "c", "d" * 1_000_001]).result()
    spacy.blank("en").to_disk(tmp_path / "blank")
    extractor = SpanExtractor(str(tmp_path / "blank"), granularity="word")
    shutil.rmtree(tmp_path / "blank")
    with ParserPool(extractor) as pool, pytest.raises(MissingPackageError, match="expected a package or the folder"):
        pool.start()
