"""``mta-fast eval``: responses to the prompts of data sets, several seeds, and their ROUGE-L F1."""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from mta_fast._version import __version__
from mta_fast.choices import check_choice
from mta_fast.distill.data import (
    LeftOut,
    LoadedRows,
    data_places,
    describe_rows,
    drop_long_rows,
    prompt_of,
    read_rows,
    row_fault,
)
from mta_fast.distill.models import choose_device, load_config, load_model, load_tokenizer, model_places
from mta_fast.distill.responses.generation import (
    SETTINGS_FILE,
    GenerationSettings,
    Row,
    claim,
    digest_of,
    encode_for,
    encode_prompts,
    generate_batches,
    weights_digest,
)
from mta_fast.errors import InputError
from mta_fast.files import RESULTS_FILE, Kind, check_target, marked, user_path, write_whole
from mta_fast.locks import lock_folder
from mta_fast.packages import require

SEEDS = (10, 20, 30, 40, 50)
REFERENCES = ("best", "first")
METRIC = "100 x ROUGE-L F1, stemmed (rouge-score)"


class EvaluationRow(TypedDict):
    """A prompt and the responses that are right."""

    prompt: str
    references: list[str]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        generation: how responses are generated.
        seeds: one run over the rows for each.
        references: "best": a response has its highest score over the row's references; "first": the first one counts.
        skip_empty_references: leave out and count rows whose first reference has no text, and take no notice of
            further ones without; else such a row is a bad one.

    Raises:
        InputError: no seed, one twice, a negative one; or an unknown way with references.
    """

    generation: GenerationSettings = field(default_factory=GenerationSettings)
    seeds: Sequence[int] = SEEDS
    references: str = "best"
    skip_empty_references: bool = False

    def __post_init__(self) -> None:
        plain = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in self.seeds)
        if not self.seeds or not plain or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: expected different integers >= 0, got {list(self.seeds)}")
        check_choice("references", self.references, REFERENCES)


# "paper": what the script does that the authors' evaluation commands call (docs/reproduction.md)
PRESETS: dict[str, EvaluationSettings] = {
    "paper": EvaluationSettings(
        GenerationSettings(max_new_tokens=512, temperature=0.7, prompt_length=256, stop_rows="first", strip=True),
        seeds=(30, 40, 50),
        references="first",
        skip_empty_references=True,
    )
}


def preset_of(settings: EvaluationSettings) -> str | None:
    """The preset that settings are, but for the batch size, which none names; None where they differ from all."""
    for name, preset in PRESETS.items():
        generation = replace(preset.generation, batch_size=settings.generation.batch_size)
        if replace(settings, seeds=tuple(settings.seeds)) == replace(preset, generation=generation):
            return name
    return None


@dataclass(frozen=True)
class SeedScore:
    """One run over the rows.

    Attributes:
        rouge_l: 100 times the mean F1; None where the run failed.
        empty: responses without text; they count as 0.
        seconds: of generation and scoring.
        error: why the run failed, in a line; traceback: where.
    """

    seed: int
    rouge_l: float | None
    empty: int = 0
    seconds: float = 0.0
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on a data set."""

    name: str
    rows: int
    seeds: tuple[SeedScore, ...]

    @property
    def scores(self) -> list[float]:
        """Those of the seeds that did not fail."""
        return [run.rouge_l for run in self.seeds if run.rouge_l is not None]

    @property
    def mean(self) -> float | None:
        """None where every seed failed."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """With n - 1; None where fewer than two seeds did not fail."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def failed(self) -> list[SeedScore]:
        """The runs that failed."""
        return [run for run in self.seeds if run.error is not None]


# --- one model, one data set -------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[EvaluationRow],
    settings: EvaluationSettings,
    *,
    folder: Path | None = None,
    name: str = "rows",
    progress: bool = True,
) -> Evaluation:
    """Generate responses to the rows with every seed and score them. A seed that fails does not stop the others.

    Args:
        model, tokenizer: as ``generation.generate_texts`` takes them.
        rows: of ``load_references``.
        folder: responses are appended to its files seed-N.jsonl (prompt, references, response, score, seconds) batch
            by batch, and those that are there already are taken over; None: they are not kept.
        name: of the data set, for the table and the bar; progress: whether there is a bar on stderr.

    Raises:
        InputError: no rows, a prompt too long for the model, or a folder with responses of another model, other rows
            or other settings. MissingPackageError: rouge-score is not installed.
    """
    if not rows:
        raise InputError(f"{name}: expected at least one row, got none")
    _scorer()
    generation = settings.generation
    prompts = [row["prompt"] for row in rows]
    encoded = encode_prompts(model, tokenizer, prompts, generation)
    if folder is not None:
        claim(folder, _made_with(model, rows, encoded, settings))

    def finish(i: int, response: str) -> Row:
        score = rouge_l(rows[i]["references"], response, settings.references)
        return {**rows[i], "response": response, "score": score}

    def run(seed: int) -> SeedScore:
        path = None if folder is None else folder / f"seed-{seed}.jsonl"
        options: dict[str, Any] = {"path": path, "description": f"{name}, seed {seed}", "progress": progress}
        try:
            made = generate_batches(model, tokenizer, prompts, generation, finish, seed=seed, **options)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return SeedScore(seed, None, error=reason, traceback=traceback.format_exc())
        empty = sum(not row["response"].strip() for row in made)
        score = 100 * statistics.fmean(row["score"] for row in made)
        return SeedScore(seed, score, empty, sum(row["seconds"] for row in made))

    return Evaluation(name, len(rows), tuple(run(seed) for seed in settings.seeds))


