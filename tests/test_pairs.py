"""mta-fast generate: pairs of responses, made by two models one after the other, and read again for training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer

pytest.importorskip("transformers")

from mta_fast.__main__ import main
from mta_fast.distill.responses import generation, pairs
from mta_fast.distill.responses.generation import GenerationSettings
from mta_fast.distill.responses.pairs import generate_pairs, load_pairs
from mta_fast.errors import InputError

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
SETTINGS = GenerationSettings(max_new_tokens=6, stop=None, batch_size=2)
OPTIONS = {"student": "student", "teacher": "teacher", "progress": False, "max_prompt_length": 20}


# --- reading -----------------------------------------------------------------------------------------------------


def test_rows_of_pairs() -> None:
    rows = [GOOD | {"extra": 1}, {"instruction": "Add.", "input": "1", "chosen": "x", "rejected": "x"}]
    assert load_pairs(rows, template="plain").rows == [
        GOOD,
        {"prompt": "Add.\n\n1\n\n", "chosen": "x", "rejected": "x"},
    ]
    named = load_pairs(
        [{"q": "a", "good": "b", "bad": "c"}], columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    assert named.rows == [GOOD]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": " "}, "chosen: expected a text, got an empty one"),
        ({"rejected": ""}, "rejected: expected a text, got an empty one"),
        ({"rejected": None}, "rejected: expected a string, got NoneType"),
        ({"prompt": 3}, "prompt: expected a string, got int"),
        ({"chosen": "\ud800"}, "chosen: expected Unicode text, got a lone surrogate"),
    ],
)
def test_bad_rows(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(InputError, match=re.escape(f"{path}, line 2: {reason}; --skip-bad-rows")):
        load_pairs(path)
    loaded = load_pairs(path, skip_bad_rows=True)
    assert (loaded.rows, dict(loaded.skipped)) == ([GOOD], {reason: 1})


def test_missing_columns() -> None:
    expected = "expected the columns prompt and chosen and rejected, or instruction and chosen and rejected, got prompt"
    with pytest.raises(InputError, match=f"row 0: {expected}, chosen"):
        load_pairs([{"prompt": "a", "chosen": "b"}])
    with pytest.raises(InputError, match="row 0: expected the columns"):
        load_pairs([{"chosen": "b", "rejected": "c"}])


# --- making ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a teacher, a student and five rows."""
    monkeypatch.chdir(tmp_path)
    for name, family in (("teacher", "llama"), ("student", "gpt2")):
        make_model(family, layers=2, vocabulary=len(make_tokenizer())).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    rows = [{"prompt": f"Say {i}. ", "output": f"{i} it is"} for i in range(5)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def _say(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """Let ``answer`` (model's class, prompt -> response) respond; returns the classes of the models in their order."""
    models: list[str] = []

    def texts(model: Any, _tokenizer: Any, prompts: list[str], _settings: Any, **_: Any) -> list[str]:
        models.append(type(model).__name__)
        return [answer(models[-1], prompt) for prompt in prompts]

    monkeypatch.setattr(generation, "generate_texts", texts)
    return models


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate",
        "--teacher",
        "teacher",
        "--student",
        "student",
        "--data",
        "rows.jsonl",
        "--out",
        "made/p.jsonl",
    ]
    lengths = ["--max-prompt-length", "20", "--max-length", "26"]
    assert main([*command, *lengths]) == 0
    printed = capsys.readouterr()
    assert "rows.jsonl: 5 rows\n5 pairs in made/p.jsonl\n" in printed.out
    assert "teacher's responses" in printed.err
    loaded = load_pairs(here / "made/p.jsonl").rows
    assert [row["prompt"] for row in loaded] == [f"Say {i}. " for i in range(5)]
    assert all(row["chosen"] != row["rejected"] for row in loaded)
    assert [path.name for path in (here / "made").iterdir()] == ["p.jsonl"]
    assert main([*command, *lengths]) == 2
    assert "made/p.jsonl: expected a free name or" in capsys.readouterr().err


def test_one_model_after_the_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _say(monkeypatch, lambda model, prompt: f"{model} {prompt}")
    counts = generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS)
    assert counts == {"pairs": 5}
    assert models == ["LlamaForCausalLM"] * 3 + ["GPT2LMHeadModel"] * 3
    row = load_pairs("p.jsonl").rows[3]
    assert row == {"prompt": "Say 3. ", "chosen": "LlamaForCausalLM Say 3. ", "rejected": "GPT2LMHeadModel Say 3. "}


