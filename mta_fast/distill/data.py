"""Instruction rows to prompts: templates, reading and checking rows, leaving out what is too long."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from mta_fast.choices import nearest
from mta_fast.errors import InputError
from mta_fast.files import user_source
from mta_fast.tokens import encode

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
TEMPLATES = ("paper", "plain", "chat")
PAIR = ("chosen", "rejected")  # the two responses of a row of ``mta-fast generate``
TOKENIZE_ROWS = 1000  # rows that one call of the tokenizer measures
PARSED_BEYOND = 500  # characters; on Dolly text 200 already leave every span as it is


class PromptRow(TypedDict):
    """A prompt and its response."""

    prompt: str
    output: str


class PairRow(TypedDict):
    """A prompt, the response to learn from, and one of the student's own."""

    prompt: str
    chosen: str
    rejected: str


Row = TypeVar("Row", bound=Mapping[str, Any])


class LeftOut(str):
    """Why a row is left out and counted, whether bad rows are refused or not."""


@dataclass
class LoadedRows(Generic[Row]):
    """Rows of a source, and what was left out.

    Attributes:
        rows: such as PromptRow, in the source's order.
        skipped: number of rows left out, by reason.
    """

    rows: list[Row]
    skipped: Counter[str] = field(default_factory=Counter)


# --- templates ---------------------------------------------------------------------------------------------------


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt template of the paper's experiments; it ends where the response begins."""
    template = _WITH_INPUT if context else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def fill_template(template: str, instruction: str, context: str = "", tokenizer: Any = None) -> str:
    """The prompt of an instruction.

    Args:
        template: "paper" (``format_prompt``), "plain" (instruction, blank line, input, blank line), "chat" (the
            tokenizer's own chat template), or a text with ``{instruction}`` and, if wanted, ``{input}``.
        context: the instruction's input; may be empty.
        tokenizer: needed for "chat".

    Raises:
        InputError: an unknown template, or a tokenizer without a chat template.
    """
    if template == "paper":
        return format_prompt(instruction, context)
    if template == "plain":
        return "\n\n".join(part for part in (instruction, context) if part) + "\n\n"
    if template == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("template 'chat': expected a tokenizer with a chat template, got one without")
        message = "\n\n".join(part for part in (instruction, context) if part)
        messages = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if "{instruction}" in template:
        values = {"{instruction}": instruction, "{input}": context}  # each once: the data may hold these names too
        return re.sub(r"\{instruction\}|\{input\}", lambda found: values[found[0]], template)
    raise InputError(
        f"template: expected {', '.join(TEMPLATES)} or a text with {{instruction}}, got {template!r}"
        f"{nearest(template, TEMPLATES)}"
    )


def data_places(sources: Iterable[str]) -> list[Path]:
    """The files and folders among the names of data sets, for ``files.check_target``."""
    return [Path(source) for source in map(user_source, sources) if Path(source).exists()]


# --- reading -----------------------------------------------------------------------------------------------------


def load_sample() -> list[PromptRow]:
    """The bundled sample: instruction and response rows written for this project, as prompts."""
    lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [PromptRow(prompt=format_prompt(row["instruction"], row["input"]), output=row["output"]) for row in rows]


def load_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    template: str = "paper",
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    responses: Sequence[str] = ("output",),
) -> LoadedRows[Any]:
    """Read rows and fill in the template.

    A row has "prompt" and its responses (the prompt is taken as it is), or "instruction", the responses and, if it has
    one, "input". A row that holds both forms is read as the first.

    Args:
        source: "sample" (the bundled rows), a .jsonl file, any other name that ``datasets.load_dataset`` or
            ``load_from_disk`` takes ("name", "name:configuration"), or an iterable of rows such as a ``Dataset``.
        split: the split of a data set; files have none.
        template: see ``fill_template``.
        columns: the source's names of the columns above where they differ, such as {"output": "response"}.
        skip_bad_rows: leave out rows that can't be read and count them, instead of raising at the first.
        limit: read at most so many rows.
        responses: the columns that hold a response; ("output",) gives PromptRows, PAIR gives PairRows, whose two may be
            the same: short answers of teacher and student often are.

    Returns:
        Rows with "prompt" and the responses.

    Raises:
        InputError: a bad row (a response that is missing, empty or no text), with file, line and reason; a source
            without a usable row; an unknown split.
    """

    def read(row: Mapping[str, Any]) -> dict[str, str] | str:
        fault = row_fault(row, responses)
        if fault is not None:
            return fault
        return {"prompt": prompt_of(row, template, tokenizer), **{name: row[name] for name in responses}}

    return read_rows(source, read, split=split, columns=columns, skip_bad_rows=skip_bad_rows, limit=limit)


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], Row | str],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
) -> LoadedRows[Row]:
    """Read rows of any kind; everything but ``read`` is as in ``load_rows``.

    Args:
        read: what is kept of a row, or the reason why it can't be used; a LeftOut where that is no mistake.
    """
    loaded: LoadedRows[Row] = LoadedRows([])
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    for place, row in _numbered(source, split):
        if limit is not None and len(loaded.rows) == limit:
            break
        if columns and isinstance(row, Mapping):
            row = {**row, **{name: row[own] for name, own in columns.items() if own in row}}
        made = row if isinstance(row, str) else read(row)
        if not isinstance(made, str):
            loaded.rows.append(made)
        elif skip_bad_rows or isinstance(made, LeftOut):
            loaded.skipped[made] += 1
        else:
            raise InputError(f"{place}: {made}; --skip-bad-rows leaves such rows out and counts them")
    if not loaded.rows:
        left_out = f", {sum(loaded.skipped.values())} bad ones ({_summary(loaded.skipped)})" if loaded.skipped else ""
        raise InputError(f"{name}: expected at least one usable row, got none{left_out}")
    return loaded


