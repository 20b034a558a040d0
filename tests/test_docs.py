"""Every Python example of the documentation runs, and what pages, help and messages name exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

from bench import docs
from mta_fast import MTAConfig
from mta_fast.backends import BACKENDS
from mta_fast.distill.data import load_sample
from mta_fast.distill.training.arguments import ACCUMULATION, MTATrainingArguments
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.layout import Spans

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
SETTINGS_PAGE = "docs/configuration.md"


def _blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that are in this language ("" where none is named)."""
    fences = re.split(r"^```(.*)\n", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    # text, language, block, "", text, language, ...
    return [block for name, block in zip(fences[1::4], fences[2::4], strict=True) if name == language]


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")])
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mta_fast.backends.BACKENDS", dict(BACKENDS))
    monkeypatch.setenv("MTA_FAST_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    names: dict[str, Any] = {
        "student": make_model("gpt2", vocabulary=len(tokenizer)),
        "teacher": make_model("gpt2", layers=8, width=48, vocabulary=len(tokenizer)),
        "tokenizer": tokenizer,
        "rows": [dict(row) for row in load_sample()[:4]],
    }
    before = [parameter.detach().clone() for parameter in names["student"].parameters()]
    for example in _blocks(page, "python"):
        exec(compile(example, page, "exec"), names)
    if page in ("README.md", "docs/guide.md"):
        moved = [not torch.equal(a, b) for a, b in zip(before, names["student"].parameters(), strict=True)]
        assert any(moved)
        assert (names["loss"] if page == "README.md" else names["output"].loss).isfinite()


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, tmp_path: Path) -> None:
    """Every mta-fast command on the page has these options; nothing is run."""
    typer = pytest.importorskip("typer")
    from mta_fast.cli import app

    lines = [line for block in _blocks(page, "") for line in block.splitlines()]
    commands = [
        line.split("mta-fast ", 1)[-1] for line in lines if line.startswith(("mta-fast ", ".venv/bin/mta-fast "))
    ]
    commands += [line.split("-m mta_fast ", 1)[-1] for line in lines if "-m mta_fast " in line]
    for command in commands:
        found = typer.main.get_command(app)
        words = shlex.split(command, comments=True)
        while hasattr(found, "commands"):
            found = found.commands[words.pop(0)]
        found.make_context("mta-fast", words)
    if page == "docs/guide.md":
        assert len(commands) > 8


def test_the_import_swap_runs() -> None:
    for page in ("README.md", "docs/guide.md"):
        for block in _blocks(page, "diff"):
            added = [line[1:] for line in block.splitlines() if line.startswith("+")]
            assert len(added) == 2
            exec("\n".join(added), {})


def test_settings_on_the_pages_are_valid(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from dataclasses import MISSING

    from mta_fast import _yaml

    def keys(kind: Any, values: dict[str, Any], where: str = "") -> None:
        assert list(values) == [f.name for f in fields(kind)] or set(values) == {f.name for f in fields(kind)}, where
        for field in fields(kind):
            value = values[field.name]
            if isinstance(value, dict) and value and is_dataclass(getattr(settings, field.name)):
                keys(type(getattr(settings, field.name)), value, field.name)
            elif field.default is not MISSING:
                assert value == field.default, (where, field.name)

    whole, mta, training = _blocks(SETTINGS_PAGE, "yaml")
    (tmp_path / "run.yaml").write_text(whole)
    settings = TrainSettings.from_yaml(tmp_path / "run.yaml")
    keys(TrainSettings, _yaml.loads(whole, "page"))
    values = _yaml.loads(mta, "page")
    assert MTAConfig.from_dict({k: v for k, v in values.items() if k != "preset"}) == MTAConfig.paper("gpt2")
    assert set(values) == {"preset", *(f.name for f in fields(MTAConfig))}
    own = {f.name: f.default for f in fields(MTATrainingArguments) if f.name in MTATrainingArguments.__annotations__}
    assert _yaml.loads(training, "page") == own
    needed = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "d"}, "output_dir": "o"}
    for page in ("docs/guide.md", "docs/extending.md", "docs/reproduction.md"):
        for block in _blocks(page, "yaml"):  # a whole file, or a part of one
            (tmp_path / "run.yaml").write_text(_yaml.dumps(needed | _yaml.loads(block, page)))
            assert TrainSettings.from_yaml(tmp_path / "run.yaml").mta_config(12, 24)