def rouge_l(references: Sequence[str], response: str, which: str = "best") -> float:
    """ROUGE-L F1 (0 to 1) of a response, words stemmed; 0 for an empty one.

    Args:
        references: at least one text; which: "best": the highest score over them; "first": that of the first.
    """
    if not response.strip():
        return 0.0
    counted = references if which == "best" else references[:1]
    return max(float(_scorer().score(reference, response)["rougeL"].fmeasure) for reference in counted)


@cache
def _scorer() -> Any:
    require("rouge-score", "train", "evaluation", module="rouge_score.rouge_scorer")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _made_with(
    model: nn.Module, rows: Sequence[EvaluationRow], encoded: Sequence[Sequence[int]], settings: EvaluationSettings
) -> dict[str, Any]:
    """What a response and its score depend on; the tokens stand for the tokenizer."""
    weight = next(model.parameters())
    return {
        "rows": len(rows),
        "digest of the rows and their tokens": digest_of([rows, encoded]),
        **asdict(settings.generation),
        "references": settings.references,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "digest of the weights": weights_digest(model),
    }


# --- rows --------------------------------------------------------------------------------------------------------


def load_references(
    source: Any,
    *,
    split: str = "test",
    template: str = "paper",
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    skip_empty_references: bool = False,
) -> LoadedRows[EvaluationRow]:
    """Rows as ``data.load_rows`` reads them, whose "output" may also be a list of right responses.

    Args:
        skip_empty_references: as in EvaluationSettings; the others as in ``load_rows``.

    Raises:
        InputError: as ``load_rows`` does, an empty list, or an empty prompt.
    """

    def read(row: Mapping[str, Any]) -> EvaluationRow | str:
        output = row.get("output")
        outputs = output if isinstance(output, list) else [output]
        if skip_empty_references and "output" in row:
            if not outputs or _is_empty(outputs[0]):
                return LeftOut("first reference empty")
            outputs = [each for each in outputs if not _is_empty(each)]
        elif output == []:
            return "output: expected at least one reference, got an empty list"
        forms = [{**row, "output": one} for one in outputs] if "output" in row else [row]
        reason = next(filter(None, map(row_fault, forms)), None)
        if reason is not None:
            return reason
        prompt = prompt_of(row, template, tokenizer)
        if not prompt:
            return "prompt: expected a text, got an empty one"
        return EvaluationRow(prompt=prompt, references=[form["output"] for form in forms])

    return read_rows(source, read, split=split, columns=columns, skip_bad_rows=skip_bad_rows, limit=limit)


def _is_empty(reference: Any) -> bool:
    return isinstance(reference, str) and not reference.strip()


def distinct_names(sources: Sequence[str]) -> list[str]:
    """A short name for each data set, fit for a folder: dev for dolly/dev.jsonl, dolly-dev beside sni/dev.jsonl.

    Raises:
        InputError: a source that is given twice.
    """
    parts = [re.sub(r"\.jsonl?$", "", source).split("/") for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]+", "-", "-".join(part[-depth:])).strip("-.") or "data" for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"data: expected different data sets, got {', '.join(sources)}")


def _is_evaluation(folder: Path) -> bool:
    """Whether a folder holds results of ``run_evaluation``, or the responses of one that was interrupted."""
    results = folder / RESULTS_FILE
    if results.is_file():
        return marked(METRIC.encode())(results)
    return any(marked(b'"digest of the weights"')(file) for file in folder.glob(f"*/{SETTINGS_FILE}"))


EVALUATION = Kind("an earlier evaluation", _is_evaluation, folder=True)


# --- the command -------------------------------------------------------------------------------------------------