def test_the_datas_own_responses(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _say(monkeypatch, lambda _model, prompt: prompt)
    generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS | {"teacher": None}, chosen="data")
    assert set(models) == {"GPT2LMHeadModel"}
    assert [row["chosen"] for row in load_pairs("p.jsonl").rows] == [f"{i} it is" for i in range(5)]


@pytest.mark.parametrize("stop_at", [2, 3, 4, 6])  # calls: three of the teacher, three of the student
def test_an_interrupted_run_makes_the_same_file(stop_at: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_pairs(["rows.jsonl"], Path("whole.jsonl"), SETTINGS, **OPTIONS)
    original, calls = generation.generate_texts, list[int]()

    def stopped(*args: Any, **options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(generation, "generate_texts", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS)
    assert not Path("p.jsonl").exists()
    with pytest.raises(InputError, match="expected responses made with seed = 1, it has some made with 42"):
        generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS, seed=1)
    generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS)
    assert len(calls) == 6 + 1  # what was made before is taken over
    assert Path("p.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    generate_pairs(["rows.jsonl"], Path("other.jsonl"), SETTINGS, **OPTIONS, seed=1)
    assert Path("other.jsonl").read_bytes() != Path("whole.jsonl").read_bytes()


def test_the_two_models_draw_different_numbers(here: Path) -> None:
    generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS | {"teacher": "student"})
    assert all(row["chosen"] != row["rejected"] for row in load_pairs("p.jsonl").rows)


def test_empty_responses(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def answer(model: str, prompt: str) -> str:
        asked.append(model[:5] + prompt)
        if model.startswith("Llama"):
            return "" if "1" in prompt else "x"
        return "" if "3" in prompt and asked.count(asked[-1]) < pairs.ATTEMPTS else "y"

    _say(monkeypatch, answer)
    Path("long.jsonl").write_text(
        json.dumps({"prompt": "Say " * 30, "output": "x"}) + "\n" + Path("rows.jsonl").read_text()
    )
    command = ["generate", "--teacher", "teacher", "--student", "student", "--data", "long.jsonl", "--out", "p.jsonl"]
    assert main([*command, "--max-prompt-length", "20"]) == 0
    assert (
        "4 pairs in p.jsonl, left out: 1 x empty response; 1 x prompt longer than 20 tokens" in capsys.readouterr().out
    )
    assert [row["prompt"][4] for row in load_pairs("p.jsonl").rows] == ["0", "2", "3", "4"]
    assert asked.count("LlamaSay 1. ") == asked.count("GPT2LSay 3. ") == pairs.ATTEMPTS
    asked.clear()
    _say(monkeypatch, lambda _model, _prompt: " ")
    message = "q.jsonl: expected at least one pair, every prompt of 5 has an empty response"
    with pytest.raises(InputError, match=message):
        generate_pairs(["rows.jsonl"], Path("q.jsonl"), SETTINGS, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "student"}, "chosen: expected one of teacher, data, got 'student'"),
        ({"teacher": None}, "teacher: expected a model for chosen = teacher, got none"),
        ({"chosen": "data"}, "teacher: expected none, as chosen = data takes the data's own responses, got 'teacher'"),
        ({"teacher": "."}, "model '.': expected config.json or one .gguf file in ., got 0 of them"),
        ({"max_prompt_length": 1}, "rows: expected prompts of at most 1 tokens, all 5 are longer"),
        ({"limit": 0}, "rows.jsonl: expected at least one usable row, got none"),
    ],
)
def test_what_does_not_fit_is_refused(here: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        generate_pairs(["rows.jsonl"], Path("p.jsonl"), SETTINGS, **OPTIONS | change)
    assert not list(here.glob("p.jsonl*"))
