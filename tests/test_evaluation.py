"""mta-fast eval: ROUGE-L by hand, rows with references, seeds, files from which a run goes on, and the command."""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("rouge_score")

from mta_fast.__main__ import main
from mta_fast.distill.responses import evaluation, generation
from mta_fast.distill.responses.evaluation import (
    EvaluationRow,
    EvaluationSettings,
    distinct_names,
    evaluate,
    load_references,
    rouge_l,
)
from mta_fast.distill.responses.generation import GenerationSettings
from mta_fast.errors import InputError, MissingPackageError

ROWS = [EvaluationRow(prompt=f"Say {i}. ", references=[f"{i} it is", "no more"]) for i in range(7)]
GENERATION = GenerationSettings(max_new_tokens=6, stop=None, batch_size=2)
SETTINGS = EvaluationSettings(GENERATION, seeds=(1, 2))


def _model() -> Any:
    return make_model("gpt2", vocabulary=len(make_tokenizer()))


def _say(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[int]:
    """Let ``answer`` (prompt, number of the call -> response) respond; returns the sizes of the batches."""
    sizes: list[int] = []

    def texts(_model: Any, _tokenizer: Any, prompts: list[str], _settings: Any, **_: Any) -> list[str]:
        sizes.append(len(prompts))
        return [answer(prompt, len(sizes)) for prompt in prompts]

    monkeypatch.setattr(generation, "generate_texts", texts)
    return sizes


# --- the score ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "response", "expected"),
    [
        (["the cat sat on the mat"], "the cat was on the mat", 5 / 6),  # five of six words on both sides
        (["a b c d"], "a c", 2 * 1 * 0.5 / (1 + 0.5)),  # precision 1, recall 1/2
        (["one two"], "two one", 1 / 2),  # a common subsequence, not a common set
        (["He runs, FAST!"], "he running fast", 1.0),  # stems; neither case nor punctuation
        (["x y", "a c", "a b c d"], "a c", 1.0),
        (["no words"], " \n", 0.0),
        (["some words"], "...", 0.0),
    ],
)
def test_rouge_by_hand(references: list[str], response: str, expected: float) -> None:
    assert rouge_l(references, response) == pytest.approx(expected)


def test_the_first_reference_or_the_best() -> None:
    assert rouge_l(["a b c d", "a c"], "a c", "first") == pytest.approx(2 / 3)
    assert rouge_l(["a b c d", "a c"], "a c", "best") == 1.0


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingPackageError, match="expected the package rouge-score, it is not installed; pip install"):
        evaluate(_model(), make_tokenizer(), ROWS, SETTINGS, progress=False)


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_with_one_or_several_references() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"prompt": "1 + 2 = ", "output": ["3", "three"]},
    ]
    loaded = load_references(rows, template="plain").rows
    assert loaded == [
        {"prompt": "Add.\n\n1 and 2\n\n", "references": ["3"]},
        {"prompt": "1 + 2 = ", "references": ["3", "three"]},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "output": []}, "output: expected at least one reference, got an empty list"),
        ({"prompt": "a", "output": ["b", " "]}, "output: expected a text, got an empty one"),
        ({"prompt": "a", "output": ["b", 3]}, "output: expected a string, got int"),
        ({"prompt": "a", "output": None}, "output: expected a string, got NoneType"),
        ({"prompt": "", "output": "b"}, "prompt: expected a text, got an empty one"),
        ({"prompt": "a"}, "expected the columns prompt and output, or instruction and output, got prompt"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "output": "b"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=re.escape(f"{path}, line 2: {reason}; --skip-bad-rows")):
        load_references(path)
    loaded = load_references(path, skip_bad_rows=True)
    assert (len(loaded.rows), dict(loaded.skipped)) == (1, {reason: 1})


