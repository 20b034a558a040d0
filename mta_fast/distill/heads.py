"""LM heads taken apart: the states that a head reads, instead of the logits that it makes of every position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.layers import evaluating, unwrap

PROBE_TOKENS = 4  # of the pass that compares a head that was taken apart with the model's logits
TOLERANCE = 1e-4  # of their difference, relative to the largest logit: half-precision logits are rounded


@dataclass(frozen=True, eq=False)
class LMHead:
    """A model's head: logits = softcap(scale (W h + bias)), softcap(z) = c tanh(z / c).

    Attributes:
        module: the Linear, whose weight may be tied to the embeddings.
        scale, softcap: of its config; no softcap where it is None.
    """

    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] as the model makes them."""
        logits: Tensor = self.module(states) * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


@dataclass(eq=False)
class HeadStates:
    """What a head was to read in a pass of its model, filled in by ``deferring_logits``.

    Attributes:
        states: [B, S, d] before the head, with their graph.
        last: [B, 1, V] what the model made of the last position.
        vocabulary: how many first ids a base method reads; None: all.
    """

    head: LMHead
    vocabulary: int | None = None
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def ids(self) -> int:
        """How many."""
        return self.head.module.out_features if self.vocabulary is None else self.vocabulary

    def logits(self) -> Tensor:
        """[B, S, vocabulary], for who must have them."""
        return self.head.logits(self.states)[..., : self.vocabulary]


def take_apart(model: nn.Module) -> LMHead | str:
    """A model's head, or why its logits must be the model's own.

    Asks the config for a scale and a softcap, and compares on a few tokens what that makes with the model's logits.
    """
    stored = getattr(model, "stored_head", None)
    if isinstance(stored, LMHead):  # of a teacher whose states are on disk: taken apart when they were made
        return stored
    inner: Any = unwrap(model)
    output = inner.get_output_embeddings()
    if type(output) is not nn.Linear:
        return f"its head is a {type(output).__name__}, not a Linear"
    if output._forward_pre_hooks or output._forward_hooks or hasattr(output, "_hf_hook"):
        return "its head has hooks"
    if any(hasattr(module, "_orig_mod") for module in (model, inner)) or inner._compiled_call_impl is not None:
        return "it is compiled"
    config = inner.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
    scale = 1 / scaling if scaling is not None else getattr(config, "logit_scale", None)
    head = LMHead(output, 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None))
    return _fault(model, head) or head


def _fault(model: nn.Module, head: LMHead) -> str | None:
    device = head.module.weight.device
    tokens = torch.arange(PROBE_TOKENS, device=device)[None] % head.module.out_features
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    with evaluating(model), torch.no_grad():
        expected = model(**inputs).logits.float()
        with deferring_logits(head) as read:
            model(**inputs)
        made = head.logits(read.states).float()
    if made.shape != expected.shape:
        return f"its logits are {list(expected.shape)}, its head makes {list(made.shape)}"
    error = (made - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    # half precision: both round their logits, maybe not alike
    limit = TOLERANCE if made.dtype == head.module.weight.dtype else 2e-2
    return None if error <= limit else f"its logits are not its head's (they differ by {error:.1e} of the largest)"


@contextmanager
def deferring(head: LMHead | None, vocabulary: int | None = None) -> Iterator[HeadStates | None]:
    """``deferring_logits``; nothing without a head."""
    if head is None:
        yield None
        return
    with deferring_logits(head, vocabulary) as read:
        yield read


@contextmanager
def deferring_logits(head: LMHead, vocabulary: int | None = None) -> Iterator[HeadStates]:
    """A pass of its model within it runs the head on the last position alone; what it was to read is kept."""
    read, module = HeadStates(head, vocabulary), head.module

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.states = args[0]
        return (args[0][..., -1:, :], *args[1:])

    def keep_last(_module: nn.Module, _args: Any, logits: Tensor) -> None:
        read.last = logits

    handles = [module.register_forward_pre_hook(keep), module.register_forward_hook(keep_last)]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
