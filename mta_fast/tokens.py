"""Texts to tokens: the one place that decides which special tokens are added, and says which tokens are special."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Encoded(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: token ids.
        offsets: the characters [start, end) of each.
        special: whether each is a special token, added or written in the text; no span holds those.

    Both are empty where the tokenizer is not fast.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]


def encode(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> list[Encoded]:
    """Tokenise texts as the tokenizer does by itself, but for special tokens that a text holds already.

    What the tokenizer would put before (a BOS) or behind (an EOS) a text is left out where the text's own tokens
    begin or end with it, as those of a chat template do: it is never there twice.

    Args:
        tokenizer: of transformers; a fast one also gives offsets, of others only ids are known.
        max_length: tokens a text is truncated to by a fast tokenizer, added ones included; None: not truncated.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [Encoded(_single(tokenizer, list(ids)), [], []) for ids in tokenizer(list(texts))["input_ids"]]
    options: dict[str, Any] = {"return_special_tokens_mask": True, "return_offsets_mapping": True, "verbose": False}
    if max_length is not None:  # room for what may be left out
        options |= {"truncation": True, "max_length": max_length + tokenizer.num_special_tokens_to_add()}
    found = tokenizer(list(texts), **options)
    specials = special_ids(tokenizer)
    encoded = []
    for i, text in enumerate(texts):
        kept = _kept(found["input_ids"][i], found["special_tokens_mask"][i], max_length)
        ids = [found["input_ids"][i][j] for j in kept]
        offsets = [tuple(found["offset_mapping"][i][j]) for j in kept]
        encoded.append(Encoded(ids, offsets, _special(tokenizer, specials, text, ids, offsets)))
    return encoded


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, added ones that are marked as special included."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def _single(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids of a tokenizer that does not say what it added, with one BOS before and one EOS behind them."""
    begin, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    ids = ids[1:] if ids[:2] == [begin, begin] else ids
    return ids[:-1] if ids[-2:] == [end, end] else ids


def _kept(ids: Sequence[int], added: Sequence[int], max_length: int | None) -> list[int]:
    """The positions that stay: without what is there twice, and no more than max_length."""
    size = len(ids)
    before = next((j for j in range(size) if not added[j]), size)
    behind = next((j for j in range(size, before, -1) if not added[j - 1]), before)
    front, own, back = ids[:before], ids[before:behind], ids[behind:]
    front_kept = 0 if front and own[: len(front)] == front else before
    back_kept = 0 if back and own[-len(back) :] == back else len(back)
    positions = [*range(front_kept), *range(before, behind)]
    if max_length is not None:
        positions = positions[: max(front_kept, max_length - back_kept)]
    return [*positions, *range(behind, behind + back_kept)][:max_length]


def _special(
    tokenizer: Any, specials: set[int], text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[bool]:
    """Whether each token is special; an unknown token stands for text, unless its name is what the text says."""
    unknown = tokenizer.unk_token_id
    made = [token in specials for token in ids]
    for j, (start, end) in enumerate(offsets):
        if made[j] and ids[j] == unknown and end > start:
            made[j] = text[start:end].strip() == tokenizer.unk_token
    return made