def run_evaluation(
    model: str,
    data: Sequence[str],
    settings: EvaluationSettings,
    *,
    out: Path | None = None,
    max_prompt_length: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    **reading: Any,
) -> int:
    """Evaluate a model on data sets, print a table, and write ``results.json`` and the responses into a folder.

    Args:
        model: as ``models.load_model`` takes it.
        data: sources as ``load_references`` takes them.
        out: the folder; None: eval/MODEL in the current one, with the path's separators as hyphens. Responses that it
            holds already are taken over.
        max_prompt_length: tokens; rows with longer prompts are left out and counted. None: as many as the model has
            room for.
        dtype: as in ``load_model``; device: as in ``choose_device``.
        reading: options of ``load_references``.

    Returns:
        The exit code: 0, or 1 where a seed failed; the reasons are printed.

    Raises:
        InputError: as ``load_references``, ``load_model`` and ``evaluate`` do; a folder that holds anything but an
            earlier evaluation, is part of the model or the data, or in which another process is at work.
        MissingPackageError: a package is missing. OSError: no room for the results.
    """
    _scorer()
    place = choose_device(device)
    names = distinct_names(data)
    if out is None:
        out = Path("eval") / (re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model")
    sources = [*model_places(model), *data_places(data)]
    out = user_path(out)
    check_target(out, EVALUATION, sources=sources)
    with lock_folder(out):
        named = dict(zip(names, data, strict=True))
        return _evaluate_all(model, named, settings, out, max_prompt_length, dtype, place, reading)


def _evaluate_all(
    model: str,
    data: Mapping[str, str],
    settings: EvaluationSettings,
    out: Path,
    max_prompt_length: int | None,
    dtype: str,
    place: torch.device,
    reading: Mapping[str, Any],
) -> int:
    """What ``run_evaluation`` does, ``data`` by name, once ``out`` is its own."""
    tokenizer = load_tokenizer(model)
    reading = {**reading, "skip_empty_references": settings.skip_empty_references}
    loaded = [load_references(source, tokenizer=tokenizer, **reading) for source in data.values()]
    if max_prompt_length is not None:
        length = max_prompt_length + settings.generation.max_new_tokens
        limits = {"max_length": length, "max_prompt_length": max_prompt_length}
        loaded = [drop_long_rows(rows, tokenizer, **limits) for rows in loaded]
    for source, rows in zip(data.values(), loaded, strict=True):
        print(f"{source}: {describe_rows(rows)}")
    config = load_config(model)
    for rows in loaded:
        encode_for(config, tokenizer, [row["prompt"] for row in rows.rows], settings.generation)
    network: Any = load_model(model, dtype=dtype)
    network.to(place)
    whole = max_prompt_length is None and reading.get("template", "paper") == "paper"  # all rows, the presets' prompt
    done: list[Evaluation] = []
    sets: list[dict[str, Any]] = []
    for (name, source), rows in zip(data.items(), loaded, strict=True):
        found = evaluate(network, tokenizer, rows.rows, settings, folder=out / name, name=name)
        done.append(found)
        means = {"mean": found.mean, "std": found.std}
        sets.append({"source": source, "left_out": dict(rows.skipped), **means, **asdict(found)})
        results = {
            "model": model,
            "metric": METRIC,
            "preset": preset_of(settings) if whole else None,
            "settings": asdict(settings) | {"max_prompt_length": max_prompt_length, "dtype": dtype, **reading},
            "device": str(place),
            "versions": _versions(),
            "data": sets,
        }
        write_whole(out / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _print_table(model, done)
    print(f"responses and {RESULTS_FILE} in {out}")
    for evaluation in done:
        for run in evaluation.failed:
            print(f"{evaluation.name}, seed {run.seed} failed: {run.error}", file=sys.stderr)
    return 1 if any(evaluation.failed for evaluation in done) else 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("transformers", "tokenizers", "rouge-score", "nltk")}
    return {"mta_fast": __version__, "python": platform.python_version(), "torch": torch.__version__, **packages}


def _print_table(model: str, done: Sequence[Evaluation]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"ROUGE-L F1 x 100 of {model}")
    for column in ("data", "rows", "mean", "std", "seeds", "empty", "time"):
        table.add_column(column, justify="left" if column in ("data", "seeds") else "right")
    for evaluation in done:
        seeds = ", ".join(f"{_number(run.rouge_l)} ({run.seed})" for run in evaluation.seeds)
        empty = sum(run.empty for run in evaluation.seeds)
        seconds = sum(run.seconds for run in evaluation.seeds)
        numbers = _number(evaluation.mean), _number(evaluation.std), seeds, str(empty), f"{seconds:.0f} s"
        table.add_row(evaluation.name, str(evaluation.rows), *numbers)
    Console(markup=False).print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
