"""``mta-fast reproduce``: the paper's ROUGE-L beside that of the runs in a folder, as tables.

The paper's figures are second-hand: docs/reproduction.md says where they are from, and which of them two sources have.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mta_fast.distill.ablation_report import BASE, EVAL_FOLDER, run_folder
from mta_fast.errors import InputError
from mta_fast.files import RESULTS_FILE, user_path

SETS = {"dolly": "Dolly", "self-inst": "Self-Instruct", "vicuna": "Vicuna", "sinst": "Super-NI"}  # by file name
AVERAGE = "average"
EVALUATIONS, ABLATED = Path("eval"), Path("runs", "gpt2")  # where eval and ablate write by themselves
Scores = Mapping[str, float]  # ROUGE-L by the names of SETS, and AVERAGE


def _scores(average: float | None, *sets: float) -> Scores:
    named = dict(zip(SETS, sets, strict=True)) if sets else {}
    return named if average is None else named | {AVERAGE: average}


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables.

    Attributes:
        title: what is trained.
        run: the run in runs/ that does the same; None: there is no recipe for it.
        paper: the paper's scores, as far as they are known.
        against: the titles of the rows that the gain of MTA is taken over: the paper's, and ours.
    """

    title: str
    run: str | None
    paper: Scores = field(default_factory=dict)
    against: tuple[str, str] | None = None


def _pair(pair: str, method: str, run: str | None, alone: Scores, full: Scores) -> tuple[PaperRow, ...]:
    base = PaperRow(f"{pair}, {method}", None if run is None else f"{run}-base", alone)
    return base, PaperRow(f"{base.title} + MTA", run, full, (base.title, base.title))


def _fdd(pair: str, run: str | None, alone: float, full: float) -> tuple[PaperRow, ...]:
    """FDD alone has another temperature in the paper than beside MTA; our gain is taken at the same one."""
    tau = (f"{run}-tau5", f"{run}-base") if run is not None else (None, None)
    paper, base = (PaperRow(f"{pair}, FDD, tau {each}", name) for each, name in zip((5, 2), tau, strict=True))
    paper = PaperRow(paper.title, paper.run, _scores(alone))
    return paper, base, PaperRow(f"{base.title} + MTA", run, _scores(full), (paper.title, base.title))


DISTILLM, FULL = _scores(20.21, 25.65, 13.39, 16.50, 25.28), _scores(21.45, 25.77, 14.19, 16.67, 29.18)
ROWS: tuple[PaperRow, ...] = (
    *_fdd("GPT-2 120M <- 1.5B", "gpt2-fdd", 19.48, 20.50),
    *_pair("GPT-2 120M <- 1.5B", "DistiLLM", "gpt2", DISTILLM, FULL),
    *_pair("GPT-2 120M <- 1.5B", "DistiLLM-2", None, _scores(18.59), _scores(19.94)),
    *_fdd("Qwen1.5 0.5B <- 1.8B", "qwen1.5-fdd", 19.27, 20.92),
    *_pair("Qwen1.5 0.5B <- 1.8B", "DistiLLM", "qwen1.5", _scores(19.80), _scores(21.01)),
    *_pair("Qwen1.5 0.5B <- 1.8B", "DistiLLM-2", "qwen1.5-distillm2", _scores(23.39), _scores(24.73)),
    *_fdd("OPT 1.3B <- 6.7B", None, 21.74, 22.90),
    *_pair("OPT 1.3B <- 6.7B", "DistiLLM", "opt", _scores(22.98), _scores(23.97)),
    *_pair("OPT 1.3B <- 6.7B", "DistiLLM-2", "opt-distillm2", _scores(22.96), _scores(23.22)),
)
# of the rows that ``mta-fast ablate`` trains; GPT-2 with DistiLLM
ABLATION: dict[str, Scores] = {
    BASE: DISTILLM,
    "+Hid": _scores(20.55, 25.89, 13.68, 16.86, 25.77),
    "+DSA": _scores(20.92, 25.77, 14.24, 16.27, 27.40),
    "full": FULL,
    "words only": _scores(20.80, 25.82, 13.54, 16.67, 27.16),
    "phrases only": _scores(21.17, 25.96, 14.25, 17.03, 27.42),
    "no weights": _scores(20.66, 25.95, 14.10, 16.38, 26.21),
    "1 layer": {},
    "2 layers": {},
    "3 layers": FULL,
    "4 layers": {},
    "5 layers": {},
}


