"""A teacher's tokenizer with only the tokens that a data set uses, and the teacher's ids of what is left.

Tokenizers are read and made as the JSON of their backend. Ids keep their order, and everything beside the vocabulary
(normalizer, pre-tokenizer, post-processor, decoder, added tokens, chat template) stays as it is.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast.errors import InputError

TEXTS_AT_A_TIME = 1000
Backend = dict[str, Any]  # a tokenizer's backend as JSON has it
_WITHOUT_IDS = ("ByteLevel",)  # post-processors


def trim_tokenizer(tokenizer: Any, texts: Iterable[str], size: int | None = None) -> Any:
    """The tokenizer with only the tokens that some texts use, and those that any other text can be made of.

    Kept are all special and added tokens, the bytes or single characters, the tokens that the texts use, and in BPE
    those through which they are merged. These texts give the same tokens as before; any other text is cut into smaller
    pieces, which decode to what it decoded to before.

    Args:
        tokenizer: a fast tokenizer of transformers, BPE or Unigram; it stays as it is.
        texts: what the vocabulary is for, as the models are given it: with the template's own text.
        size: at most so many tokens: the rarest that the texts use are dropped. None: all that they use.

    Raises:
        InputError: a tokenizer that is not fast or of another kind, or fewer tokens than are always kept.
    """
    spec = _spec(tokenizer)
    model = spec["model"]
    vocabulary = _pieces(model)
    parts = _parts(model, vocabulary)
    names = {number: piece for piece, number in vocabulary.items()}
    ids = _special_ids(tokenizer, spec)
    kept = {piece for piece in map(names.get, ids) if piece is not None} | _alphabet(model, vocabulary)
    beside = len(ids - names.keys())  # added tokens that are no pieces of the model
    if size is not None and len(kept) + beside > size:
        raise InputError(
            f"vocabulary size: expected at least {len(kept) + beside} tokens (special ones, bytes or characters), got "
            f"{size}"
        )
    counts = _counts(tokenizer, texts)
    for number in sorted(counts, key=lambda number: (-counts[number], number)):
        piece = names.get(number)
        more = set() if piece is None or piece in kept else parts(piece) - kept
        if size is not None and len(kept) + len(more) + beside > size:
            break
        kept |= more
    ids |= {vocabulary[piece] for piece in kept}
    return _with_backend(tokenizer, _restricted(spec, {old: new for new, old in enumerate(sorted(ids))}))


def teacher_ids(student_tokenizer: Any, teacher_tokenizer: Any) -> Tensor | None:
    """[V] int64, the teacher's id of each of the student's, for a tokenizer that ``trim_tokenizer`` makes.

    It is known by what it holds: the teacher's pieces and merges among a part of its tokens, everything else alike.
    None for any other two tokenizers.
    """
    if not all(getattr(each, "is_fast", False) for each in (student_tokenizer, teacher_tokenizer)):
        return None
    own, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if sorted(own.values()) != list(range(len(own))) or not own.keys() <= theirs.keys():
        return None
    numbers = {number: theirs[piece] for piece, number in own.items()}
    if any(theirs[piece] <= theirs[before] for before, piece in pairwise(sorted(own, key=own.__getitem__))):
        return None
    try:
        found = _spec(student_tokenizer)
        expected = _restricted(_spec(teacher_tokenizer), {old: new for new, old in numbers.items()})
    except (InputError, KeyError):  # a kind that is not trimmed; special tokens that are not there
        return None
    if found != expected:
        return None
    return torch.tensor([numbers[number] for number in range(len(numbers))])


def numbers_of(student_tokenizer: Any, teacher_tokenizer: Any) -> dict[int, int] | None:
    """{the teacher's id: the student's} of a tokenizer that ``trim_tokenizer`` made; None of the teacher's own."""
    if student_tokenizer is teacher_tokenizer:
        return None
    theirs = teacher_tokenizer.get_vocab()
    return {theirs[piece]: number for piece, number in student_tokenizer.get_vocab().items()}


class Coverage(NamedTuple):
    """What a trimmed tokenizer keeps of some texts.

    Attributes:
        share: of the whole tokenizer's tokens of the texts, those that were kept.
        before, after: mean tokens of a text, of the whole tokenizer and of the trimmed one.
    """

    share: float
    before: float
    after: float


def coverage(tokenizer: Any, trimmed: Any, texts: Sequence[str]) -> Coverage:
    """What ``trimmed``, made of ``tokenizer``, keeps of some texts."""
    whole, own = _counts(tokenizer, texts), _counts(trimmed, texts)
    kept = tokenizer.convert_tokens_to_ids(list(trimmed.get_vocab()))
    total = whole.total()
    return Coverage(sum(whole[number] for number in kept) / max(1, total), total / len(texts), own.total() / len(texts))


