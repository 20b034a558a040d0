"""One model's view of the text: its tokens and its hidden states, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.errors import InputError
from mta_fast.layers import capture_layers, evaluating
from mta_fast.tokens import encode


@dataclass(frozen=True)
class Token:
    """One token as a piece of the text.

    Attributes:
        text: its characters, or the name of a special token.
        start, end: its character range.
        gap: characters before it that belong to no token (tokenizers that drop white space).
        special: a special token, or one without characters; no span holds these.
        continues: further bytes of the character that the token before it has begun.
    """

    text: str
    start: int
    end: int
    gap: str = ""
    special: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Side:
    """One model's tokens and hidden states, on the CPU.

    Attributes:
        tokens: S pieces of the text; offsets: [1, S, 2] their characters; special: [1, S] the special ones.
        truncated: whether text is left that is not white space.
        hidden: {layer: [1, S, d]} of the configured layers; logits: [1, S, V].
    """

    tokens: tuple[Token, ...]
    offsets: Tensor
    special: Tensor
    truncated: bool
    hidden: dict[int, Tensor]
    logits: Tensor

    @classmethod
    def make(
        cls,
        side: str,
        text: str,
        model: nn.Module,
        tokenizer: Any,
        layers: Sequence[int],
        max_length: int,
        numbers: Tensor | None = None,
    ) -> Side:
        """Tokenise the text and run the model on it.

        Args:
            side: its name in errors. numbers: [V] the model's id of each of the tokenizer's; None: the same.
        """
        ids, offsets, special = encode(tokenizer, [text], max_length)[0]
        if not ids:
            raise InputError(f"text: expected at least one token of the {side}'s tokenizer, got none from {text!r:.40}")
        last = max((end for _, end in offsets), default=0)
        hidden, logits = _run(side, model, ids if numbers is None else numbers[ids].tolist(), layers)
        tokens = tuple(_tokens(text, ids, offsets, special, tokenizer))
        return cls(tokens, torch.tensor([offsets]), torch.tensor([special]), bool(text[last:].strip()), hidden, logits)


def _run(side: str, model: nn.Module, ids: list[int], layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states of ``layers`` and the logits of one row, on the CPU."""
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # a transformers model
    if max(ids) >= known:
        raise InputError(
            f"tokenizer: expected ids below {known} (the {side}'s embeddings), got {max(ids)}; give each model the "
            f"tokenizer it was trained with (teacher_tokenizer=)"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and len(ids) > longest:
        raise InputError(f"text: expected at most {longest} tokens ({side}), got {len(ids)}; lower max_length")
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), capture_layers(model, layers) as captured:
        row = torch.tensor([ids], device=device)
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
    hidden = {layer: captured[layer].detach().cpu() for layer in layers}
    for layer, states in hidden.items():
        if not bool(states.isfinite().all()):
            raise InputError(
                f"{side}, layer {layer}: expected finite hidden states, got NaN or infinite ones; load the model in "
                f"float32 or bfloat16"
            )
    return hidden, logits.detach().cpu()


def _tokens(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[bool], tokenizer: Any
) -> list[Token]:
    tokens, reached = [], 0
    names = tokenizer.convert_ids_to_tokens(ids)
    for is_special, name, (start, end) in zip(special, names, offsets, strict=True):
        if is_special or end <= start:
            tokens.append(Token(str(name), start, end, special=True))
        else:
            begin = max(start, reached)
            gap = text[reached:start] if tokens else text[:start]
            continues = begin >= end
            tokens.append(Token(text[start:end] if continues else text[begin:end], start, end, gap, False, continues))
        reached = max(reached, end)
    return tokens
