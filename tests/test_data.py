"""Rows: templates, sources, bad rows with place and reason, rows that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import make_tokenizer

from mta_fast.distill.data import (
    LoadedRows,
    cut_texts,
    describe_rows,
    drop_long_rows,
    fill_template,
    load_rows,
    load_sample,
    texts_of,
)
from mta_fast.errors import InputError
from mta_fast.tokens import encode

GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PROMPT = {"prompt": "1 + 2 = ", "output": "3"}


def _file(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_both_forms_of_rows(tmp_path: Path) -> None:
    loaded = load_rows(_file(tmp_path, GOOD, b"", PROMPT, {"instruction": "Say hi.", "input": None, "output": "hi"}))
    assert [row["output"] for row in loaded.rows] == ["3", "3", "hi"]
    assert loaded.rows[0]["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert loaded.rows[1]["prompt"] == "1 + 2 = "
    assert "### Input" not in loaded.rows[2]["prompt"]
    assert texts_of(loaded.rows)[1] == "1 + 2 = 3"
    assert describe_rows(loaded) == "3 rows"


def test_sources(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([GOOD, GOOD | {"output": "three"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "several")
    data.to_parquet(tmp_path / "hub/data/train.parquet")
    expected = load_rows([GOOD, GOOD | {"output": "three"}]).rows
    assert load_rows(data).rows == expected
    assert load_rows(tmp_path / "one").rows == expected
    assert load_rows(tmp_path / "several", split="validation").rows == expected
    assert load_rows(str(tmp_path / "hub")).rows == expected  # what load_dataset finds
    assert len(load_rows("sample").rows) > 200
    with pytest.raises(InputError, match="several: expected a JSONL file or a data set with the split 'train'"):
        load_rows(tmp_path / "several")
    with pytest.raises(InputError, match="nowhere: expected a JSONL file or a data set"):
        load_rows(tmp_path / "nowhere")


def test_other_column_names_and_a_limit() -> None:
    rows = [{"instruction": "Add.", "context": "1 and 2", "response": str(i)} for i in range(5)]
    loaded = load_rows(rows, columns={"input": "context", "output": "response"}, limit=3)
    assert [row["output"] for row in loaded.rows] == ["0", "1", "2"]
    assert "### Input:\n1 and 2" in loaded.rows[0]["prompt"]


def test_templates() -> None:
    assert fill_template("plain", "Add.", "1 and 2") == "Add.\n\n1 and 2\n\n"
    assert fill_template("plain", "Add.") == "Add.\n\n"
    assert fill_template("Q: {instruction} {input}\nA: ", "Use {input}", "1") == "Q: Use {input} 1\nA: "
    named = "{input} {instruction}"  # in the data: stays, as other braces of the template do
    assert fill_template("{x} {instruction} | {input} {}", named, named) == f"{{x}} {named} | {named} {{}}"
    for template in ("paper", "plain"):
        assert f"{named}\n" in fill_template(template, named, named)
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="expected a tokenizer with a chat template"):
        fill_template("chat", "Add.", tokenizer=tokenizer)
    with pytest.raises(
        InputError, match="expected paper, plain, chat or a text with .* got 'papre', did you mean 'paper'"
    ):
        fill_template("papre", "Add.")


def test_the_chat_template_is_the_tokenizers() -> None:
    class Chat:
        chat_template = "yes"

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return f"{messages}{options['add_generation_prompt']}"

    assert fill_template("chat", "Add.", "1", Chat()) == "[{'role': 'user', 'content': 'Add.\\n\\n1'}]True"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "expected one JSON object a line, got none (Expecting property name"),
        (b'"text"', "expected a JSON object, got str"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"prompt": "\xff"}', "expected UTF-8, got other bytes"),
        ({"instruction": "x"}, "expected the columns prompt and output, or instruction and output, got instruction"),
        ({}, "expected the columns prompt and output, or instruction and output, got none"),
        (GOOD | {"output": ["3"]}, "output: expected a string, got list"),
        (GOOD | {"input": 3}, "input: expected a string, got int"),
        (GOOD | {"output": " \n"}, "output: expected a text, got an empty one"),
        (GOOD | {"output": "\ud800"}, "output: expected Unicode text, got a lone surrogate"),
    ],
)
def test_bad_rows_have_a_place_and_a_reason(tmp_path: Path, line: Any, reason: str) -> None:
    path = _file(tmp_path, GOOD, line, line, GOOD)
    with pytest.raises(InputError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: {reason}")
    assert str(caught.value).endswith("--skip-bad-rows leaves such rows out and counts them")
    loaded = load_rows(path, skip_bad_rows=True)
    assert len(loaded.rows) == 2
    assert "2 rows, 2 left out (2 x " in describe_rows(loaded)
    with pytest.raises(InputError, match="expected at least one usable row, got none, 1 bad ones"):
        load_rows(_file(tmp_path, line), skip_bad_rows=True)


def test_sources_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty.jsonl: expected at least one usable row, got none"):
        load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="none.jsonl: expected a JSONL file, there is none"):
        load_rows(tmp_path / "none.jsonl")


def test_long_prompts_are_left_out_and_counted() -> None:
    tokenizer = make_tokenizer()
    rows = load_rows([{"prompt": "a " * n, "output": "b " * 50} for n in (1, 5, 40)]).rows
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    kept = drop_long_rows(LoadedRows(rows), tokenizer, max_length=lengths[1] + 1)
    assert [row["prompt"] for row in kept.rows] == ["a ", "a " * 5]
    assert describe_rows(kept) == f"2 rows, 1 left out (1 x prompt longer than {lengths[1]} tokens)"
    assert drop_long_rows(LoadedRows(rows), tokenizer, max_length=lengths[1]).rows == rows[:1]  # no room for a token
    assert drop_long_rows(LoadedRows(rows), tokenizer, max_length=999, max_prompt_length=lengths[0]).rows == rows[:1]
    with pytest.raises(InputError, match=f"all 3 are longer \\(the shortest has {lengths[0]}\\)"):
        drop_long_rows(LoadedRows(rows), tokenizer, max_length=1)
    with pytest.raises(InputError, match="max_prompt_length: expected less than max_length = 8, got 8"):
        drop_long_rows(LoadedRows(rows), tokenizer, max_length=8, max_prompt_length=8)


def test_texts_are_cut_behind_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_sample()[:12]
    text = "".join(row["prompt"] + row["output"] for row in rows)
    own, other = make_tokenizer(), make_tokenizer(300)
    ends = [encode(tokenizer, [text], 64)[0].offsets[-1][1] for tokenizer in (own, other)]
    assert ends[0] > ends[1]
    assert cut_texts([text, "short"], [own], max_length=64) == [text[: ends[0] + 500], "short"]
    assert cut_texts([text], [own, other], max_length=64) == [text[: ends[1] + 500]]  # dropped on both sides
    monkeypatch.setattr("mta_fast.distill.data.TOKENIZE_ROWS", 1)
    monkeypatch.setattr("mta_fast.distill.data.PARSED_BEYOND", 0)
    assert cut_texts([text, text[: ends[0]]], [own], max_length=64) == [text[: ends[0]]] * 2


def test_real_rows(shared: Path) -> None:
    assert len(load_rows(shared / "data/dolly/dev.jsonl").rows) == 1000
    with pytest.raises(InputError, match="sample.jsonl, line 1: output: expected a string, got list"):
        load_rows(shared / "data/sni/sample.jsonl")