# --- the backend -------------------------------------------------------------------------------------------------


def _spec(tokenizer: Any) -> Backend:
    """A tokenizer's backend; without truncation and padding, which each call sets."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: expected a fast one, whose vocabulary can be trimmed, got {type(tokenizer).__name__}"
        )
    spec: Backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    model = spec["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise InputError(f"tokenizer: expected BPE or Unigram, whose vocabulary can be trimmed, got {model['type']}")
    if model["type"] == "BPE" and (model["continuing_subword_prefix"] or model["end_of_word_suffix"]):
        raise InputError(
            "tokenizer: expected a BPE without marks inside or at the end of words (continuing_subword_prefix, "
            "end_of_word_suffix), whose vocabulary can be trimmed, got one with them"
        )
    return spec


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    """{piece: id} of a model."""
    if model["type"] == "BPE":
        return dict(model["vocab"])
    return {piece: number for number, (piece, _) in enumerate(model["vocab"])}


def _restricted(spec: Backend, numbers: Mapping[int, int]) -> Backend:
    """The backend with some of its tokens.

    Args:
        numbers: {old id: new id} in the order of both; those of all special and added tokens are there.
    """
    model = dict(spec["model"])
    if model["type"] == "BPE":
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
        kept = model["vocab"]
        model["merges"] = [pair for pair in model["merges"] if all(each in kept for each in (*pair, "".join(pair)))]
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in numbers]
        model["unk_id"] = None if model["unk_id"] is None else numbers[model["unk_id"]]
    return spec | {
        "model": model,
        "added_tokens": [token | {"id": numbers[token["id"]]} for token in spec["added_tokens"]],
        "post_processor": _renumbered(spec["post_processor"], numbers.__getitem__),
    }


def _renumbered(processor: Any, number: Callable[[int], int]) -> Any:
    """A post-processor with other ids for its special tokens.

    Raises:
        InputError: one of a kind whose ids aren't known.
    """
    if processor is None or processor["type"] in _WITHOUT_IDS:
        return processor
    if processor["type"] == "Sequence":
        return processor | {"processors": [_renumbered(each, number) for each in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"].items()
        return processor | {
            "special_tokens": {name: token | {"ids": [*map(number, token["ids"])]} for name, token in tokens}
        }
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        ends = {name: [processor[name][0], number(processor[name][1])] for name in ("sep", "cls")}
        return processor | ends
    raise InputError(
        f"tokenizer: expected a post-processor whose special tokens are known, to trim its vocabulary, got "
        f"{processor['type']}"
    )


def _with_backend(tokenizer: Any, spec: Backend) -> Any:
    """A copy of a tokenizer of transformers with another backend."""
    from tokenizers import Tokenizer

    made = copy.deepcopy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(spec))
    made.init_kwargs = {
        key: value
        for key, value in made.init_kwargs.items()
        if key not in ("vocab", "merges", "added_tokens_decoder", "vocab_file", "merges_file")
    }
    return made


# --- what is kept ------------------------------------------------------------------------------------------------


def _special_ids(tokenizer: Any, spec: Backend) -> set[int]:
    """Ids of added and special tokens, those that a post-processor adds, and that of what is unknown."""
    ids = {token["id"] for token in spec["added_tokens"]} | {*tokenizer.all_special_ids} - {None}

    def keep(number: int) -> int:
        ids.add(number)
        return number

    _renumbered(spec["post_processor"], keep)
    model = spec["model"]
    unknown = model["vocab"].get(model["unk_token"]) if model["type"] == "BPE" else model["unk_id"]
    return ids if unknown is None else ids | {unknown}


def _alphabet(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[str]:
    """The pieces that any text can be made of, and the one that says how bad an unknown one is."""
    own = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()
    own = own & vocabulary.keys() or {piece for piece in vocabulary if len(piece) == 1}
    if model["type"] == "Unigram":
        own.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return own


def _parts(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Callable[[str], set[str]]:
    """What gives the pieces through which a piece is merged, and itself."""
    if model["type"] != "BPE":
        return lambda piece: {piece}
    ranks = {(first, second): rank for rank, (first, second) in enumerate(model["merges"])}
    alone = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()

    def parts(piece: str) -> set[str]:
        made = {piece}
        now = [] if piece in alone else list(piece)
        made |= set(now)
        while len(now) > 1:
            rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(now)))
            if rank == math.inf:
                break
            now[i : i + 2] = [now[i] + now[i + 1]]
            made.add(now[i])
        return made & vocabulary.keys()

    return parts


def _counts(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """How often each id is in the texts."""
    counts: Counter[int] = Counter()
    rest = iter(texts)
    while some := list(islice(rest, TEXTS_AT_A_TIME)):
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            counts.update(ids)
    return counts
