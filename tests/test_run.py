"""mta-fast train, cut, export and spans from the command line, as a user would run them."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoTokenizer

from mta_fast.__main__ import main

CONFIG = """
output_dir: {folder}/run
teacher: {{path: {folder}/teacher}}
student: {{path: {folder}/student}}
data: {{train: {folder}/rows.jsonl, eval: {folder}/rows.jsonl, max_rows: 12}}
spans: {{cache: {folder}/cache}}
training:
  max_length: 200
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-3
  logging_steps: 1
  save_steps: 2
  eval_strategy: steps
  eval_steps: 2
  use_cpu: true
  disable_tqdm: true
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Teacher, student, rows and a config."""
    from importlib import resources

    tokenizer = make_tokenizer()
    for name, layers, width in (("teacher", 8, 48), ("student", 4, 32)):
        make_model("gpt2", layers, width, vocabulary=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def _train(folder: Path, *options: str) -> int:
    return main(["train", str(folder / "run.yaml"), *options])


def _override(*changes: str) -> Sequence[str]:
    return [part for change in changes for part in ("--override", change)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def test_train_from_yaml(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(run_folder) == 0
    out = run_folder / "run"
    model, report = AutoModelForCausalLM.from_pretrained(out / "student", output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(out / "student").eos_token == make_tokenizer().eos_token
    assert model.config.num_hidden_layers == 4
    before = _weights(run_folder / "student")
    assert any(not torch.equal(value, before[name]) for name, value in _weights(out / "student").items())
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    history = json.loads((out / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert {"base", "dsa", "hid", "mta_share_of_step"} <= set(history[0])
    printed = capsys.readouterr()
    assert "12 rows" in printed.out
    assert "0 of 12 texts from" in printed.err
    assert str(out / "student") in printed.out
    # the settings are kept, and are a config themselves
    assert main(["train", str(out / "config.yaml"), "--override", f"output_dir={run_folder / 'again'}"]) == 0
    assert "12 of 12 texts from" in capsys.readouterr().err
    first, again = _weights(out / "student"), _weights(run_folder / "again/student")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_what_is_cut_off_is_not_parsed(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast.distill.training.run import build_trainer
    from mta_fast.distill.training.settings import TrainSettings
    from mta_fast.spans.cache import SpanCache

    monkeypatch.setattr("mta_fast.distill.data.PARSED_BEYOND", 100)
    parsed: list[list[str]] = []
    find = SpanCache.__call__
    monkeypatch.setattr(
        SpanCache, "__call__", lambda self, texts, **options: parsed.append(texts) or find(self, texts, **options)
    )
    settings = TrainSettings.from_yaml(run_folder / "run.yaml")
    truncating = replace(settings, spans=replace(settings.spans, truncate=True))
    trainers = [build_trainer(each) for each in (truncating, settings)]
    cut, _, whole, _ = (sum(map(len, texts)) for texts in parsed)  # of training, of evaluation
    assert cut < whole
    batches = [trainer.data_collator(list(trainer.train_dataset)) for trainer in trainers]
    for kind, spans in batches[0]["spans"].items():
        assert torch.equal(spans.ranges, batches[1]["spans"][kind].ranges)


def test_resume_gives_the_same_student(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(run_folder) == 0
    expected = _weights(run_folder / "run/student")
    assert _train(run_folder) == 2
    assert "it holds checkpoint-4; go on with --resume, or move it" in capsys.readouterr().err
    import shutil

    shutil.rmtree(run_folder / "run/checkpoint-4")
    assert _train(run_folder, "--resume") == 0
    assert all(torch.equal(value, expected[name]) for name, value in _weights(run_folder / "run/student").items())
    assert _train(run_folder, "--resume", *_override("mta.layer_pairs=[[1, 2], [4, 8]]")) == 2
    assert "expected a checkpoint with layer_pairs = [[1, 2], [4, 8]]" in capsys.readouterr().err


def test_ctrl_c_saves_and_resumes(run_folder: Path) -> None:
    assert _train(run_folder, *_override(f"output_dir={run_folder}/whole", "training.max_steps=12")) == 0
    command = [sys.executable, "-m", "mta_fast", "train", str(run_folder / "run.yaml")]
    changes = _override("training.max_steps=12", "training.save_strategy=no")
    with subprocess.Popen(
        [*command, *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # pytest's may be ignored
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'dsa'" in line:  # the first step is logged
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "finishing this step and saving" in out
    assert "go on with --resume" in out
    (saved,) = (run_folder / "run").glob("checkpoint-*")
    assert 1 <= int(saved.name.removeprefix("checkpoint-")) < 12
    assert _train(run_folder, "--resume", *_override("training.max_steps=12")) == 0
    expected = _weights(run_folder / "whole/student")
    for name, value in _weights(run_folder / "run/student").items():
        assert torch.equal(value, expected[name]), (saved.name, name, (value - expected[name]).abs().max())


def test_lora_cut_and_export(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main(["cut", str(run_folder / "teacher"), str(run_folder / "cut"), "--layers", "4", "--even"]) == 0
    assert "4 blocks" in capsys.readouterr().out
    changes = _override(f"student.path={run_folder}/cut", "student.lora.r=4", "mta.lambda_hid=0.3")
    assert _train(run_folder, *changes) == 0
    folder = run_folder / "exported"
    assert main(["export", str(run_folder / "run/checkpoint-4"), str(folder)]) == 0
    merged, live = _weights(folder), _weights(run_folder / "run/student")
    assert all(torch.allclose(value, merged[name], atol=1e-6) for name, value in live.items())
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.learning_rat=1"], "training.learning_rat: expected a field of MTATrainingArguments"),
        (["training.output_dir=x"], "training.output_dir: expected output_dir at the top level of the file"),
        (["training.eval_strategy=weekly"], "training: "),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: expected a JSONL file, there is none"),
        (["training.max_length=2"], "expected prompts of at most 1 tokens, all 12 are longer"),
        (["teacher.path=no/such/model"], "model 'no/such/model': expected a causal language model"),
        (["student.lora.target_modules=[nothing]"], "student.lora: "),
        (["mta.layer_pairs=[[4, 9]]"], "layers: expected hidden-state indices 0 to 8"),
        (["base.loss=srlk"], "got 'srlk', did you mean 'srkl'"),
        (["base.options.temperature=2"], "base loss srkl: expected options among alpha, detach_mixture"),
        (["data.template=papre"], "did you mean 'paper'"),
    ],
)
def test_errors_are_one_line(
    run_folder: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(run_folder, *_override(*changes)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("mta-fast: ")
    assert message in last
    assert not (run_folder / "run/student").exists()


def test_bad_rows_from_the_command_line(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_folder / "rows.jsonl"
    rows.write_text("{broken\n" + rows.read_text(encoding="utf-8"), encoding="utf-8")
    assert _train(run_folder) == 2
    assert f"{rows}, line 1: expected one JSON object a line" in capsys.readouterr().err
    assert _train(run_folder, "--skip-bad-rows", *_override("training.max_steps=1", "training.save_strategy=no")) == 0
    assert "12 rows, 1 left out (1 x expected one JSON object" in capsys.readouterr().out


def test_spans_make_and_show(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, rows = run_folder / "cache", run_folder / "rows.jsonl"
    assert main(["spans", "make", str(rows), "--cache", str(cache)]) == 0
    (file,) = cache.iterdir()
    assert f"24 texts in {file}" in capsys.readouterr().out
    assert main(["spans", "make", str(rows), "--cache", str(cache)]) == 0
    assert "24 of 24 texts from" in capsys.readouterr().err
    assert main(["spans", "show", str(file), "--text", "not in there"]) == 0
    shown = capsys.readouterr().out
    assert "this text is not in it" in shown
    assert "texts    24" in shown
    from mta_fast.distill.data import load_rows, texts_of

    text = texts_of(load_rows(rows).rows)[0]
    assert main(["spans", "show", str(file), "--text", text]) == 0
    assert "word spans: Below | is | an | instruction" in capsys.readouterr().out
    assert main(["spans", "show", str(rows)]) == 2
    assert "span cache" in capsys.readouterr().err


def test_train_reads_the_cache_that_spans_made_and_tries_again_what_killed_its_parser(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mta_fast.distill.data import load_rows, texts_of
    from mta_fast.spans.extract import SpanExtractor

    rows, cache = run_folder / "rows.jsonl", run_folder / "cache"
    deadly, here, encode = texts_of(load_rows(rows).rows)[1], os.getpid(), SpanExtractor._encode

    def encode_or_die(extractor: SpanExtractor, texts: Sequence[str]) -> Iterator[list[bytes]]:
        if deadly in texts:
            assert os.getpid() != here
            os._exit(3)
        return encode(extractor, texts)

    monkeypatch.setattr(SpanExtractor, "_encode", encode_or_die)
    with pytest.warns(UserWarning, match="text of row 1: .* it is left without spans"):
        assert main(["spans", "make", str(rows), "--cache", str(cache), "--skip-unparsable"]) == 0
    assert "23 texts in" in capsys.readouterr().out
    step = _override("training.max_steps=1", "training.save_strategy=no", "spans.skip_unparsable=true")
    with pytest.warns(UserWarning, match="text of row 1: .* it is left without spans"):
        assert _train(run_folder, *step) == 0
    assert "11 of 12 texts from" in capsys.readouterr().err
