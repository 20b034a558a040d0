"""``mta-fast generate``: prompts with a chosen and a rejected response, as DistiLLM-2 trains on.

The teacher answers every prompt, then the student does, so that only one of them is in memory at a time.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mta_fast.distill.data import (
    PAIR,
    LoadedRows,
    PairRow,
    PromptRow,
    data_places,
    describe_rows,
    drop_long_rows,
    load_rows,
)
from mta_fast.distill.models import choose_device, load_config, load_model, load_tokenizer, model_places
from mta_fast.distill.responses.generation import (
    SETTINGS_FILE,
    GenerationSettings,
    claim,
    digest_of,
    encode_for,
    encode_prompts,
    generate_batches,
    weights_digest,
)
from mta_fast.errors import InputError
from mta_fast.files import Kind, check_target, user_path, write_whole
from mta_fast.locks import lock_folder

CHOSEN = ("teacher", "data")
ATTEMPTS = 4  # at a response that is not empty
SIDES = ("teacher", "student")
RESPONSES_FILE = "responses.jsonl"


def _own_files(folder: Path) -> list[Path]:
    """What an interrupted run leaves in the folder of the responses."""
    files = (folder / side / name for side in SIDES for name in (SETTINGS_FILE, RESPONSES_FILE))
    return [file for file in files if file.is_file()]


PAIRS = Kind("an empty file", lambda file: False)
RESPONSES_FOLDER = Kind("responses of an interrupted run", lambda folder: bool(_own_files(folder)), folder=True)


def load_pairs(source: Any, **options: Any) -> LoadedRows[PairRow]:
    """Read pairs; sources and options are those of ``data.load_rows``."""
    return load_rows(source, responses=PAIR, **options)


def generate_pairs(
    data: Sequence[str],
    target: Path,
    settings: GenerationSettings,
    *,
    student: str,
    teacher: str | None = None,
    chosen: str = "teacher",
    seed: int = 42,
    max_prompt_length: int = 128,
    dtype: str = "float32",
    device: str = "auto",
    progress: bool = True,
    **reading: Any,
) -> Counter[str]:
    """Write a JSONL file of pairs for the prompts of data sets: {"prompt", "chosen", "rejected"} a line.

    Responses are kept batch by batch in the folder TARGET.responses until the file is whole; a run that was
    interrupted goes on from there and makes the same file. An empty response is generated again, ``ATTEMPTS`` times
    in all; a prompt whose response stays empty is left out.

    Args:
        data: sources as ``data.load_rows`` takes them.
        target: the file; its folder is made.
        settings: how both models respond.
        student, teacher: as ``models.load_model`` takes them.
        chosen: "teacher": its response; "data": the data set's own, and no teacher is needed.
        seed: of all random numbers.
        max_prompt_length: tokens, of each model's own; rows with longer prompts are left out.
        dtype: of both models, as in ``load_model``; device: as in ``choose_device``.
        progress: show a bar on stderr.
        reading: options of ``load_rows``.

    Returns:
        "pairs" written, and how many rows were left out, by reason.

    Raises:
        InputError: a target that is there already, an unknown ``chosen``, no teacher; rows, models or responses from
            an earlier run that don't fit. OSError: no room to write.
    """
    if chosen not in CHOSEN:
        raise InputError(f"chosen: expected one of {', '.join(CHOSEN)}, got {chosen!r}")
    if (teacher is None) == (chosen == "teacher"):
        raise InputError(
            "teacher: expected a model for chosen = teacher, got none"
            if teacher is None
            else f"teacher: expected none, as chosen = data takes the data's own responses, got {teacher!r}"
        )
    place, target = choose_device(device), user_path(target)
    folder = target.with_name(target.name + ".responses")
    sides = {"teacher": teacher, "student": student} if teacher is not None else {"student": student}
    sources = [*data_places(data), *(each for name in sides.values() for each in model_places(name))]
    check_target(target, PAIRS, sources=sources)
    check_target(folder, RESPONSES_FOLDER, sources=sources)
    with lock_folder(folder):
        tokenizers = {side: load_tokenizer(name) for side, name in sides.items()}
        loaded = _rows(data, tokenizers, settings, max_prompt_length, reading)
        prompts = [row["prompt"] for row in loaded.rows]
        for side, name in sides.items():
            encode_for(load_config(name), tokenizers[side], prompts, settings)
        responses = {"data": [row["output"] for row in loaded.rows]}
        for side, name in sides.items():
            model: Any = load_model(name, dtype=dtype)
            model.to(place)
            responses[side] = _respond(
                side, model, tokenizers[side], prompts, settings, seed=seed, folder=folder, progress=progress
            )
            del model
            _release(place)
        columns = zip(prompts, responses[chosen], responses["student"], strict=True)
        return _write([PairRow(prompt=p, chosen=c, rejected=r) for p, c, r in columns], target, folder, loaded.skipped)


def _respond(
    side: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    seed: int,
    folder: Path,
    progress: bool,
) -> list[str]:
    """One model's responses, kept in its part of the folder."""
    encoded = encode_prompts(model, tokenizer, prompts, settings)
    weight = next(model.parameters())
    made_with = {
        "prompts": len(prompts),
        "digest of the prompts and their tokens": digest_of([prompts, encoded]),
        "seed": seed,
        **asdict(settings),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "digest of the weights": weights_digest(model),
    }
    claim(folder / side, made_with)
    made = generate_batches(
        model,
        tokenizer,
        prompts,
        settings,
        lambda i, response: {"prompt": prompts[i], "response": response},
        seed=f"{seed}/{side}",
        path=folder / side / RESPONSES_FILE,
        attempts=ATTEMPTS if settings.do_sample else 1,
        description=f"{side}'s responses",
        progress=progress,
    )
    return [row["response"] for row in made]


def _rows(
    data: Sequence[str], tokenizers: Mapping[str, Any], settings: GenerationSettings, longest: int, reading: Any
) -> LoadedRows[PromptRow]:
    """The rows of all sources whose prompts are short enough for every tokenizer."""
    rows: list[PromptRow] = []
    skipped: Counter[str] = Counter()
    for source in data:
        loaded = load_rows(source, tokenizer=tokenizers["student"], **reading)
        for tokenizer in tokenizers.values():
            limit = longest + settings.max_new_tokens
            loaded = drop_long_rows(loaded, tokenizer, max_length=limit, max_prompt_length=longest)
        print(f"{source}: {describe_rows(loaded)}")
        rows += loaded.rows
        skipped += loaded.skipped
    return LoadedRows(rows, skipped)


def _release(device: torch.device) -> None:
    """Give the memory of a model back that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _write(pairs: Sequence[PairRow], target: Path, folder: Path, skipped: Counter[str]) -> Counter[str]:
    whole = [pair for pair in pairs if pair["chosen"].strip() and pair["rejected"].strip()]
    if not whole:
        raise InputError(
            f"{target}: expected at least one pair, every prompt of {len(pairs)} has an empty response, kept in "
            f"{folder}; look at the models, and delete that folder"
        )
    write_whole(target, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in whole))
    for file in _own_files(folder):
        file.unlink()
    for part in (*folder.iterdir(), folder):  # what others put there stays
        with suppress(OSError):
            part.rmdir()
    return Counter({"pairs": len(whole), "empty response": len(pairs) - len(whole)}) + skipped
