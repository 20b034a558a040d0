"""``mta-fast ablate``: its rows, each run once, what fails or is interrupted, and its table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer
from processes import wait_for

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from mta_fast.__main__ import main
from mta_fast.distill import ablation
from mta_fast.distill.ablation import ablate, ablation_rows
from mta_fast.distill.ablation_report import interval_margin
from mta_fast.distill.data import load_sample
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError
from mta_fast.locks import lock_folder

PAPER = ["base", "+Hid", "+DSA", "full", "words only", "phrases only", "no weights"]


def _settings(folder: Path, **changes: Any) -> TrainSettings:
    values = {
        "output_dir": str(folder / "out"),
        "teacher.path": str(folder / "teacher"),
        "teacher.tokenizer": str(folder / "tokenizer"),
        "student.path": str(folder / "student"),
        "student.tokenizer": str(folder / "tokenizer"),
        "data.train": str(folder / "rows.jsonl"),
        "data.eval": str(folder / "rows.jsonl"),
        "spans.cache": str(folder / "cache"),
        "mta.lambda_dsa": 2,
        "training.max_steps": 2,
        "training.max_length": 200,
        "training.use_cpu": "true",
        **changes,
    }
    (folder / "config.yaml").write_text("{}\n")
    return TrainSettings.from_yaml(folder / "config.yaml", [f"{key}={value}" for key, value in values.items()])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models, tokenizer and rows on disk."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make_model("gpt2", 8, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "student")
    make_model("gpt2", 16, width=48, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    rows = [dict(row) for row in load_sample()[:8]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


# --- rows --------------------------------------------------------------------------------------------------------


def test_the_paper_s_rows(tmp_path: Path) -> None:
    rows = ablation_rows(_settings(tmp_path), 12, 48)
    assert list(rows) == [*PAPER, "1 layer", "2 layers", "3 layers", "4 layers", "5 layers"]
    assert rows.pop("base") is False
    made: dict[str, Any] = rows  # type: ignore[assignment]  # the others are mappings
    full = made["full"]
    assert full["layer_pairs"] == [[6, 24], [9, 36], [12, 48]]
    changed = {name: {key for key in full if row[key] != full[key]} for name, row in made.items()}
    assert changed["+Hid"] == {"lambda_dsa"}
    assert changed["+DSA"] == {"lambda_hid"}
    assert changed["no weights"] == {"weighting"}
    assert changed["words only"] == changed["phrases only"] == {"granularity"}
    assert made["words only"]["granularity"] == ["word"]
    assert made["1 layer"]["layer_pairs"] == [[12, 48]]
    assert made["1 layer"]["granularity"] == ["phrase"]
    assert made["3 layers"]["layer_pairs"] == full["layer_pairs"]
    assert [pair[0] for pair in made["5 layers"]["layer_pairs"]] == [6, 8, 9, 11, 12]
    assert made["5 layers"]["granularity"] == ["word"] + ["phrase"] * 4


def test_a_shallow_student_has_fewer_rows(tmp_path: Path) -> None:
    assert [row for row in ablation_rows(_settings(tmp_path), 4, 8) if "layer" in row] == [
        "1 layer",
        "2 layers",
        "3 layers",
    ]


# --- runs --------------------------------------------------------------------------------------------------------


class _Runs:
    """Stands in for the processes: writes what a run leaves, and counts."""

    def __init__(self, fail: Callable[[str], int] = lambda run: 0, *, half: bool = False) -> None:
        self.commands: list[list[str]] = []
        self._fail, self._half = fail, half

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(list(command))
        run = f"{log.parent.parent.name}/{log.parent.name}"
        with log.open("a") as file:
            file.write(f"line of {run}\n")
        code = self._fail(run)
        if code:
            return code
        loss = len(run) / 10 + int(run[-1])  # any number that differs
        if command[0] == "train":
            results = {"steps": 2, "train_seconds": 1.0 + loss, "eval_loss": loss, "eval_base": loss}
            (log.parent / "results.json").write_text(json.dumps(results))
        else:
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(exist_ok=True)
            seeds = [{"seed": 10, "error": "MemoryError" if self._half and run.startswith("full") else None}]
            made = {"name": "held", "mean": 10 * loss, "seeds": seeds}
            (folder / "results.json").write_text(json.dumps({"data": [made]}))
        return 0


def test_each_run_once_and_again_only_what_is_missing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _Runs(lambda run: 3 if run == "full/seed-2" else 0)
    monkeypatch.setattr(ablation, "_call", runs)
    options: dict[str, Any] = {"rows": ["base", "full"], "seeds": [1, 2]}
    assert ablate(_settings(models), **options) == 1
    assert len(runs.commands) == 4
    again = _Runs()
    monkeypatch.setattr(ablation, "_call", again)
    assert ablate(_settings(models), **options) == 0
    assert [Path(command[1]).parent.parts[-2:] for command in again.commands] == [("full", "seed-2")]
    assert again.commands[0][2:] == ["--resume"]


def test_a_run_that_fails_stops_no_other_and_says_why(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs(lambda run: 1 if run.startswith("base") else 0))
    assert ablate(_settings(models), rows=["base", "full"], seeds=[1]) == 1
    printed = capsys.readouterr()
    assert "base, seed 1: failed (exit code 1)" in printed.out
    assert "line of base/seed-1" in printed.err
    table = (models / "out" / "ablation.md").read_text()
    assert "| base | 0 of 1 |" in table
    assert "| full | 1 of 1 |" in table


def test_an_interrupt_stops_the_rows_that_follow(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _Runs(lambda run: 130)
    monkeypatch.setattr(ablation, "_call", runs)
    assert ablate(_settings(models), rows=["base", "full"]) == 130
    assert len(runs.commands) == 1


def test_rouge_and_equal_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _Runs()
    monkeypatch.setattr(ablation, "_call", runs)
    settings, data = _settings(models), ["held.jsonl", "other.jsonl"]
    options = ["--seeds", "10,20"]
    ablate(settings, rows=["base", "full"], seeds=[1], match_time=True, eval_data=data, eval_options=options)
    trained = [command for command in runs.commands if command[0] == "train"]
    assert trained[2][2:] == ["--resume", "--match-time", str(models / "out" / "full" / "seed-1")]
    evaluated = runs.commands[1]
    folder = models / "out" / "base" / "seed-1"
    given = ["--data", data[0], "--data", data[1]]
    assert evaluated == ["eval", str(folder / "student"), *given, "--out", str(folder / "eval"), *options]
    table = (models / "out" / "ablation.md").read_text()
    assert "base, time of full" in table
    assert "ROUGE-L held" in table
    assert (models / "out" / "ablation.png").stat().st_size > 5000


def test_a_mean_of_some_seeds_is_left_out(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs(half=True))
    ablate(_settings(models), rows=["base", "full"], eval_data=["held.jsonl"])
    lines = (models / "out" / "ablation.md").read_text().splitlines()
    assert [line.count("| - |") > 0 for line in lines if line.startswith(("| base", "| full"))] == [True, True]
    figures = json.loads((models / "out" / "ablation.json").read_text())
    assert "ROUGE-L held" in figures["base"]["42"]
    assert "ROUGE-L held" not in figures["full"]["42"]


def test_a_later_command_adds_to_the_table(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs())
    ablate(_settings(models), rows=["base", "full"], seeds=[1, 2])
    ablate(_settings(models), rows=["+Hid"], seeds=[2, 3])
    table = (models / "out" / "ablation.md").read_text()
    assert "Seeds 1, 2, 3." in table
    assert "| base | 2 of 3 |" in table
    assert "| +Hid | 2 of 3 |" in table


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(InputError, match="expected no process at work in it"):
            ablation._call(["doctor"], tmp_path / "run.log")
    assert ablation._call(["doctor"], tmp_path / "run.log") == 0


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_passed_on_and_stops_the_rest(tmp_path: Path) -> None:
    """The real thing: the parent is interrupted while its child is at work."""
    out, ended = tmp_path / "demo", threading.Event()

    def interrupt() -> None:
        wait_for(lambda: out.exists() or ended.is_set())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert ablation._call(["demo", "--out", str(out)], tmp_path / "run.log") == 130
    finally:
        ended.set()
        thread.join()


def test_fdd_keeps_its_layers_and_tau_in_every_row(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs())
    settings = _settings(models, **{"base.loss": "fdd", "base.options.tau": 2})
    ablate(settings, rows=["base", "full", "1 layer"], own_rows=["strong=mta.lambda_dsa=3"], match_time=True)
    for folder in ("base", "full", "1-layer", "strong", "base-time-of-full"):
        text = (models / "out" / folder / "seed-42" / "ablation-config.yaml").read_text()
        made = TrainSettings.from_yaml(models / "out" / folder / "seed-42" / "ablation-config.yaml")
        assert made.base.options == {"tau": 2, "layer_pairs": [[4, 8], [6, 12], [8, 16]]}, text


def test_rows_of_one_s_own(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs())
    rows = [
        "other pairs = mta.layer_pairs=[[3, 5], [6, 11], [8, 16]], mta.lambda_hid=0.5",
        "base, 2 x rate=mta=false,training.learning_rate=1e-3",
    ]
    assert ablate(_settings(models), rows=["base", "full"], own_rows=rows, seeds=[1]) == 0
    made = {
        name: TrainSettings.from_yaml(models / "out" / name / "seed-1" / "ablation-config.yaml")
        for name in ("full", "other-pairs", "base-2-x-rate")
    }
    full: Any = made["full"].mta
    assert made["other-pairs"].mta == full | {"layer_pairs": [[3, 5], [6, 11], [8, 16]], "lambda_hid": 0.5}
    assert made["base-2-x-rate"].mta is False
    rate = {name: each.training.get("learning_rate") for name, each in made.items()}
    assert rate == {"full": None, "other-pairs": None, "base-2-x-rate": 1e-3}
    assert list(json.loads((models / "out" / "ablation.json").read_text())) == [
        "base",
        "full",
        "other pairs",
        "base, 2 x rate",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("strong", "row: expected NAME=override"),
        ("strong=", "row: expected NAME=override"),
        ("../x=mta.lambda_hid=1", "row: expected NAME=override"),
        (
            "warm=base.options.tau=5",
            r"expected overrides of mta.\*, training.\* other than the seed, got 'base.options",
        ),
        ("seed=mta.lambda_hid=1,training.seed=3", "other than the seed, got 'training.seed=3'"),
        ("full=mta.lambda_hid=1", "row 'full': expected another name, that of 'full' is taken"),
        ("plus-Hid=mta.lambda_hid=1", r"that of '\+Hid' is taken"),
        ("strong=mta.lambda_hidd=1", "unknown key 'lambda_hidd', did you mean 'lambda_hid'"),
        ("strong=mta.layer_pairs=[[1, 2]]", "granularity"),
    ],
)
def test_a_row_that_can_t_be(models: Path, row: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablate(_settings(models), rows=["base"], own_rows=[row])
    assert not (models / "out").exists()


def test_another_run_s_folder_is_not_taken_over(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs())
    ablate(_settings(models), rows=["base"])
    with pytest.raises(InputError, match="expected a run of these settings, it holds one of others"):
        ablate(_settings(models, **{"training.learning_rate": 1e-3}), rows=["base"])


def test_an_earlier_version_s_folder_goes_on(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_call", _Runs())
    ablate(_settings(models), rows=["base"])
    file = models / "out" / "base" / "seed-42" / "ablation-config.yaml"
    earlier = file.read_text().replace("  skip_unparsable: false\n", "")
    assert earlier != file.read_text()
    file.write_text(earlier)
    assert ablate(_settings(models), rows=["base"]) == 0
    with pytest.raises(InputError, match="expected a run of these settings, it holds one of others"):
        ablate(_settings(models, **{"spans.skip_unparsable": "true"}), rows=["base"])


@pytest.mark.parametrize("option", ["--rows=", "--seeds=,", "--seeds=1 2", "--row=strong"])
def test_nothing_to_run_is_refused(models: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    _settings(models)
    file = models / "config.yaml"
    values = {each: {"path": str(models / each)} for each in ("student", "teacher")}
    file.write_text(json.dumps({"output_dir": str(models / "out"), "data": {"train": "sample"}, **values}))
    assert main(["ablate", str(file), option]) == 2
    told = capsys.readouterr().err
    messages = ("expected at least one, got none", "seeds: expected integers", "row: expected NAME=override")
    assert any(message in told for message in messages)


@pytest.mark.parametrize("options", ["--seeds 10 20", "--seeds a", "--greedyy", "--columns a", "--preset p"])
def test_options_of_eval_are_checked_before_the_training(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "none.yaml", "--eval-options", options]) == 2
    told = capsys.readouterr().err
    assert "eval_options: " in told or "seeds: expected" in told or "columns: expected" in told or "preset: " in told


def test_lists_and_files_whose_name_has_a_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast import cli

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "1,2"):
        (tmp_path / name).touch()
    assert cli._seeds("1,2") == [1, 2]
    assert len(cli._seeds(",".join(map(str, range(200))))) == 200
    assert cli._sources(["~/a,b.jsonl", "c,d", "x" * 300 + ",y"]) == ["~/a,b.jsonl", "c", "d", "x" * 300, "y"]


def test_bad_input(models: Path) -> None:
    with pytest.raises(InputError, match="got 'ful', did you mean 'full'"):
        ablate(_settings(models), rows=["ful"])
    with pytest.raises(InputError, match="match_time: expected the rows base and full"):
        ablate(_settings(models), rows=["full"], match_time=True)
    with pytest.raises(InputError, match="mta: expected the settings of the full method, got false"):
        ablation_rows(
            TrainSettings.from_yaml(
                models / "config.yaml", ["student.path=s", "data.train=t", "output_dir=o", "mta=false"]
            ),
            4,
            8,
        )


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_interval_is_student_s() -> None:
    # three values with mean 2 and deviation 1: t(0.975, 2) = 4.3027
    assert interval_margin([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert interval_margin([1.0]) is None


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    losses = {("base", 1): 3.0, ("base", 2): 5.0, ("full", 1): 2.5, ("full", 2): 4.1}
    for (row, seed), loss in losses.items():
        folder = tmp_path / row / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"steps": 2, "train_seconds": 1.0, "eval_base": loss}))
    ablation.report(tmp_path, ["base", "full"], [1, 2])
    row = next(line for line in (tmp_path / "ablation.md").read_text().splitlines() if line.startswith("| full"))
    margin = 12.7062 * statistics.stdev([0.5, 0.9]) / 2**0.5
    assert "| 3.3000 ± 1.1314 |" in row
    assert f"-0.7000 [{-0.7 - margin:.4f}, {-0.7 + margin:.4f}]" in row
    assert "full,2,eval_base,4.1" in (tmp_path / "ablation.csv").read_text()


# --- for real ----------------------------------------------------------------------------------------------------


def _in_this_process(command: Sequence[str], log: Path) -> int:
    """``ablation._call`` without a process of its own, which the tests above start: six would import all anew."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return main(list(command))


def test_two_rows_for_real(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(ablation, "_call", _in_this_process)
    options = ["--seeds", "10", "--max-rows", "2", "--max-prompt-length", "250", "--max-length", "258"]
    settings = _settings(models)
    code = ablate(settings, rows=["base", "full"], match_time=True, eval_data=["sample"], eval_options=options)
    logs = "\n".join(log.read_text() for log in (models / "out").rglob("run.log"))
    assert code == 0, logs
    matched = json.loads((models / "out" / "base-time-of-full" / "seed-42" / "results.json").read_text())
    full = json.loads((models / "out" / "full" / "seed-42" / "results.json").read_text())
    assert matched["train_seconds"] >= full["train_seconds"]
    assert full["eval_dsa"] > 0
    table = (models / "out" / "ablation.md").read_text()
    assert table.count("1 of 1") == 3
    assert "ROUGE-L sample" in table


def test_a_report_of_failed_rows_is_its_own(tmp_path: Path) -> None:
    ablation.report(tmp_path, ["base"], [42])  # no run has any figure
    ablation.check_reports(tmp_path)
    (tmp_path / "ablation.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="expected a free name or an earlier ablation"):
        ablation.check_reports(tmp_path)