def test_messages_of_the_faq_exist() -> None:
    text = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`(.+?)`\*\*", text, re.MULTILINE)
    assert len(messages) > 8
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mta_fast").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    choices = ", ".join(ACCUMULATION)
    source = re.sub(r'check_choice\("(accumulation)", .*\)', rf"\1: expected one of {choices}", source)
    for message in messages:
        assert message in source, message


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), (page, target)


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page: str) -> None:
    assert not re.findall(r"^[A-Z_]{5,}$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_modelled_figures_are_those_of_the_results_file() -> None:
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in text[text.index("## Modelled time") : text.index("## On CPUs")].splitlines()
        if line.startswith("| ")
    ]
    assert len(rows) > 20
    assert set(rows) <= set((ROOT / "bench/results/model.md").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_those_of_the_results_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.rewrite(text) == text, "python -m bench.docs"


def test_no_figure_of_the_readme_is_written_by_hand() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {("bench/results/loss.md", "Must reach"), ("bench/results/step.md", "Overhead of MTA")} <= set(
        docs.places(text)
    )
    for table in re.findall(r"(?:^\|.*\n)+", text[text.index("## Figures") :], re.MULTILINE):
        before = text[: text.index(table)].rstrip().splitlines()[-1]
        assert before.startswith("<!-- bench/results/"), before


def test_every_row_with_a_target_is_shown() -> None:
    """A losing one too."""
    text = "".join(page.read_text(encoding="utf-8") for page in docs.pages())
    for name in ("loss", "memory", "spans", "step", "heads"):
        rows = (ROOT / f"bench/results/{name}.md").read_text(encoding="utf-8").splitlines()
        judged = [row for row in rows if row.endswith(("| yes |", "| NO |"))]
        assert all(row in text for row in judged), name


def test_options_named_in_the_docs_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
        for path in re.findall(r"`((?:mta_fast|bench|tests|examples)/[\w./]*)`", text):
            assert (ROOT / path).exists() or "NAME" in path, path


# --- what help, messages and pages name ---------------------------------------------------------------------------


def _commands(group: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words; a group too, and what ``mta-fast bench`` forwards to."""
    if words == ("bench",):
        group = pytest.importorskip("typer").main.get_command(importlib.import_module("bench.commands").app)
    found = {words: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= _commands(command, (*words, name))
    return found


def _messages(path: Path) -> list[str]:
    """The strings of a module that are no docstrings; an f-string's values as {}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    texts = []
    for node in ast.walk(tree):  # an f-string before its parts
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = node.values
            skipped |= {id(part) for part in parts}
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            texts.append(node.value)
    return texts


def _prose(page: str) -> str:
    """A page without its Python, which runs."""
    text = re.sub(r"^```python\n.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return text.replace("`", " ")


# what the messages of an op call the tensors of its argument ``spans``, and a checkpoint's fingerprint parts of a model
NO_KEYS = {f"spans.{name}" for name in Spans._fields} | {"student.adapters", "student.base"}


def _faults(text: str, commands: dict[tuple[str, ...], Any], extras: set[str]) -> Iterator[str]:
    """What a text names and there is not: files, commands, options, extras, keys of the YAML."""
    for path in re.findall(
        r"(?<![\w./~-])(?<!--json )(?:docs|examples|tests|bench|mta_fast|kernels|csrc)/[\w./-]*[\w/]", text
    ):
        if not (ROOT / path).exists() and "NAME" not in path:
            yield path
    for first, second in re.findall(r"mta-fast ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text):
        is_group = hasattr(commands.get((first,)), "commands")
        if (first,) not in commands or (is_group and second and (first, second) not in commands):
            yield f"mta-fast {first} {second}"
    others = r"pip|torchrun|accelerate|git|pytest|docker|spacy|ray|spark|nohup"  # commands with options of their own
    options = {name for command in commands.values() for param in command.params for name in param.opts} | {"--help"}
    for line in text.splitlines():
        own = re.split(r"mta-fast|mta_fast ", line)[-1] if "mta" in line else line
        if not re.search(rf"\b(?:{others})\b", own):
            yield from (name for name in re.findall(r"(?<![\w(-])--[a-z][a-z-]+(?![\w:])", own) if name not in options)
    for names in re.findall(r"\.\[([\w,]+)\]", text):
        yield from (f".[{name}]" for name in names.split(",") if name not in extras)
    parts = "|".join(f.name for f in fields(TrainSettings))
    for key in re.findall(rf"(?<![\w./`{{-])(?:{parts})(?:\.[a-z_]+)+(?![\w(./*])", text):
        if not _is_key(key.split(".")) and not key.endswith((".png", ".json", ".py")) and key not in NO_KEYS:
            yield key


def _is_key(names: list[str], kind: Any = None) -> bool:
    """Whether dotted names are a key of the YAML; below a free mapping every name is one."""
    hints = typing.get_type_hints(kind or TrainSettings)
    first, *rest = names
    if kind is None and first in ("mta", "training") and rest:
        known = {"preset"} if first == "mta" else set()
        return rest[0] in known | {f.name for f in fields(MTAConfig if known else MTATrainingArguments)}
    if first not in hints or not rest:
        return first in hints
    kinds = [option for option in (typing.get_args(hints[first]) or [hints[first]]) if is_dataclass(option)]
    return any(_is_key(rest, option) for option in kinds) or typing.get_origin(hints[first]) is dict


def test_what_help_messages_and_pages_name_exists() -> None:
    typer = pytest.importorskip("typer")
    from mta_fast.cli import app

    commands = _commands(typer.main.get_command(app))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    texts = {page: [_prose(page)] for page in PAGES}
    texts |= {str(path.relative_to(ROOT)): _messages(path) for path in (ROOT / "mta_fast").rglob("*.py")}
    for words, command in commands.items():
        helps = [command.help, *(getattr(param, "help", None) for param in command.params)]
        texts["mta-fast " + " ".join(words)] = [text for text in helps if text]
    found = {where: list(_faults("\n".join(lines), commands, extras)) for where, lines in texts.items()}
    assert {where: faults for where, faults in found.items() if faults} == {}


def test_what_does_not_exist_is_found() -> None:
    typer = pytest.importorskip("typer")
    from mta_fast.cli import app

    text = (
        "see docs/training.md and examples/none.yaml; `mta-fast trian`, mta-fast spans mend; --resum goes on; "
        "pip install '.[trian]'; training.learning_rat: expected, student.lora.rank, data.evil"
    )
    names = ["docs/training.md", "examples/none.yaml", "mta-fast trian ", "mta-fast spans mend", ".[trian]"]
    names += ["training.learning_rat", "student.lora.rank", "data.evil"]
    commands = _commands(typer.main.get_command(app))
    assert list(_faults(text, commands, {"train"})) == names
    assert list(_faults("--resum goes on, as does --resume", commands, set())) == ["--resum"]
    right = "docs/faq.md, mta-fast spans make, --resume, '.[train]', training.learning_rate, student.lora.r, mta.preset"
    assert list(_faults(right, commands, {"train"})) == []
