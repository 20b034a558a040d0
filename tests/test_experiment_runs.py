"""bench/experiment with a tiny teacher: what its runs train on, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tokenizer

from bench.experiment.arms import BASE, FULL, LONGER, PLACEBO, RunSettings, arms
from bench.experiment.command import Experiment, measure
from bench.experiment.plan import COMPARISON, SWEEP
from bench.experiment.prepare import Sources
from bench.experiment.runs import measured, trainer_of
from bench.experiment.setups import FRESH, HELD_OUT, OUTSIDE, SETUPS
from mta_fast.distill.data import load_sample
from mta_fast.errors import InputError

LENGTH = 400
SETUP = replace(
    FRESH,
    name="tiny",
    layers=4,
    width=16,
    heads=2,
    vocabulary=400,
    steps=2,
    learning_rates=(1e-3,),
    seeds=(1,),
    sweep_seeds=(101,),
    row_seeds=(1,),
    tokens=2 * LENGTH,
    max_length=LENGTH,
    max_prompt=LENGTH - 50,
    selected=2,
    held=2,
    most_rows=6,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A random Llama of 8 layers, and bundled rows."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experiment")
    tokenizer = make_tokenizer(512)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    for part in (transformers.LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder / "teacher")
    rows = load_sample()
    written = {"dolly": rows[:12], "outside": [row | {"output": [row["output"], "-"]} for row in rows[12:15]]}
    for name, part in written.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n", encoding="utf-8")
    files = (folder / "dolly.jsonl", folder / "outside.jsonl")
    return Sources(*files, folder / "work", str(folder / "teacher"))


def test_the_arms_of_an_experiment(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETUPS, SETUP.name, SETUP)
    given = (SETUP.name, sources.dolly, sources.outside, sources.work, tmp_path, (SWEEP, COMPARISON), None)
    text = measure(*given, teacher=sources.teacher).markdown()
    assert f"{FULL} vs {PLACEBO}" in text
    assert "can't be compared" not in text
    runs = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "runs").iterdir()}
    assert len(runs) == 3 + 4
    assert {run["error"] for run in runs.values()} == {None}
    found = {run["settings"]["arm"]: run for name, run in runs.items() if name.startswith(COMPARISON)}
    first, last = ({arm: run["points"][i][OUTSIDE]["kl"] for arm, run in found.items()} for i in (0, -1))
    assert len(set(first.values())) == 1  # one start
    assert len({last[arm] for arm in (BASE, FULL, PLACEBO)}) == 3
    assert len({found[arm]["batches"] for arm in (BASE, FULL, PLACEBO)}) == 1
    assert found[LONGER]["settings"]["steps"] >= SETUP.steps

    beside = (*given[:4], tmp_path / "beside", (SWEEP,), None)
    measure(*beside, teacher=sources.teacher, jobs=2)  # in processes of their own
    for file in (tmp_path / "beside" / "runs").iterdir():
        run, expected = json.loads(file.read_text()), runs[file.stem]
        assert run["error"] is None
        assert (run["start"], run["batches"]) == (expected["start"], expected["batches"])
        assert run["points"][-1][OUTSIDE]["kl"] == pytest.approx(expected["points"][-1][OUTSIDE]["kl"], rel=1e-4)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a run was made twice")

    monkeypatch.setattr("bench.experiment.command.run", again)
    monkeypatch.setattr(Experiment, "prepare", again)
    measure(*given[:4], tmp_path / "nothing", (SWEEP,), 0.0, teacher=sources.teacher)  # begins and prepares nothing
    with pytest.raises(InputError, match="device: expected one of cpu, cuda, got 'gpu'"):
        measure(*given, teacher=sources.teacher, device="gpu")
    assert measure(*given, teacher=sources.teacher).markdown() == text
    other = sources.dolly.with_name("other.jsonl")
    other.write_text("".join(sources.dolly.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="it holds one of others"):
        measure(given[0], other, *given[2:], teacher=sources.teacher)


def test_the_placebo_is_in_mta_alone_and_in_training_alone(sources: Sources, tmp_path: Path) -> None:
    experiment = Experiment(SETUP, sources, tmp_path)
    experiment.prepare()
    prepared, outputs, figures = experiment.prepared, {}, {}
    for name, arm in arms(prepared.full).items():
        if name not in (FULL, PLACEBO):
            continue
        trainer = trainer_of(prepared, arm, RunSettings(1, 1e-3, 2), str(tmp_path / "run"))
        trainer.begin(1 if arm.placebo else None)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        outputs[name] = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
        figures[name] = measured(trainer, prepared, (HELD_OUT,))
    full, placebo = outputs[FULL], outputs[PLACEBO]
    assert torch.equal(full.base, placebo.base)
    assert not torch.isclose(full.dsa, placebo.dsa)
    assert not torch.isclose(full.hid, placebo.hid)
    assert figures[FULL] == figures[PLACEBO]
