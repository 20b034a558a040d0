"""Going on with a run: checkpoints of earlier versions, damaged files, settings that were changed since, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from safetensors.torch import load_file
from training import make_rows, make_trainer, weights

from mta_fast import LayerMap, MTAConfig
from mta_fast.__main__ import main
from mta_fast.distill import MTATrainer, manifest, models
from mta_fast.distill.training import saving
from mta_fast.distill.training.checkpoints import export_checkpoint
from mta_fast.distill.training.fingerprint import compare, of_rows
from mta_fast.distill.training.interrupt import FinishStep
from mta_fast.errors import InputError
from mta_fast.interrupt import Terminated, terminable

# runs of this config at version 0.1 (max_steps 4, saved at step 2; LoRA: student.lora.r=2), stopped after step 2;
# expected.safetensors: the model file of their checkpoint-4
EARLIER = Path(__file__).parent / "fixtures/earlier"
CONFIG = MTAConfig(LayerMap.proportional(2, 4).pairs, "word")


@pytest.fixture
def earlier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of an earlier version in the working directory, with its teacher, student and rows; its kind."""
    kind: str = request.param
    if kind == "lora":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(300)
    for name, layers, width in (("teacher", 4, 16), ("student", 2, 8)):
        make_model("llama", layers, width, vocabulary=len(tokenizer)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copytree(EARLIER / kind, "run")
    return kind


def _go_on(*changes: str, options: tuple[str, ...] = ()) -> int:
    overrides = [part for change in changes for part in ("--override", change)]
    return main(["train", "run/config.yaml", "--resume", *overrides, *options])


def _assert_as_expected(name: str = "model", where: str = "run/checkpoint-4") -> None:
    final, expected = load_file(f"{where}/{name}.safetensors"), load_file("run/expected.safetensors")
    assert final.keys() == expected.keys()
    for key, value in final.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("earlier", ["full", "lora"], indirect=True)
def test_a_run_of_an_earlier_version_goes_on(earlier: str) -> None:
    with pytest.warns(UserWarning, match="checkpoint-2: made by an earlier version") as warned:
        assert _go_on() == 0
    assert len([each for each in warned if "earlier version" in str(each.message)]) == 1
    _assert_as_expected("adapter_model" if earlier == "lora" else "model")
    assert manifest.verify(Path("run/checkpoint-4"))


@pytest.mark.parametrize("earlier", ["full"], indirect=True)
def test_settings_that_change_the_run_are_refused(earlier: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("run/config.yaml").read_text()
    shutil.copy("rows.jsonl", "others.jsonl")
    assert _go_on("training.learning_rate=0.5", "data.train=others.jsonl", "training.logging_steps=7") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for each in ("training.learning_rate: 0.01 -> 0.5", "data.train: rows.jsonl -> others.jsonl", "2 values differ"):
        assert each in told
    assert "logging_steps" not in told
    for change in ("training.seed=1", "training.max_steps=6", "student.lora.r=2", "base.loss=skl", "data.max_rows=4"):
        assert _go_on(change) == 2
        assert f"{change.split('=')[0].removesuffix('.r')}" in capsys.readouterr().err
    assert Path("run/config.yaml").read_text() == before
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        file = Path("run/checkpoint-2", name)
        file.rename("kept")
        assert _go_on() == 2
        assert f"{name} (missing)" in capsys.readouterr().err
        Path("kept").rename(file)


# --- signals -----------------------------------------------------------------------------------------------------


def _once(number: int, count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that sends this process a signal in its call number ``count``."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(1, 1000))

        def called(*args: Any, **options: Any) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), number)
            return call(*args, **options)

        return called

    return wrap


@pytest.mark.filterwarnings("ignore:run/checkpoint-2")
@pytest.mark.parametrize("earlier", ["full"], indirect=True)
@pytest.mark.parametrize(
    ("number", "code", "owner", "name"),
    [
        (signal.SIGINT, 130, MTATrainer, "compute_loss"),
        (signal.SIGTERM, 143, MTATrainer, "evaluate"),
        (signal.SIGTERM, 143, saving.manifest, "write_manifest"),
        (signal.SIGTERM, 143, models, "common_vocabulary"),
    ],
    ids=["step", "evaluation", "saving", "loading"],
)
def test_both_signals_save_and_stop(
    earlier: str,
    number: int,
    code: int,
    owner: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's may be ignored
    try:
        with monkeypatch.context() as patch:
            if name == "common_vocabulary":
                from mta_fast.distill.training import joining as owner
            patch.setattr(owner, name, _once(number, 1)(getattr(owner, name)))
            evaluating = ("data.eval=rows.jsonl", "training.eval_strategy=steps", "training.eval_steps=1")
            saves = ("training.save_steps=1",) if name == "write_manifest" else ("training.save_strategy=no",)
            assert _go_on(*saves, *(evaluating if name == "evaluate" else ())) == code
    finally:
        signal.signal(signal.SIGINT, former)
    found = sorted(path.name for path in Path("run").glob("checkpoint-*"))
    if name == "common_vocabulary":  # nothing was trained
        assert found == ["checkpoint-2"]
        return
    assert found == ["checkpoint-2", "checkpoint-3"]
    assert "stopped after step 3; go on with --resume" in capsys.readouterr().out
    assert manifest.verify(Path("run/checkpoint-3"))
    assert not Path("run/student").exists()
    if name == "compute_loss":
        assert _go_on() == 0
        _assert_as_expected()


def test_the_checkpoint_of_a_stop_is_kept_beside_the_best(tmp_path: Path) -> None:
    """Without the stop the Trainer would load the best one and remove the last."""
    trainer = _trainer(
        tmp_path, max_steps=4, save_strategy="best", eval_strategy="steps", eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, learning_rate=0.05,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.stop_wanted = lambda: trainer.state.global_step == 2
    trainer.train()
    assert trainer.stopped
    assert trainer.state.best_global_step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    stored = load_file(tmp_path / "checkpoint-2/model.safetensors")
    own = trainer.model.student.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stored.items())


def test_an_ignored_ctrl_c_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with FinishStep() as finish:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
            assert finish.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, former)


def test_the_second_signal_stops_at_once_but_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for relayed in (False, True):
        if relayed:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with FinishStep() as finish:
            finish._training = True
            os.kill(os.getpid(), signal.SIGTERM)
            if relayed:
                os.kill(os.getpid(), signal.SIGTERM)
                continue
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_any_command_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast import doctor

    monkeypatch.setattr(doctor, "report", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["doctor"]) == 143
    with terminable() as request:
        assert request.number is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- damaged files -----------------------------------------------------------------------------------------------


def _trainer(out: Path, **options: Any) -> MTATrainer:
    size = len(make_tokenizer())
    student = options.pop("student", None) or make_model("llama", 2, 8, vocabulary=size)
    teacher = options.pop("teacher", None) or make_model("llama", 4, 16, vocabulary=size)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    return make_trainer(out, student=student, teacher=teacher, mta=CONFIG, **settings | options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; tests leave it as it was."""
    out = tmp_path_factory.mktemp("saved")
    _trainer(out).train()
    return out


def test_every_damaged_file_is_named(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    folder = run / "checkpoint-2"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in files}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.json", "mta/config.json"} < names
    for file in files:
        content = file.read_bytes()
        for bit in (0, 4 * len(content), 8 * len(content) - 1):  # the first, one in the middle, the last
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(InputError, match=f"1 differs: {file.relative_to(folder)} \\(other content"):
                manifest.verify(folder)
        file.write_bytes(content[:-1])
        with pytest.raises(InputError, match=f"1 differs: {file.relative_to(folder)}"):
            manifest.verify(folder)
        file.unlink()
        with pytest.raises(InputError, match=f"1 differs: {file.relative_to(folder)} \\(missing\\)"):
            manifest.verify(folder)
        file.write_bytes(content)
    assert manifest.verify(folder)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / "mta/projections.safetensors").write_bytes(b"")
    (folder / "extra.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as refused:
        _trainer(run).train(resume_from_checkpoint=True)
    told = str(refused.value)
    for each in (
        "4 differ",
        "optimizer.pt (missing)",
        "scheduler.pt (missing)",
        "mta/projections.safetensors (0 bytes",
    ):
        assert each in told
    assert "\n" not in told
    assert "checkpoint-1 beside it is whole: move checkpoint-2 away" in told


def test_what_reads_the_student_alone_asks_for_its_files_alone(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "optimizer.pt").unlink()
    export_checkpoint(folder, tmp_path / "student")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=r"1 differs: model.safetensors \(other content\); no earlier checkpoint"):
        export_checkpoint(folder, tmp_path / "again")
    with pytest.raises(InputError, match="1 differs: model.safetensors"):
        models.load_model(str(folder))
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    _trainer(tmp_path, save_only_model=True, max_steps=1).train()
    with pytest.raises(InputError, match="got the model alone \\(save_only_model\\)"):
        _trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


# --- another run -------------------------------------------------------------------------------------------------


def test_another_run_is_refused_with_all_that_differs(saved: Path) -> None:
    folder = saved / "checkpoint-1"
    _trainer(saved).check_checkpoint(folder, allow_changes=False)
    _trainer(saved, logging_steps=5, save_steps=7, report_to=[]).check_checkpoint(folder, allow_changes=False)
    rows = [dict(row) for row in make_rows()]
    rows[3]["output"] += " more"
    other = _trainer(saved, rows=rows, learning_rate=0.5, seed=7, base_loss="skl", gradient_accumulation_steps=2)
    with pytest.raises(InputError) as refused:
        other.check_checkpoint(folder, allow_changes=False)
    told = str(refused.value)
    for each in (
        "5 values differ", "training.learning_rate: 0.001 -> 0.5", "training.seed: 42 -> 7", "base: srkl -> skl",
        "train_dataset.output: ", "training.gradient_accumulation_steps: 1 -> 2",
    ):  # fmt: skip
        assert each in told
    teacher = make_model("llama", 4, 16, vocabulary=len(make_tokenizer()))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.01)
    with pytest.raises(InputError, match="1 value differs .*: teacher: "):
        _trainer(saved, teacher=teacher).check_checkpoint(folder, allow_changes=False)
    other.args.max_steps = 0
    with pytest.warns(UserWarning, match=r"goes on with other values: .*learning_rate: 0.001 -> 0.5"):
        other.check_checkpoint(folder, allow_changes=True)


def test_changes_that_are_meant(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    trainer = _trainer(run, learning_rate=0.5)
    with pytest.warns(UserWarning, match="goes on with other values"):
        trainer.train(resume_from_checkpoint=run / "checkpoint-1", allow_changes=True)
    assert trainer.state.global_step == 2
    kept = json.loads((run / "checkpoint-2/fingerprint.json").read_text())
    assert kept["run"]["training.learning_rate"] == 0.5
    assert "token" not in " ".join(key for key in kept["run"] if key.startswith("training"))


def test_how_long_a_run_is_matters_where_its_schedule_falls() -> None:
    falling = {"training.lr_scheduler_type": "linear", "training.max_steps": 4, "training.num_train_epochs": 3}
    constant = falling | {"training.lr_scheduler_type": "constant"}
    longer = {"training.max_steps": 8, "training.num_train_epochs": 5}
    assert [each.key for each in compare(falling, falling | longer) if each.matters] == ["training.max_steps"]
    assert not any(each.matters for each in compare(falling, falling | longer, finished=True))
    assert not any(each.matters for each in compare(constant, constant | longer))
    follows = constant | {"follows_progress": True}
    assert any(each.matters for each in compare(follows, follows | longer))
    evaluated = {"training.eval_steps": 4, "training.load_best_model_at_end": False}
    assert not compare(evaluated, evaluated | {"training.eval_steps": 2})[0].matters
    best = evaluated | {"training.load_best_model_at_end": True}
    assert compare(best, best | {"training.eval_steps": 2})[0].matters


def test_the_digest_of_rows_is_that_of_their_values() -> None:
    import datasets

    rows = make_rows()[:4]
    of = of_rows("rows", rows)
    assert of_rows("rows", datasets.Dataset.from_list(rows)) == of
    moved = [dict(row) for row in rows]
    moved[2]["word_spans"] = [[start, end + 1] for start, end in moved[2]["word_spans"]]
    changed = of_rows("rows", moved)
    assert [key for key in of if of[key] != changed[key]] == ["rows.word_spans"]
    assert of["rows.output"] != of_rows("rows", rows[::-1])["rows.output"]
    assert of_rows("rows", iter(rows)) == {"rows.rows": "streamed"}


def test_settings_are_kept_and_later_ones_recorded_beside_them(tmp_path: Path) -> None:
    from mta_fast.distill.training.resuming import record
    from mta_fast.distill.training.settings import DataSettings, StudentSettings, TrainSettings

    for steps in (4, 4, 8, 4, 8, 9):
        settings = TrainSettings(StudentSettings("s"), DataSettings("d"), "run", training={"max_steps": steps})
        record(tmp_path, settings)
    assert {path.name: path.read_text().split("max_steps: ")[1].strip() for path in tmp_path.iterdir()} == {
        "config.yaml": "4",
        "config-2.yaml": "8",
        "config-3.yaml": "9",
    }
    earlier = (tmp_path / "config-3.yaml").read_text().replace("  skip_unparsable: false\n", "")
    (tmp_path / "config-3.yaml").write_text(earlier)
    record(tmp_path, settings)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "config-3.yaml").read_text() == earlier
    (tmp_path / "config-3.yaml").write_text("[")
    record(tmp_path, settings)
    assert (tmp_path / "config-3.yaml").read_text() == "["
    assert (tmp_path / "config-4.yaml").is_file()


def test_keys_of_a_later_version_do_not_differ() -> None:
    from mta_fast.distill.training.resuming import differences
    from mta_fast.distill.training.settings import DataSettings, LoraSettings, StudentSettings, TrainSettings

    settings = TrainSettings(StudentSettings("s", lora=LoraSettings()), DataSettings("d"), "run").to_dict()
    earlier = {**settings, "student": {**settings["student"], "lora": {"r": 16}}}
    del earlier["spans"]
    assert not differences(earlier, settings)
    settings["spans"]["skip_unparsable"] = True
    assert [each.key for each in differences(earlier, settings)] == ["spans.skip_unparsable"]
    settings["student"]["lora"] = None
    assert "student.lora.r" in [each.key for each in differences(earlier, settings)]


def test_resuming_gives_the_weights_of_a_run_that_was_not(saved: Path) -> None:
    """From a checkpoint with a manifest and a fingerprint."""
    resumed = _trainer(saved)
    resumed.train(resume_from_checkpoint=saved / "checkpoint-1")
    stored = load_file(saved / "checkpoint-2/model.safetensors")
    assert all(torch.equal(value, weights(resumed)[f"student.{name}"]) for name, value in stored.items())


def test_several_evaluation_sets_are_digested_each() -> None:
    rows = make_rows()[:2]
    assert of_rows("eval", {"a": rows, "b": rows})["eval.a.rows"] == 2


def test_a_stop_is_saved_before_an_evaluation_and_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may not wait for the evaluation; and none follows for an epoch that was cut short."""
    trainer = _trainer(tmp_path, max_steps=4, save_strategy="no", eval_strategy="steps", eval_steps=2)
    trainer.stop_wanted = lambda: trainer.state.global_step >= 2
    found: list[bool] = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *a, **o: (found.append((tmp_path / "checkpoint-2").is_dir()), evaluate(*a, **o))[1]
    )
    trainer.train()
    assert found == [True]
    assert trainer.stopped
    assert manifest.verify(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])  # saved once more after it