def test_rows_without_a_first_reference_may_be_skipped(tmp_path: Path) -> None:
    outputs = [["b", " "], [], " ", ["\n", "b"], "b"]
    rows = [{"prompt": "a", "output": output} for output in outputs]
    loaded = load_references(rows, skip_empty_references=True)
    assert [row["references"] for row in loaded.rows] == [["b"], ["b"]]
    assert dict(loaded.skipped) == {"first reference empty": 3}
    for wrong in ({"prompt": "a"}, {"prompt": "a", "output": 3}, {"prompt": "a", "output": ["b", 3]}):
        with pytest.raises(InputError, match="expected"):
            load_references([wrong], skip_empty_references=True)


def test_real_rows(shared: Path) -> None:
    dolly = load_references(shared / "data/dolly/dev.jsonl").rows
    sni = load_references(shared / "data/sni/sample.jsonl").rows
    assert {len(row["references"]) for row in dolly} == {1}
    assert sum(len(row["references"]) > 1 for row in sni) == 34
    assert rouge_l(sni[0]["references"], sni[0]["references"][0]) == 1.0


def test_names_of_data_sets() -> None:
    assert distinct_names(["x/dolly/dev.jsonl", "sample"]) == ["dev", "sample"]
    assert distinct_names(["x/dolly/dev.jsonl", "x/sni/dev.jsonl"]) == ["dolly-dev", "sni-dev"]
    assert distinct_names(["hub/data:part 1", "../.jsonl"]) == ["data-part-1", "data"]
    with pytest.raises(InputError, match="data: expected different data sets, got a.jsonl, a.jsonl"):
        distinct_names(["a.jsonl", "a.jsonl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds: expected different integers >= 0, got []"),
        ({"seeds": (1, 1)}, "seeds: expected different integers >= 0, got [1, 1]"),
        ({"seeds": (1, -2)}, "seeds: expected different integers >= 0, got [1, -2]"),
        ({"references": "all"}, "references: expected one of best, first, got 'all'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        EvaluationSettings(**change)
    assert str(caught.value) == message


# --- one model, one data set -------------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    # four calls a seed; of "1 it is" and the like: three words of three, one of three, none, an empty text
    answers = {1: "{} it is", 2: "it", 3: "never"}
    _say(monkeypatch, lambda prompt, call: answers[(call + 3) // 4].format(prompt[4]) if prompt[4] != "6" else " ")
    found = evaluate(
        _model(), make_tokenizer(), ROWS, EvaluationSettings(GENERATION, (1, 2, 3)), name="rows", progress=False
    )
    expected = [100 * 6 / 7, 100 * 6 / 7 * (2 * 1 * (1 / 3) / (1 + 1 / 3)), 0.0]
    assert [run.rouge_l for run in found.seeds] == pytest.approx(expected)
    assert [run.empty for run in found.seeds] == [1, 1, 1]
    mean = sum(expected) / 3
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx((sum((score - mean) ** 2 for score in expected) / 2) ** 0.5)
    assert found.rows == 7
    assert not found.failed


def _responses(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in sorted(folder.glob("seed-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(list(row) == ["prompt", "references", "response", "score", "seconds"] for row in rows)
        found[path.name] = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return found


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    whole = evaluate(_model(), tokenizer, ROWS, SETTINGS, folder=tmp_path / "whole", progress=False)
    expected = _responses(tmp_path / "whole")
    assert list(expected) == ["seed-1.jsonl", "seed-2.jsonl"]
    assert expected["seed-1.jsonl"] != expected["seed-2.jsonl"]
    assert [row["prompt"] for row in expected["seed-1.jsonl"]] == [row["prompt"] for row in ROWS]
    for run, rows in zip(whole.seeds, expected.values(), strict=True):
        assert run.rouge_l == pytest.approx(100 * statistics.fmean(row["score"] for row in rows))

    original, calls = generation.generate_texts, list[int]()

    def stopped(*args: Any, **options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 6:  # in the second seed, of which a batch is done
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(generation, "generate_texts", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(_model(), tokenizer, ROWS, SETTINGS, folder=tmp_path / "parts", progress=False)
    kept = _responses(tmp_path / "parts")
    assert kept == {"seed-1.jsonl": expected["seed-1.jsonl"], "seed-2.jsonl": expected["seed-2.jsonl"][:2]}
    resumed = evaluate(_model(), tokenizer, ROWS, SETTINGS, folder=tmp_path / "parts", progress=False)
    assert len(calls) == 6 + 3
    assert _responses(tmp_path / "parts") == expected
    assert [run.rouge_l for run in resumed.seeds] == [run.rouge_l for run in whole.seeds]
    again = evaluate(_model(), tokenizer, ROWS, SETTINGS, folder=tmp_path / "parts", progress=False)
    assert again == resumed  # the times too
    assert len(calls) == 6 + 3


def test_responses_of_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _say(monkeypatch, lambda prompt, _: prompt)
    model, tokenizer = _model(), make_tokenizer()
    evaluate(model, tokenizer, ROWS, SETTINGS, folder=tmp_path, progress=False)
    done = len(sizes)
    other = _model()
    with torch.no_grad():
        other.transformer.wte.weight[3, 3] += 1
    warmer = EvaluationSettings(GenerationSettings(6, temperature=0.5, stop=None, batch_size=2), (1, 2))
    first = EvaluationSettings(GENERATION, (1, 2), "first")
    stripped = EvaluationSettings(replace(GENERATION, strip=True), (1, 2))
    cut = EvaluationSettings(replace(GENERATION, prompt_length=1), (1, 2))
    for changed, message in (
        ((other, tokenizer, ROWS, SETTINGS), "digest of the weights = "),
        ((_model().bfloat16(), tokenizer, ROWS, SETTINGS), "dtype = 'bfloat16', it has some made with 'float32'"),
        ((model, tokenizer, ROWS[:6], SETTINGS), "rows = 6, it has some made with 7"),
        ((model, tokenizer, [*ROWS[1:], ROWS[0]], SETTINGS), "digest of the rows and their tokens = "),
        ((model, make_tokenizer(300), ROWS, SETTINGS), "digest of the rows and their tokens = "),
        ((model, tokenizer, ROWS, warmer), "temperature = 0.5, it has some made with 1.0"),
        ((model, tokenizer, ROWS, first), "references = 'first', it has some made with 'best'"),
        ((model, tokenizer, ROWS, stripped), "strip = True, it has some made with False"),
        ((model, tokenizer, ROWS, cut), "digest of the rows and their tokens = "),
    ):
        with pytest.raises(InputError, match=f"expected responses made with {message}"):
            evaluate(*changed, folder=tmp_path, progress=False)
    assert len(sizes) == done
    evaluate(model, tokenizer, ROWS, EvaluationSettings(GENERATION, (2, 3)), folder=tmp_path, progress=False)
    assert len(sizes) == done + 4  # another seed is no other setting


def test_a_prompt_that_is_too_long_is_said_before_anything_is_made(tmp_path: Path) -> None:
    rows = [*ROWS, EvaluationRow(prompt="word " * 2000, references=["a"])]
    with pytest.raises(InputError, match="prompt of row 7: expected at most 1018 tokens"):
        evaluate(_model(), make_tokenizer(), rows, SETTINGS, folder=tmp_path, progress=False)
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match="rows: expected at least one row, got none"):
        evaluate(_model(), make_tokenizer(), [], SETTINGS)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and two data sets of the same name."""
    monkeypatch.chdir(tmp_path)
    _model().save_pretrained("run/student")
    make_tokenizer().save_pretrained("run/student")
    for name, rows in (("one", ROWS), ("two", ROWS[:3])):
        Path(name).mkdir()
        lines = [json.dumps({"prompt": row["prompt"], "output": row["references"]}) for row in rows]
        Path(name, "dev.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


COMMAND = ["eval", "run/student", "--data", "one/dev.jsonl,two/dev.jsonl", "--seeds", "1,2,3"]
SHORT = ["--max-prompt-length", "20", "--max-length", "26", "--batch-size", "2"]


def test_the_command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *SHORT]) == 0
    out = here / "eval/run-student"
    printed = capsys.readouterr()
    assert "ROUGE-L F1 x 100 of run/student" in printed.out
    assert "one/dev.jsonl: 7 rows\ntwo/dev.jsonl: 3 rows\n" in printed.out
    assert "responses and results.json in eval/run-student" in printed.out
    assert "one-dev, seed 3" in printed.err
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {"mta_fast", "torch", "transformers", "rouge-score"} <= set(results["versions"])
    assert results["settings"]["generation"]["max_new_tokens"] == 6
    assert results["settings"]["generation"]["stop"] == "###"
    assert results["model"] == "run/student"
    for data, rows in zip(results["data"], (7, 3), strict=True):
        scores = [run["rouge_l"] for run in data["seeds"]]
        assert (data["rows"], [run["seed"] for run in data["seeds"]]) == (rows, [1, 2, 3])
        assert data["mean"] == pytest.approx(statistics.fmean(scores))
        assert data["std"] == pytest.approx(statistics.stdev(scores))
        assert all(run["seconds"] > 0 for run in data["seeds"])
        assert {len(rows) for rows in _responses(out / data["name"]).values()} == {rows}
    calls = _say(monkeypatch, lambda prompt, _: prompt)
    assert main([*COMMAND, *SHORT]) == 0
    assert not calls
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert main([*COMMAND, *SHORT, "--greedy"]) == 2
    assert "do_sample = False, it has some made with True; give another folder" in capsys.readouterr().err


def test_the_preset_and_what_is_given_beside_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"prompt": "word " * 400, "output": ["a"]}
    rows = [json.loads(line) for line in Path("two/dev.jsonl").read_text().splitlines()]
    rows += [long, {"prompt": "b", "output": [" "]}]
    Path("three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _say(monkeypatch, lambda prompt, _: prompt)
    command = ["eval", "run/student", "--data", "three.jsonl", "--preset", "paper"]
    paper = evaluation.PRESETS["paper"]

    def run(out: str, *options: str) -> tuple[dict[str, Any], Any]:
        assert main([*command, "--out", out, *options]) == 0
        results = json.loads(Path(out, "results.json").read_text())
        made = results["settings"]
        own = {name: made[name] for name in ("seeds", "references", "skip_empty_references")}
        return results, EvaluationSettings(GenerationSettings(**made["generation"]), **own)

    results, settings = run("paper")
    assert results["preset"] == "paper"
    assert settings == EvaluationSettings(paper.generation, list(paper.seeds), "first", True)
    (data,) = results["data"]
    assert (data["rows"], data["left_out"]) == (4, {"first reference empty": 1})  # the long one is cut, not left out
    assert run("batch", "--batch-size", "3")[0]["preset"] == "paper"  # it names none
    for out, options, value in (
        ("warm", ["--temperature", "1.0"], 1.0),
        ("seeds", ["--seeds", "10"], [10]),
        ("short", ["--max-prompt-length", "300"], 512),
        ("length", ["--max-length", "266"], 10),
        ("drop", ["--no-cut-prompts"], None),
        ("plain", ["--template", "plain"], 512),
    ):
        results, settings = run(out, *options)
        assert results["preset"] is None, out
        generation = settings.generation
        found = {"warm": generation.temperature, "seeds": settings.seeds, "drop": generation.prompt_length}
        assert found.get(out, generation.max_new_tokens) == value, out
    assert evaluation.preset_of(EvaluationSettings()) is None


def test_a_seed_that_fails_stops_no_other(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(prompt: str, call: int) -> str:
        if call == 6:
            raise RuntimeError("CUDA error:\nsomething odd")
        return prompt

    _say(monkeypatch, answer)
    assert main([*COMMAND, *SHORT, "--out", "out"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "one-dev, seed 2 failed: RuntimeError: CUDA error: something odd"
    one, two = json.loads((here / "out/results.json").read_text(encoding="utf-8"))["data"]
    assert [run["error"] is None for run in one["seeds"]] == [True, False, True]
    assert "in answer" in one["seeds"][1]["traceback"]
    assert one["seeds"][1]["rouge_l"] is None
    assert one["mean"] == pytest.approx((one["seeds"][0]["rouge_l"] + one["seeds"][2]["rouge_l"]) / 2)
    assert not any(run["error"] for run in two["seeds"])
    calls = _say(monkeypatch, lambda prompt, _: prompt)
    assert main([*COMMAND, *SHORT, "--out", "out"]) == 0
    assert calls == [2, 2, 1]  # the first batch of seed 2 was kept


def test_long_prompts_and_bad_rows_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["{", *('{"prompt": "%s", "output": "b"}' % ("Say " * n) for n in (1, 2, 30))]
    Path("three.jsonl").write_text("\n".join(rows) + "\n")
    command = ["eval", "run/student", "--data", "three.jsonl", "--seeds", "1", *SHORT]
    assert main(command) == 2
    assert "three.jsonl, line 1: expected one JSON object a line" in capsys.readouterr().err
    assert main([*command, "--skip-bad-rows"]) == 0
    assert "three.jsonl: 2 rows, 2 left out (1 x expected one JSON" in capsys.readouterr().out
    (data,) = json.loads(Path("eval/run-student/results.json").read_text(encoding="utf-8"))["data"]
    assert sorted(data["left_out"].values()) == [1, 1]
    assert data["std"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "one", "--data", "one/dev.jsonl"], "model 'one': expected config.json or one .gguf file in one"),
        (["eval", "run/student", "--data", "none.jsonl"], "none.jsonl: expected a JSONL file, there is none"),
        (["eval", "run/student"], "Missing option '--data'"),
        (["eval", "--data", "one/dev.jsonl"], "Missing argument 'model'"),
        ([*COMMAND[:-1], "1,x"], "seeds: expected integers with commas between them"),
        ([*COMMAND, "--max-length", "256"], "max_length: expected more than max_prompt_length = 256, got 256"),
        ([*COMMAND, "--max-length", "2000"], "max_new_tokens: expected less than the model's 1024 positions, got 1744"),
        ([*COMMAND, "--preset", "papr"], "preset: expected one of paper, got 'papr', did you mean 'paper'"),
        ([*COMMAND, "--references", "all"], "references: expected one of best, first, got 'all'"),
        ([*COMMAND, "--device", "tpu9"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu9'"),
    ],
)
def test_errors_are_one_line(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("mta-fast: ")
    assert message in last


def test_lists_with_commas(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x,y.jsonl").touch()
    taken: list[Any] = []

    def run(model: str, data: list[str], settings: EvaluationSettings, **options: Any) -> int:
        taken.append((model, list(data), list(settings.seeds), options["out"], settings.generation.do_sample))
        return 0

    monkeypatch.setattr(evaluation, "run_evaluation", run)
    for words, expected in (
        ("M --data a,b --seeds 1,2", ("M", ["a", "b"], [1, 2], None, True)),
        ("M --data a --data b,c --seeds=1,2 --out o", ("M", ["a", "b", "c"], [1, 2], Path("o"), True)),
        ("--data a,b --greedy M", ("M", ["a", "b"], [10, 20, 30, 40, 50], None, False)),
        ("--seeds 7 M --data x,y.jsonl", ("M", ["x,y.jsonl"], [7], None, True)),
    ):
        assert main(["eval", *words.split()]) == 0, words
        assert taken.pop() == expected, words
    for words, message in (
        ("M --data a --seeds 1,b", "seeds: expected integers with commas between them, such as 10,20, got '1,b'"),
        ("M --data a --seeds 1 2", "Lists have commas, such as --seeds 1,2,3. See"),
    ):
        assert main(["eval", *words.split()]) == 2, words
        assert message in capsys.readouterr().err, words
