"""Responses to prompts: of one batch, and of many, kept in a file from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.choices import check_choice
from mta_fast.errors import InputError
from mta_fast.files import write_whole
from mta_fast.inputs import check_left_padding, takes_positions
from mta_fast.layers import evaluating, unwrap
from mta_fast.tokens import encode

SETTINGS_FILE = "settings.json"
STOP_ROWS = ("each", "first")
DIGEST_BYTES = 7  # torch.manual_seed takes 8, and a sign
SUMMED_AT_ONCE = 2**24  # elements of a weight that are widened to int64 together
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Row = dict[str, Any]


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are generated; of the model's own generation settings only the end tokens count.

    Attributes:
        max_new_tokens: tokens of a response at most.
        do_sample: draw every token; False: take the likeliest, whatever the next three say.
        temperature: divides the logits.
        top_p: draw among the likeliest tokens that together have this probability; 1: among all.
        top_k: draw among so many likeliest tokens; 0: among all.
        stop: a response ends before this text; None: only where the model ends it.
        batch_size: prompts that ``generate_batches`` gives the model at a time.
        prompt_length: so many first tokens of a prompt are read; None: all of them.
        stop_rows: "each": a row ends before its own stop text; "first": all rows of a batch end once its first row has
            written the stop text, and no text is cut, so that what is written depends on the batch.
        strip: leave out white space around a response.

    Raises:
        InputError: a value out of its range, or ``stop_rows`` without a stop text.
    """

    max_new_tokens: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: str | None = "###"
    batch_size: int = 16
    prompt_length: int | None = None
    stop_rows: str = "each"
    strip: bool = False

    def __post_init__(self) -> None:
        whole = {"max_new_tokens": 1, "top_k": 0, "batch_size": 1}
        for name, least in (whole if self.prompt_length is None else whole | {"prompt_length": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: expected an integer >= {least}, got {value!r}")
        for name, most in (("temperature", math.inf), ("top_p", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                bound = "a number > 0" if most == math.inf else "a number > 0 and <= 1"
                raise InputError(f"{name}: expected {bound}, got {value!r}; do_sample=False takes the likeliest token")
        for name in ("do_sample", "strip"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.stop is not None and (not isinstance(self.stop, str) or not self.stop):
            raise InputError(f"stop: expected a text or None, got {self.stop!r}")
        check_choice("stop_rows", self.stop_rows, STOP_ROWS)
        if self.stop is None and self.stop_rows != "each":
            raise InputError(f"stop_rows: expected 'each' where there is no stop text, got {self.stop_rows!r}")


# --- one batch ---------------------------------------------------------------------------------------------------


def generate_texts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], settings: GenerationSettings, *, seed: int | None = None
) -> list[str]:
    """A response to every prompt, all of them in one batch.

    The model runs in eval mode with its cache and without gradients, and then has its former modes again. Padding is
    on the left, whatever side the tokenizer pads. prompt + response is the text that the model read and wrote, spaces
    included, up to its end token or ``settings.stop``, whichever comes first; a stop text in the prompt stops nothing.
    ``settings.prompt_length``, ``stop_rows`` and ``strip`` change that.

    Args:
        model: a causal language model of transformers, also one wrapped by PEFT or torch.compile.
        tokenizer: the model's; its end token pads where it has no pad token.
        prompts: texts, taken as they are.
        seed: of the random numbers, and torch's own stay as they were; None: those are used and move on.

    Returns:
        As many texts as prompts, in their order; a response may be empty.

    Raises:
        InputError: a prompt without a token or too long for the model (names the row), a tokenizer with neither a pad
            nor an end token, or prompts of different lengths for a model that reads padding as text (RWKV).
    """
    if not prompts:
        return []
    from transformers import GenerationConfig

    encoded = encode_prompts(model, tokenizer, prompts, settings)
    ends = _end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer)
    _check_padding(model, tokenizer, encoded)
    ids, mask = _pad_left(encoded, pad, next(model.parameters()).device)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
        **(sampling if settings.do_sample else {}),
    )
    criteria = [] if settings.stop is None else [_stop_in_response(tokenizer, settings, ids.shape[1])]
    with _generating(model, config), _random_numbers(seed, ids.device), torch.no_grad():
        generate: Any = model.generate
        made = generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
    responses = made[:, ids.shape[1] :].tolist()
    texts = (
        _response_text(tokenizer, prompt, _before_end(response, ends))
        for prompt, response in zip(encoded, responses, strict=True)
    )
    stop = settings.stop if settings.stop_rows == "each" else None
    whole = [text if stop is None else text.partition(stop)[0] for text in texts]
    return [text.strip() for text in whole] if settings.strip else whole


def encode_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], settings: GenerationSettings
) -> list[list[int]]:
    """The token ids of every prompt that are read, without an end token that the tokenizer may add.

    Raises:
        InputError: as ``encode_for`` does; prompts of different lengths, ``settings.batch_size`` at a time, for a model
            that reads padding as text.
    """
    config: Any = unwrap(model).config
    encoded = encode_for(config, tokenizer, prompts, settings)
    if settings.batch_size > 1:
        _check_padding(model, tokenizer, encoded)
    return encoded


