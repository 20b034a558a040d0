"""What the package reads and writes at a user's word: paths, targets, locks, exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mta_fast.__main__ import main
from mta_fast.config import MTAConfig
from mta_fast.errors import InputError
from mta_fast.files import (
    LOCK_FILE,
    MARKER,
    CheckpointError,
    Kind,
    atomic_file,
    check_target,
    export_kind,
    mark_export,
    marked,
    user_path,
    user_source,
)
from mta_fast.locks import LOCK_VARIABLE, lock_export, lock_file, lock_folder

NOTES = Kind("earlier notes", marked(b"NOTES"))
THESIS = "ten years of work"


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# --- paths -------------------------------------------------------------------------------------------------------


def test_a_path_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = Path("~root").expanduser()
    assert user_path("~/a") == user_path(Path("~/a")) == tmp_path / "a"
    assert user_path("~") == tmp_path
    assert user_path("~root/a") == root / "a"
    assert user_path("./~/a") == Path(user_source("./~/a")) == tmp_path / "a"
    assert [str(user_path(name)) for name in ("a/~", "$HOME/a", "/a/~")] == ["a/~", "$HOME/a", "/a/~"]
    assert [user_source(name) for name in ("org/model", "sample", "package:x", "~/m")] == [
        "org/model",
        "sample",
        "package:x",
        f"{tmp_path}/m",
    ]
    for wrong, message in (("", "got ''"), ("a\0b", "expected the name of a"), ("~nobody-here/a", "an unknown user")):
        with pytest.raises(InputError, match=message):
            user_path(wrong)


def test_settings_and_arguments_open_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from mta_fast.distill import MTATrainingArguments
    from mta_fast.distill.data import load_rows
    from mta_fast.distill.models import load_tokenizer
    from mta_fast.distill.training.settings import TrainSettings

    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    text = (
        "output_dir: ~/runs/x\nstudent: {path: ~/s, tokenizer: ~/t}\nteacher: {path: ~/m}\n"
        "data: {train: ~/a.jsonl, eval: ~/b.jsonl}\nspans: {cache: ~/c, model: ~/pipeline}\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    settings = TrainSettings.from_yaml("~/run.yaml", ["data.eval=~/other.jsonl"])
    assert settings.output_dir == f"{home}/runs/x"
    assert (settings.student.path, settings.student.tokenizer) == (f"{home}/s", f"{home}/t")
    assert settings.teacher is not None
    assert settings.teacher.path == f"{home}/m"
    assert (settings.data.train, settings.data.eval) == (f"{home}/a.jsonl", f"{home}/other.jsonl")
    assert (settings.spans.cache, settings.spans.model) == (f"{home}/c", f"{home}/pipeline")
    with pytest.raises(InputError, match="^output_dir: expected the name of a file or folder, got ''"):
        TrainSettings.from_yaml("~/run.yaml", ['output_dir=""'])
    assert MTATrainingArguments(output_dir="~/runs/y", report_to=[]).output_dir == f"{home}/runs/y"
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
    assert len(load_rows("~/a.jsonl").rows) == 1
    config = MTAConfig([(1, 2)], ("word",))
    config.to_yaml("~/mta.yaml")
    assert MTAConfig.from_yaml("~/mta.yaml") == config
    from models import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "t")
    assert len(load_tokenizer("~/t")) == len(make_tokenizer())
    assert not Path("~").exists()


# --- targets -----------------------------------------------------------------------------------------------------


def test_a_file_gives_way_only_to_its_own_kind(tmp_path: Path) -> None:
    file = tmp_path / "new/folder/notes"
    assert check_target(file, NOTES) == file
    assert not file.parent.exists()
    (tmp_path / "empty").touch()
    (tmp_path / "mine").write_text("NOTES: mine")
    for name in ("empty", "mine"):
        assert check_target(tmp_path / name, NOTES) == tmp_path / name
    (tmp_path / "thesis").write_text(THESIS)
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("thesis", "expected a free name or earlier notes, got another file; give another name"),
        ("link", "got another file"),
        ("thesis/below", "expected a path in a folder, got one below the file"),
        (".", "expected a file or a free name, got a folder"),
        ("pipe", "expected a file or a free name, got a device or a pipe"),
    ):
        with pytest.raises(InputError, match=message):
            check_target(tmp_path / name, NOTES)


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("source", "it is"),
        ("source/../source/", "it is"),
        ("link", "it is"),
        ("source/student", "it lies in"),
        ("link/a/b", "it lies in"),
        (".", "it holds"),
        ("other/..", "it holds"),
    ],
)
def test_a_source_is_never_a_target(tmp_path: Path, target: str, relation: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    for source in ("source", "link"):
        with pytest.raises(InputError, match=f"expected a target apart from what is read, {relation} "):
            check_target(tmp_path / target, export_kind("x"), sources=[tmp_path / source], overwrite=True)
    assert check_target(tmp_path / "sourceful", export_kind("x"), sources=[tmp_path / "source"])


def test_an_export_gives_way_only_when_told_and_alone(tmp_path: Path) -> None:
    (tmp_path / "a/part").mkdir(parents=True)
    (tmp_path / "a/part/weights").write_text("1")
    mark_export(tmp_path / "a", "cut student")
    cut, other = export_kind("cut student"), export_kind("exported student")
    with pytest.raises(InputError, match=r"it holds an earlier cut student and nothing else; --overwrite .* replaces"):
        check_target(tmp_path / "a", cut)
    assert check_target(tmp_path / "a", cut, overwrite=True) == tmp_path / "a"
    with pytest.raises(InputError, match="expected a free name or an earlier exported student and nothing else, got a"):
        check_target(tmp_path / "a", other, overwrite=True)
    (tmp_path / "a/part/thesis.tex").write_text(THESIS)
    with pytest.raises(InputError, match="expected a free name or an earlier cut student and nothing else, got a fold"):
        check_target(tmp_path / "a", cut, overwrite=True)
    for marker in ("{", "[]", '{"kind": "cut student"}', '{"kind": "cut student", "files": 3}'):
        (tmp_path / "a/part/thesis.tex").unlink(missing_ok=True)
        (tmp_path / "a" / MARKER).write_text(marker)
        with pytest.raises(InputError, match="got a folder with mta_fast.json, part"):
            check_target(tmp_path / "a", cut, overwrite=True)


def _write_and_fail(file: Path, error: BaseException) -> None:
    with atomic_file(file) as partial:
        partial.write_text("half")
        raise error


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep/report.md"
    with atomic_file(file) as partial:
        partial.write_text("old")
    with pytest.raises(
        CheckpointError, match=r"report.md: expected to write it whole, got: .*No space left.*make room"
    ):
        _write_and_fail(file, OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        _write_and_fail(file, KeyboardInterrupt())
    assert _contents(tmp_path) == {"deep": None, "deep/report.md": b"old"}


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, its folder the current one, and a folder with a thesis in it."""
    pytest.importorskip("transformers")
    from models import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    make_model("llama", 3, 16, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text(THESIS)
    (tmp_path / "thesis.html").write_text(THESIS)
    (tmp_path / "link").symlink_to(tmp_path / "teacher", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cut teacher work --layers 2", "got a folder with thesis.tex"),
        ("cut teacher work --layers 2 --overwrite", "got a folder with thesis.tex"),
        ("cut teacher teacher --layers 2 --overwrite", "it is"),
        ("cut teacher link --layers 2 --overwrite", "it is"),
        ("cut link teacher/student --layers 2", "it lies in"),
        ("cut ~/teacher . --layers 2", "it holds"),
        ("cut teacher thesis.html --layers 2", "got a file"),
        ("cut org/model org/model --layers 2", "it is"),
        ("export teacher teacher", "it is"),
        ("export teacher .", "it holds"),
        ("export teacher work", "got a folder with thesis.tex"),
        ("generate --student teacher --teacher teacher --data rows.jsonl --out thesis.html", "got another file"),
        ("generate --student teacher --teacher teacher --data thesis.html --out thesis.html", "it is"),
        ("generate --student teacher --teacher teacher --data sample --out teacher/pairs", "it lies in"),
        ("eval teacher --data sample --out work", "got a folder with thesis.tex"),
        ("eval teacher --data sample --out teacher", "it is"),
        ("inspect --teacher teacher --student teacher --text a --html thesis.html", "got another file"),
        ("inspect --teacher teacher --student teacher --text a --png thesis.html", "got another file"),
        ("inspect --teacher teacher --student teacher --text a --html teacher/page.html", "it lies in"),
        ("demo --out work", "got a folder with thesis.tex"),
        ("demo --out thesis.html", "got a file"),
        ("bench model --out notes", "got another file"),
        ("bench recipes --out notes.md", "got another file"),
        ("spans make sample --cache thesis.html", "can't be made"),
    ],
)
def test_no_command_writes_over_anything_else(
    home: Path, command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mta_fast.distill import models

    def loaded(*names: object, **options: object) -> None:
        raise AssertionError("a model was loaded before the target was looked at")

    monkeypatch.setattr(models, "load_model", loaded)
    (home / "notes.md").write_text(THESIS)
    before = _contents(home)
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert _contents(home) == before


def test_cut_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cut", "teacher", "~/student", "--layers", "2", "--even"]) == 0
    assert json.loads((home / "student" / MARKER).read_text())["kind"] == "cut student"
    first = _contents(home)
    assert main(["cut", "teacher", "student", "--layers", "1", "--even"]) == 2
    assert "it holds an earlier cut student and nothing else; --overwrite" in capsys.readouterr().err
    assert _contents(home) == first
    assert main(["cut", "teacher", "student", "--layers", "1", "--even", "--overwrite"]) == 0
    assert json.loads((home / "student/config.json").read_text())["num_hidden_layers"] == 1
    assert not (home / ".partial").exists()
    (home / "student/notes.md").write_text(THESIS)
    assert main(["cut", "teacher", "student", "--layers", "2", "--even", "--overwrite"]) == 2
    assert (home / "student/notes.md").read_text() == THESIS


def test_export_spares_the_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run").mkdir()
    for step in (4, 8):
        (home / "teacher").rename(home / f"run/checkpoint-{step}") if step == 8 else (home / "run/checkpoint-4").mkdir()
    before = _contents(home)
    for target in ("run", "run/checkpoint-8", "run/checkpoint-4", "run/checkpoint-4/student", "run/checkpoint-8/x"):
        assert main(["export", "run/checkpoint-8", target, "--overwrite"]) == 2
        assert "expected a target apart from what is read" in capsys.readouterr().err
        assert _contents(home) == before
    assert main(["export", "run/checkpoint-8", "run/student"]) == 0
    assert main(["export", "run/checkpoint-8", "run/student"]) == 2
    assert main(["export", "run/checkpoint-8", "run/student", "--overwrite"]) == 0


# --- locks -------------------------------------------------------------------------------------------------------

_HOLD = """
import os, sys
from pathlib import Path
from mta_fast.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        sys.stdin.readline()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


def _holding(folder: Path, how: str = "plain") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HOLD, str(folder), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    process = _holding(folder, how)
    told = rf"run: expected no process at work in it, process {process.pid} on \S+ since .* is; wait for its end"
    with pytest.raises(InputError, match=told), lock_folder(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock_folder(folder):  # a forked worker that is still there does not hold it
        assert os.listdir(folder) == [LOCK_FILE]
    assert list(folder.iterdir()) == []
    process.communicate()


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a/b"):
        assert check_target(tmp_path / "a/b", export_kind("x")) == tmp_path / "a/b"  # still an empty folder
    assert list(tmp_path.iterdir()) == []
    with lock_export(tmp_path / "student"):
        with (
            pytest.raises(InputError, match="student: expected no process at work in it"),
            lock_export(tmp_path / "student"),
        ):
            pass
        with lock_export(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_is_given_the_lock_holds_it_on(tmp_path: Path) -> None:
    ask = (
        "import sys; from pathlib import Path; from mta_fast.locks import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", ask, str(tmp_path)]
    descriptor = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    os.close(descriptor)
    with lock_folder(tmp_path) as lock:
        assert b"expected no process at work in it" in subprocess.run(command, capture_output=True, check=False).stderr
        environment = {**os.environ, LOCK_VARIABLE: str(lock)}
        child = subprocess.Popen(
            command, pass_fds=(lock,), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "mine\n"
        child.communicate("\n")


def test_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from mta_fast.errors import MTAFastError

    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="this file system knows no locks"), lock_file(tmp_path / "lock", tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't be locked \(.*\); give another place"), lock_folder(tmp_path / "file"):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(MTAFastError, match="expected Linux or macOS, where a folder can be locked"):
        with lock_folder(tmp_path):
            pass


@pytest.mark.parametrize("command", ["train", "ablate", "eval", "demo", "generate"])
def test_two_commands_in_one_folder(
    home: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / ("out.responses" if command == "generate" else "out")
    (home / "run.yaml").write_text(
        "output_dir: ~/out\nstudent: {path: teacher}\nteacher: {path: teacher}\ndata: {train: sample}\n"
    )
    words: dict[str, Callable[[], list[str]]] = {
        "train": lambda: ["train", "run.yaml"],
        "ablate": lambda: ["ablate", "run.yaml"],
        "eval": lambda: ["eval", "teacher", "--data", "sample", "--out", "out"],
        "demo": lambda: ["demo", "--out", "out"],
        "generate": lambda: [
            "generate",
            "--student",
            "teacher",
            "--teacher",
            "teacher",
            "--data",
            "sample",
            "--out",
            "out",
        ],
    }
    with lock_folder(folder):
        before = _contents(home)
        assert main(words[command]()) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{folder.name}: expected no process at work in it, process {os.getpid()} on " in line
        assert _contents(home) == before
