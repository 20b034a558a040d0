"""The paper's tables beside what runs have, and its settings of evaluation, as the page has them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from mta_fast import _yaml
from mta_fast.__main__ import main
from mta_fast.config import PRESETS as RECIPES
from mta_fast.distill.ablation import ablation_rows
from mta_fast.distill.reproduction import ABLATION, AVERAGE, ROWS, SETS, reproduction
from mta_fast.distill.responses.evaluation import PRESETS, EvaluationSettings
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")


def _write(folder: Path, scores: dict[str, float], *, preset: str | None = "paper", error: str | None = None) -> None:
    """What ``mta-fast eval`` leaves."""
    seeds = [{"seed": 30, "error": None}, {"seed": 40, "error": error}]
    data = [{"name": name, "mean": mean, "seeds": seeds} for name, mean in scores.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"preset": preset, "data": data}))


def _row(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def _fours(first: float) -> dict[str, float]:
    return {name: first + i for i, name in enumerate(SETS)}


# --- the paper's figures -----------------------------------------------------------------------------------------


def test_the_paper_s_averages_are_those_of_its_sets() -> None:
    whole = [scores for scores in (*ABLATION.values(), *(row.paper for row in ROWS)) if len(scores) == len(SETS) + 1]
    assert len(whole) == 8 + 2
    for scores in whole:
        assert sum(scores[name] for name in SETS) / len(SETS) == pytest.approx(scores[AVERAGE], abs=0.006)


def test_rows_are_recipes_and_those_of_ablate(tmp_path: Path) -> None:
    runs = {row.run for row in ROWS if row.run is not None}
    assert {re.sub("-(base|tau5)$", "", run) for run in runs} == set(RECIPES)
    assert set(RECIPES) <= runs
    (tmp_path / "run.yaml").write_text("{output_dir: o, teacher: {path: t}, student: {path: s}, data: {train: sample}}")
    assert list(ABLATION) == list(ablation_rows(TrainSettings.from_yaml(tmp_path / "run.yaml"), 12, 48))


def test_the_committed_tables_have_the_paper_s_figures(tmp_path: Path) -> None:
    committed = (ROOT / "bench/results/reproduction.md").read_text(encoding="utf-8")
    papers = [re.sub(r" / [^|]*\|", " |", text) for text in (committed, reproduction(tmp_path))]
    states = [re.sub(r"\| [^|]*\|$", "|", text, flags=re.MULTILINE) for text in papers]
    assert states[0] == states[1]


# --- what is here ------------------------------------------------------------------------------------------------


def test_runs_stand_beside_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "eval/runs-gpt2-student", _fours(20))
    _write(tmp_path / "eval/runs-gpt2-base-student", _fours(19) | {"other": 90.0})
    assert main(["reproduce", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text == reproduction(tmp_path)
    pair = "GPT-2 120M <- 1.5B, DistiLLM"
    cells = ["25.77 / 20.00", "14.19 / 21.00", "16.67 / 22.00", "29.18 / 23.00", "21.45 / 21.50"]
    assert _row(text, f"{pair} + MTA") == [*cells, "+1.24 / +1.00", "1 run, 4 of 4 sets"]
    assert _row(text, pair)[-3:] == ["20.21 / 20.50", "-", "1 run, 4 of 4 sets"]
    assert _row(text, "OPT 1.3B <- 6.7B, DistiLLM")[-3:] == ["22.98 / -", "-", "not run"]
    assert _row(text, f"{pair}-2 + MTA")[-2:] == ["+1.35 / -", "no recipe"]


def test_the_gain_over_fdd_is_taken_at_one_tau(tmp_path: Path) -> None:
    for run, first in (("tau5", 10), ("base", 20), (None, 23)):
        _write(tmp_path / "eval" / "-".join(filter(None, ["runs-gpt2-fdd", run, "student"])), _fours(first))
    assert _row(reproduction(tmp_path), "GPT-2 120M <- 1.5B, FDD, tau 2 + MTA")[-2] == "+1.02 / +3.00"
    shutil.rmtree(tmp_path / "eval/runs-gpt2-fdd-base-student")
    assert _row(reproduction(tmp_path), "GPT-2 120M <- 1.5B, FDD, tau 2 + MTA")[-2] == "+1.02 / -"


def test_what_can_t_be_compared_is_said(tmp_path: Path) -> None:
    _write(tmp_path / "eval/runs-opt-student", {"dolly": 20.0}, preset=None)
    _write(tmp_path / "eval/runs-opt-base-student", _fours(20), error="MemoryError")
    text = reproduction(tmp_path)
    assert _row(text, "OPT 1.3B <- 6.7B, DistiLLM + MTA") == [
        "- / 20.00",
        *["- / -"] * 3,
        "23.97 / -",
        "+0.99 / -",
        "1 run, 1 of 4 sets, own evaluation",
    ]
    assert _row(text, "OPT 1.3B <- 6.7B, DistiLLM")[-1] == "1 run, 0 of 4 sets"  # the mean of some seeds is none
    (tmp_path / "eval/runs-opt-student/results.json").write_text('{"data": [{}]}')
    with pytest.raises(
        InputError, match=r"results.json: expected results of mta-fast eval, they can't be read .KeyErr"
    ):
        reproduction(tmp_path)
    with pytest.raises(InputError, match="expected the folder that the recipes were run in, there is none"):
        reproduction(tmp_path / "none")


def test_the_rows_of_ablate_are_means_over_seeds(tmp_path: Path) -> None:
    for seed, first in ((1, 20), (2, 22)):
        _write(tmp_path / f"runs/gpt2/plus-Hid/seed-{seed}/eval", _fours(first))
    (tmp_path / "runs/gpt2/plus-Hid/seed-3").mkdir()  # not evaluated yet
    row = _row(reproduction(tmp_path), r"+Hid")
    assert row == [
        "25.89 / 21.00",
        "13.68 / 22.00",
        "16.86 / 23.00",
        "25.77 / 24.00",
        "20.55 / 22.50",
        "2 runs, 4 of 4 sets",
    ]


# --- the preset on the page --------------------------------------------------------------------------------------


def _flat(settings: EvaluationSettings) -> dict[str, Any]:
    values = asdict(settings)
    return values | values.pop("generation")


def test_every_difference_of_the_preset_is_on_the_page() -> None:
    paper, own = (_flat(settings) for settings in (PRESETS["paper"], EvaluationSettings()))
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", PAGE.split("evaluates as the script")[1], re.MULTILINE)
    shown = {
        name: tuple(_yaml.loads(f"[{cell}]" if "," in cell else cell, name) for cell in cells) for name, *cells in rows
    }
    differing = {name: (paper[name], own[name]) for name in paper if paper[name] != own[name]}
    assert shown == {
        name: tuple(list(v) if isinstance(v, tuple) else v for v in pair) for name, pair in differing.items()
    }