def encode_for(config: Any, tokenizer: Any, prompts: Sequence[str], settings: GenerationSettings) -> list[list[int]]:
    """``encode_prompts`` for the model of a config, before it is loaded.

    Raises:
        InputError: a stop text that the tokenizer can't write; a prompt without a token, with a token that the model
            has no embedding of, or so long that the model has no room for ``settings.max_new_tokens`` (names the row);
            or no room for these alone.
    """
    if settings.stop is not None:
        _stop_criterion(tokenizer, settings.stop)
    size = getattr(config.get_text_config(), "vocab_size", math.inf)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    room = math.inf if positions is None else positions - settings.max_new_tokens
    if room < 1:
        raise InputError(
            f"max_new_tokens: expected less than the model's {positions} positions, got {settings.max_new_tokens}"
        )
    encoded = []
    for i, (ids, _, _) in enumerate(encode(tokenizer, prompts)):
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        ids = ids[: settings.prompt_length]
        if not ids:
            raise InputError(f"prompt of row {i}: expected at least one token, got none; leave the row out")
        if max(ids) >= size:
            raise InputError(
                f"prompt of row {i}: expected tokens below {size} (the model's vocabulary), got {max(ids)}; take the "
                f"model's own tokenizer"
            )
        if len(ids) > room:
            raise InputError(
                f"prompt of row {i}: expected at most {room} tokens (the model's {positions} positions less "
                f"max_new_tokens = {settings.max_new_tokens}), got {len(ids)}; shorten it, or lower max_new_tokens"
            )
        encoded.append(ids)
    return encoded


def _check_padding(model: nn.Module, tokenizer: Any, encoded: Sequence[Sequence[int]]) -> None:
    """Refuse prompts of different lengths for a model that would read their padding."""
    if len({len(ids) for ids in encoded}) > 1 and not takes_positions(model):
        check_left_padding(model, _pad_token(tokenizer), "model", "let it answer one prompt at a time: batch_size 1")


def _end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the model's own, of which chat models have several, and the tokenizer's."""
    inner: Any = unwrap(model)
    own = inner.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    return sorted(ends - {None})


def _pad_token(tokenizer: Any) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise InputError(f"tokenizer: expected a pad or an end token, {type(tokenizer).__name__} has neither")
    return int(pad)


def _pad_left(encoded: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and attention mask [B, S] int64."""
    size = max(len(ids) for ids in encoded)
    ids = torch.tensor([[pad] * (size - len(row)) + list(row) for row in encoded])
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in encoded])
    return ids.to(device), mask.to(device)


def _stop_in_response(tokenizer: Any, settings: GenerationSettings, prompt_size: int) -> Callable[..., Tensor]:
    """Per row: whether the last token completes the stop text, which a prompt that ends in "##" must not begin."""
    criterion = _stop_criterion(tokenizer, settings.stop)
    watched = 1 if settings.stop_rows == "first" else None

    def stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done: Tensor = criterion(input_ids[:watched, prompt_size:], scores)
        return done.expand(len(input_ids))

    return stopped


def _stop_criterion(tokenizer: Any, stop: str | None) -> Any:
    from transformers import StopStringCriteria

    try:
        return StopStringCriteria(tokenizer, stop)
    except (ValueError, IndexError, KeyError, RuntimeError, TypeError):  # of an empty table: no token ends in the text
        raise InputError(
            f"stop: expected a text that the tokenizer can write, got {stop!r}; give another, or none to go on to the "
            f"end token"
        ) from None


@contextmanager
def _generating(model: nn.Module, config: Any) -> Iterator[None]:
    """Eval mode, and ``config`` in the place of the model's own, from which transformers fills in what is not set."""
    inner: Any = unwrap(model)
    own = inner.generation_config
    inner.generation_config = config
    try:
        with evaluating(model):
            yield
    finally:
        inner.generation_config = own


@contextmanager
def _random_numbers(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


def _response_text(tokenizer: Any, prompt: list[int], response: list[int]) -> str:
    """What the response adds to the prompt: decoded by itself, SentencePiece's would lose its first space."""
    before, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, [*prompt, *response], response)
    )
    return whole[len(before) :] if whole.startswith(before) else alone


# --- many batches, in a file -------------------------------------------------------------------------------------