def drop_long_rows(
    loaded: LoadedRows[Row], tokenizer: Any, *, max_length: int, max_prompt_length: int | None = None
) -> LoadedRows[Row]:
    """Leave out rows whose prompt is too long, and count them; a long response is truncated later, not here.

    Args:
        loaded: from ``load_rows``.
        tokenizer: the student's.
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens of the prompt; None: ``max_length - 1``, so that one of the response is left.

    Raises:
        InputError: no row is left, or a limit that leaves no room.
    """
    room = max_length - 1 if max_prompt_length is None else max_prompt_length
    if not 0 <= room < max_length:
        raise InputError(
            f"max_prompt_length: expected less than max_length = {max_length}, got {max_prompt_length}; "
            f"a response needs at least one token"
        )
    lengths: list[int] = []
    for start in range(0, len(loaded.rows), TOKENIZE_ROWS):
        prompts = [row["prompt"] for row in loaded.rows[start : start + TOKENIZE_ROWS]]
        lengths += [len(row.ids) for row in encode(tokenizer, prompts)]
    kept = [row for row, length in zip(loaded.rows, lengths, strict=True) if length <= room]
    skipped = loaded.skipped + Counter({f"prompt longer than {room} tokens": len(loaded.rows) - len(kept)})
    if not kept:
        raise InputError(
            f"rows: expected prompts of at most {room} tokens, all {len(loaded.rows)} are longer (the shortest has "
            f"{min(lengths)}); raise max_length or max_prompt_length, or shorten the prompts"
        )
    return LoadedRows(kept, skipped)


def cut_texts(texts: Sequence[str], tokenizers: Sequence[Any], *, max_length: int) -> list[str]:
    """Texts without what lies more than PARSED_BEYOND characters behind the tokens that are kept of them.

    Spans behind those are dropped anyway, on both sides of two tokenizers if one cuts them off. A parse depends on what
    follows, so that spans next to the cut may differ from those of the whole text, those before the margin hardly ever.

    Args:
        tokenizers: fast ones. max_length: tokens that are kept.
    """
    cut = []
    for start in range(0, len(texts), TOKENIZE_ROWS):
        part = texts[start : start + TOKENIZE_ROWS]
        sides = [encode(tokenizer, part, max_length) for tokenizer in tokenizers]
        for text, *rows in zip(part, *sides, strict=True):
            full = [max(end for _, end in row.offsets) for row in rows if len(row.ids) >= max_length]
            cut.append(text[: min(full) + PARSED_BEYOND] if full else text)
    return cut


def _numbered(source: Any, split: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; a row that can't be read is the reason as a string."""
    if not isinstance(source, (str, Path)):
        yield from ((f"row {i}", row) for i, row in enumerate(source))
        return
    source = user_source(str(source))
    path = Path(source)
    if str(source) == "sample":
        yield from ((f"sample, row {i}", row) for i, row in enumerate(load_sample()))
    elif path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise InputError(f"{source}: expected a JSONL file, there is none")
        yield from _json_lines(path)
    else:
        yield from ((f"{source} ({split}), row {i}", row) for i, row in enumerate(_data_set(str(source), split)))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield f"{path}, line {number}", _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or why there is none."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "expected UTF-8, got other bytes"
    except json.JSONDecodeError as error:
        return f"expected one JSON object a line, got none ({error.msg})"
    return row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"


def _data_set(name: str, split: str) -> Any:
    import datasets

    try:
        if Path(name).is_dir() and (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        if Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        path, _, configuration = name.partition(":")
        return datasets.load_dataset(path, configuration or None, split=split)
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{name}: expected a JSONL file or a data set with the split {split!r}: {error}") from None


def row_fault(row: Mapping[str, Any], responses: Sequence[str] = ("output",)) -> str | None:
    """Why a row with a prompt or an instruction and these responses can't be used, or None."""
    columns = ("prompt" if "prompt" in row else "instruction", *responses)
    if any(name not in row for name in columns):
        forms = ", or ".join(" and ".join((first, *responses)) for first in ("prompt", "instruction"))
        return f"expected the columns {forms}, got {', '.join(row) or 'none'}"
    for name in (*columns, *(["input"] if row.get("input") is not None and "prompt" not in row else [])):
        value = row[name]
        if not isinstance(value, str):
            return f"{name}: expected a string, got {type(value).__name__}"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return f"{name}: expected Unicode text, got a lone surrogate"
    empty = [name for name in responses if not row[name].strip()]
    return f"{empty[0]}: expected a text, got an empty one" if empty else None


def prompt_of(row: Mapping[str, Any], template: str, tokenizer: Any = None) -> str:
    """The prompt of a row that ``row_fault`` accepts: its own, or the template with its instruction."""
    if "prompt" in row:
        return str(row["prompt"])
    return fill_template(template, row["instruction"], row.get("input") or "", tokenizer)


def _summary(skipped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in skipped.items() if count)


def describe_rows(loaded: LoadedRows) -> str:
    """One line: how many rows there are, and how many were left out for which reason."""
    total = sum(loaded.skipped.values())
    return f"{len(loaded.rows)} rows" + (f", {total} left out ({_summary(loaded.skipped)})" if total else "")


def texts_of(rows: Sequence[PromptRow]) -> list[str]:
    """Prompt + response of each row: what spans are extracted from."""
    return [row["prompt"] + row["output"] for row in rows]


def span_column(response: str, name: str) -> str:
    """The column for the spans of one of a row's responses: word_spans of "output", chosen_word_spans of "chosen"."""
    return name if response == "output" else f"{response}_{name}"