def reproduction(folder: str | Path = ".") -> str:
    """Both tables as Markdown, every cell "paper / here".

    Args:
        folder: the one that the recipes were run in: evaluations of ``mta-fast eval runs/NAME/student`` in eval/, those
            of ``mta-fast ablate examples/gpt2.yaml`` in runs/gpt2/.

    Raises:
        InputError: no such folder, or a results.json that is none of an evaluation.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder that the recipes were run in, there is none")
    found = {row.title: _evaluations(_files_of(folder, row.run)) for row in ROWS}
    titles = {row.title: row for row in ROWS}
    lines = []
    for row in ROWS:
        here, state = found[row.title]
        gain = "-"
        if row.against is not None:
            theirs, ours = row.against
            gain = _cell(_gain(row.paper, titles[theirs].paper), _gain(here, found[ours][0]), "+.2f")
        lines.append([row.title, *_cells(row.paper, here), gain, state if row.run is not None else "no recipe"])
    ablated = []
    for name, paper in ABLATION.items():
        here, state = _evaluations(sorted(run_folder(folder / ABLATED, name, 0).parent.glob(f"seed-*/{EVAL_FOLDER}")))
        ablated.append([name, *_cells(paper, here), state])
    head = [*SETS.values(), AVERAGE]
    parts = ["## Recipes", _table(["recipe", *head, "gain of MTA", "here"], lines)]
    parts += ["## Ablation", _table(["row", *head, "here"], ablated)]
    return "\n\n".join(parts) + "\n"


def _files_of(folder: Path, run: str | None) -> list[Path]:
    return [] if run is None else [folder / EVALUATIONS / f"runs-{run}-student"]


def _evaluations(folders: Sequence[Path]) -> tuple[Scores, str]:
    """The means over the runs that have been evaluated, and in words what they are of."""
    files = [file for file in (each / RESULTS_FILE for each in folders) if file.is_file()]
    made = [_scores_of(file) for file in files]
    if not made:
        return {}, "not run"
    scores = {
        name: statistics.fmean(each[name] for each, _ in made) for name in SETS if all(name in e for e, _ in made)
    }
    if len(scores) == len(SETS):
        scores[AVERAGE] = statistics.fmean(scores.values())
    state = f"{len(made)} run" + "s" * (len(made) > 1) + f", {sum(name in scores for name in SETS)} of {len(SETS)} sets"
    return scores, state + ("" if all(paper for _, paper in made) else ", own evaluation")


def _scores_of(file: Path) -> tuple[dict[str, float], bool]:
    """ROUGE-L of the sets with every seed, and whether they were evaluated as the paper's preset says."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        sets = {
            each["name"]: float(each["mean"])
            for each in results["data"]
            if each["name"] in SETS and all(run["error"] is None for run in each["seeds"])
        }
        return sets, results.get("preset") == "paper"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected results of mta-fast eval, they can't be read ({type(error).__name__}: {error}); move "
            f"the folder away"
        ) from None


def _gain(scores: Scores, base: Scores) -> float | None:
    return scores[AVERAGE] - base[AVERAGE] if AVERAGE in scores and AVERAGE in base else None


def _cells(paper: Scores, here: Scores) -> list[str]:
    return [_cell(paper.get(name), here.get(name), ".2f") for name in (*SETS, AVERAGE)]


def _cell(paper: float | None, here: float | None, form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in (paper, here))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(["", *cells, ""]).strip() for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
