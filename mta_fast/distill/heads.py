"""LM heads taken apart: the states that a head reads, instead of the logits that it makes of every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.layers import evaluating, unwrap
from mta_fast.layout import Head
from mta_fast.ops.linear_divergence import head_logits, processed

PROBE_TOKENS = 4  # of the pass that compares a head that was taken apart with the model's logits
PROBE_LOGIT = 300.0  # far beyond every softcap: those of a model at its start would not show it
# what configs call the factor of the logits, its inverse, and c of the softcap
SCALES, INVERSE_SCALES = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# of their difference, relative to the largest logit; half precision rounds both, maybe not alike
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 2e-2
UNFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)  # what a pass that can't be raises


@dataclass(frozen=True, eq=False)
class LMHead:
    """A model's head: logits = softcap(scale (W h + bias)), softcap(z) = c tanh(z / c).

    Attributes:
        module: a Linear, whose weight may be tied to the embeddings, or one with LoRA or DoRA adapters.
        scale, softcap: of the model's config; no softcap where it is None.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def call(self, states: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """``function(states, weight [V, d], bias [V] or None)`` in place of the module's forward.

        What gathers a sharded weight for its module's forward, and frees it afterwards, does so around ``function``.
        """
        module: Any = self.module
        module.forward = lambda given: function(given, *self.weight_and_bias())
        try:
            made: Tensor = module(states)
        finally:
            del module.forward
        return made

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """[V, d] and [V] or None that the module multiplies with and adds, differentiable.

        With LoRA adapters W + s B A; with DoRA's magnitudes m (m / |W + s B A|) (W + s B A), where the rows' norms have
        no gradient (arXiv 2402.09353, section 4.3).
        """
        module: Any = self.module
        linear = _linear(module)
        weight = linear.weight
        with torch.autocast(weight.device.type, enabled=False):
            for name in _active_adapters(module):
                weight = weight + module.get_delta_weight(name).to(weight.dtype)
                if name in module.lora_magnitude_vector:
                    norm = torch.linalg.norm(weight.detach(), dim=1)
                    weight = weight * (module.lora_magnitude_vector[name].weight / norm).to(weight.dtype)[:, None]
        return weight, linear.bias

    @property
    def linear(self) -> nn.Linear:
        """The module without its adapters."""
        return _linear(self.module)

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] as the model makes them."""
        return processed(self.module(states), self.how)

    @property
    def how(self) -> Head:
        """As the formulas take it."""
        return Head(self.scale, self.softcap or 0.0)


@dataclass(eq=False)
class HeadStates:
    """What a head was to read in a pass of its model, filled in by ``deferring_logits``.

    Attributes:
        states: [B, S, d] before the head, with their graph.
        vocabulary: how many first ids a base method reads; None: all.
    """

    head: LMHead
    vocabulary: int | None = None
    states: Tensor = field(default_factory=lambda: torch.empty(0))

    def at(self, tokens: Tensor) -> Tensor:
        """[M, d] the states of flat tokens [M]."""
        return self.states.flatten(0, 1).index_select(0, tokens)

    def logits(self) -> Tensor:
        """[B, S, vocabulary], for who must have them."""
        return self.head.logits(self.states)[..., : self.vocabulary]


def head_rows(head: LMHead, ids: Tensor) -> LMHead:
    """A frozen copy of some rows of a head [V, d], in the order of ids [n]."""
    ids = ids.to(head.linear.weight.device)
    weight, bias = (None if value is None else value.detach()[ids] for value in head.weight_and_bias())
    assert weight is not None
    return LMHead(frozen_linear(weight, bias), head.scale, head.softcap)


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of a weight [V, d] and a bias [V]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


# --- taking apart ------------------------------------------------------------------------------------------------


def take_apart(model: nn.Module) -> LMHead | str:
    """A model's head, or why its logits must be the model's own.

    Asks the config for a scale and a softcap, and compares on a few tokens what that makes with the model's logits.
    """
    stored = getattr(model, "stored_head", None)
    if isinstance(stored, LMHead):  # of a teacher whose states are on disk: taken apart when they were made
        return stored
    inner: Any = unwrap(model)
    output = inner.get_output_embeddings()
    if hasattr(output, "modules_to_save"):  # PEFT's copy that is trained
        output = output.modules_to_save[output.active_adapters[0]]
    why = _unreadable(output)
    if why is not None:
        return why
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "its weights are sharded already (ZeRO-3)"
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in (model, inner, output)):
        return "it is compiled"
    head = LMHead(output, *scale_and_softcap(inner))
    return _fault(model, head) or head


def scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """What a model does to its head's logits, as its config says."""
    config, scale = model.config.get_text_config(), 1.0
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, (int, float)) and value}
    for name in SCALES:
        scale *= numbers.get(name, 1.0)
    for name in INVERSE_SCALES:
        scale /= numbers.get(name, 1.0)
    return scale, next((float(numbers[name]) for name in SOFTCAPS if name in numbers), None)


def _unreadable(output: Any) -> str | None:
    """Why a head's weight can't be read; None where it can."""
    linear = _linear(output)
    if type(linear) is not nn.Linear:
        return f"its head is a {type(linear).__name__}, not a Linear"
    if any(m._forward_pre_hooks or m._forward_hooks or hasattr(m, "_hf_hook") for m in (output, linear)):
        return "its head has hooks"
    if any("forward" in vars(m) for m in (output, linear)):
        return "its head has a forward of its own"
    if linear is output:
        return None
    if not hasattr(output, "lora_A"):
        return f"its head has an adapter that isn't LoRA ({type(output).__name__})"
    for name in _active_adapters(output):
        if getattr(output.lora_dropout[name], "p", 0.0) > 0:
            return "its head has an adapter with dropout"
        if output.lora_B[name].bias is not None:
            return "its head has an adapter with a bias"
    return None


def _linear(module: Any) -> nn.Linear:
    """A head without its adapters."""
    linear: nn.Linear = getattr(module, "base_layer", module)
    return linear


def _active_adapters(module: Any) -> list[str]:
    """Those that a pass adds to the weight."""
    if _linear(module) is module or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _fault(model: nn.Module, head: LMHead) -> str | None:
    """What a pass over a few tokens shows against a head: its own logits, and what is made of large ones."""
    device = next(model.parameters()).device
    tokens = torch.arange(PROBE_TOKENS, device=device)[None] % unwrap(model).get_input_embeddings().num_embeddings  # type: ignore[operator]  # transformers' method
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    read: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        read.append(states)
        return large.to(states.dtype).expand(*states.shape[:-2], 1, -1)

    with evaluating(model), torch.no_grad():
        try:
            expected = model(**inputs).logits
        except UNFIT as raised:
            return f"a pass over {PROBE_TOKENS} tokens raised {type(raised).__name__}: {raised}"
        large = torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, expected.shape[-1], device=device)
        try:
            with _called_as(head.module, keep):
                expected_large = model(**inputs).logits
        except UNFIT:
            return "its pass reads the logits of every position"
        if not read:
            return "its pass does not call its head"
        made = head.call(read[0], lambda states, weight, bias: head_logits(states, weight, bias, head.how))
        made_large = processed(large, head.how).expand_as(expected_large)
    for found, of_model in ((made, expected), (made_large, expected_large)):
        if found.shape != of_model.shape:
            return f"its logits are {list(of_model.shape)}, its head makes {list(found.shape)}"
        exact = of_model.dtype in (torch.float32, torch.float64)
        error = (found.float() - of_model.float()).abs().max() / of_model.float().abs().max().clamp(min=1e-30)
        if not error <= (TOLERANCE if exact else HALF_PRECISION_TOLERANCE):
            return f"its logits are not its head's (they differ by {error:.1e} of the largest)"
    return None


# --- passes without logits ---------------------------------------------------------------------------------------


@contextmanager
def deferring_logits(head: LMHead, vocabulary: int | None = None) -> Iterator[HeadStates]:
    """A pass of its model within it makes logits of 0 for one position; what the head was to read is kept."""
    read, module = HeadStates(head, vocabulary), head.module
    ids = _linear(module).out_features

    def keep(states: Tensor) -> Tensor:
        read.states = states
        return states.new_zeros(*states.shape[:-2], 1, ids)

    with _called_as(module, keep):
        yield read


@contextmanager
def _called_as(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module whose whole call is ``function``: no hook of it gathers a weight that nobody reads."""
    module._compiled_call_impl = function
    try:
        yield
    finally:
        module._compiled_call_impl = None


@contextmanager
def deferring(head: LMHead | None, vocabulary: int | None = None) -> Iterator[HeadStates | None]:
    """``deferring_logits``; nothing without a head."""
    if head is None:
        yield None
        return
    with deferring_logits(head, vocabulary) as read:
        yield read