def generate_batches(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationSettings,
    finish: Callable[[int, str], Row],
    *,
    seed: int | str,
    path: Path | None = None,
    attempts: int = 1,
    description: str = "",
    progress: bool = True,
) -> list[Row]:
    """A row for every prompt, generated ``settings.batch_size`` at a time.

    The random numbers of a batch depend on ``seed`` and the number of the batch alone, so that a run that goes on
    from ``path`` makes the same responses as one that was never interrupted.

    Args:
        model, tokenizer, prompts: as in ``generate_texts``.
        finish: (number of the prompt, response) -> the row to keep, with its "prompt".
        seed: a number, or a text such as "42/teacher" where several sets of responses are made of one number.
        path: a JSONL file to which each batch is appended once it is made; what it holds already is read, not made.
            ``claim`` its folder first.
        attempts: how often an empty response is generated, each time with other random numbers.
        description: of the progress bar on stderr; progress: whether there is one.

    Returns:
        What ``finish`` gave, and "seconds": the row's share of its batch's time.

    Raises:
        InputError: as ``generate_texts`` does, or a file that is of other prompts or damaged.
        OSError: the file can't be read or written; what was appended stays.
    """
    from tqdm.auto import tqdm

    rows = [] if path is None else read_finished(path, prompts, settings.batch_size)
    with ExitStack() as stack:
        bar = tqdm(total=len(prompts), initial=len(rows), desc=description, unit=" rows", disable=not progress)
        stack.enter_context(bar)
        file = None if path is None else stack.enter_context(path.open("a", encoding="utf-8"))
        for start in range(len(rows), len(prompts), settings.batch_size):
            began = time.perf_counter()
            batch = prompts[start : start + settings.batch_size]
            name = f"{seed}/{start // settings.batch_size}"
            texts = _responses(model, tokenizer, batch, settings, name, attempts)
            made = [finish(start + i, text) for i, text in enumerate(texts)]
            seconds = (time.perf_counter() - began) / len(made)
            made = [row | {"seconds": round(seconds, 6)} for row in made]
            if file is not None:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
                file.flush()
                os.fsync(file.fileno())
            rows += made
            bar.update(len(made))
    return rows


def _responses(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], settings: GenerationSettings, name: str, attempts: int
) -> list[str]:
    """Responses to a batch; those that are empty are generated again."""
    texts = [""] * len(prompts)
    for attempt in range(attempts):
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if not empty:
            break
        seed = seed_of(f"{name}/{attempt}")
        again = generate_texts(model, tokenizer, [prompts[i] for i in empty], settings, seed=seed)
        for i, text in zip(empty, again, strict=True):
            texts[i] = text
    return texts


def seed_of(name: str) -> int:
    """A seed for torch from a name such as "10/3/0"; sums of small numbers would repeat."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES).digest(), "big")


def read_finished(path: Path, prompts: Sequence[str], batch_size: int) -> list[Row]:
    """The rows of the whole batches in a file; a batch that an interruption cut short is cut off.

    Raises:
        InputError: a line that is no such row, or of another prompt; OSError: the file can't be read.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) != len(prompts):
        lines = lines[: len(lines) // batch_size * batch_size]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            same = number <= len(prompts) and row["prompt"] == prompts[number - 1]
        except (ValueError, TypeError, KeyError):
            raise _foreign(path, number, "a line that is none") from None
        if not same:
            raise _foreign(path, number, "one to another prompt")
        rows.append(row)
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return rows


def _foreign(path: Path, number: int, got: str) -> InputError:
    return InputError(
        f"{path}, line {number}: expected a response to prompt {number}, got {got}; delete the file, its responses are "
        f"then generated again"
    )


def claim(folder: Path, made_with: Mapping[str, Any]) -> None:
    """Say in a folder what the responses in it are made with, or check that those in it were made with the same.

    Args:
        folder: of files that ``generate_batches`` appends to; made if it is missing.
        made_with: plain values, by name.

    Raises:
        InputError: responses that were made with something else; names the first difference. OSError: no place.

    An earlier version's responses have the defaults of the GenerationSettings that it did not know.
    """
    file, wanted = folder / SETTINGS_FILE, json.loads(json.dumps(made_with))
    mend = "give another folder, or delete this one to generate its responses again"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        if any(folder.glob("*.jsonl")):
            raise InputError(f"{folder}: expected {SETTINGS_FILE} beside the responses in it, there is none; {mend}")
        write_whole(file, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: expected JSON, got a text that is none ({error}); {mend}") from None
    found = asdict(GenerationSettings()) | found
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{folder}: expected responses made with {name} = {value!r}, it has some made with "
                f"{found.get(name)!r}; {mend}"
            )


def digest_of(values: Any) -> str:
    """A short digest of plain values, for ``claim``."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=DIGEST_BYTES).hexdigest()


# --- models ------------------------------------------------------------------------------------------------------


def weights_digest(model: nn.Module) -> str:
    """A digest of every weight's bits: another training leaves another one.

    Sums of integers, so that neither the number of threads nor the device changes it.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, weight in model.named_parameters():
        bits = weight.detach().flatten().view(_INTEGERS[weight.element_size()])
        total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(SUMMED_AT_ONCE))
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total}\n".encode())
    return digest.hexdigest()
