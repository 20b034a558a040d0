"""Which layers to align, and how to get exactly those hidden states out of a model.

Indices follow the ``hidden_states`` of transformers: 0 is the embeddings, k the residual stream after block k,
and N that stream after the final norm. That holds for every model, also for those whose own tuple begins after block 1
(Mamba, Mamba-2, Falcon-Mamba and RWKV: its entry k - 1 is layer k, and the embeddings are not in it): capture their
layers, and don't hand their tuple to ``MTALoss``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.errors import InputError

# model types without the embeddings in their hidden_states: N states after blocks, then the one after the final norm
_TUPLE_FROM_BLOCK_1 = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv"})


@dataclass(frozen=True)
class LayerMap:
    """Layer pairs (student layer, teacher layer); pass ``pairs`` to ``MTAConfig(layer_pairs=...)``."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def proportional(cls, student_layers: int, teacher_layers: int, layers: Sequence[int] | None = None) -> LayerMap:
        """phi(l) = round-half-up(l * N_T / N_S) (the paper's proportional mapping, arXiv 2605.01374).

        Args:
            student_layers: N_S, the student's depth; teacher_layers: N_T.
            layers: the student layers to map; None: N_S / 2, 3 N_S / 4 and N_S, the paper's choice for GPT-2.

        Raises:
            InputError: a depth < 1, a student deeper than its teacher, a layer outside 0 ... N_S.
        """
        for name, depth in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
            if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
                raise InputError(f"{name}: expected the model's number of layers (an integer >= 1), got {depth!r}")
        if student_layers > teacher_layers:
            raise InputError(
                f"student_layers: expected at most the teacher's {teacher_layers}, got {student_layers}; "
                f"two student layers would share a teacher layer: give layer_pairs by hand"
            )
        if layers is None:
            layers = sorted({_round_half_up(student_layers * part, 4) for part in (2, 3, 4)})
        layers = _indices(layers, student_layers)
        return cls(tuple((layer, _round_half_up(layer * teacher_layers, student_layers)) for layer in layers))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


class CapturedStates(dict[int, Tensor]):
    """{layer: hidden state}, filled by the model's forward."""

    def __missing__(self, layer: int) -> Tensor:
        raise InputError(
            f"hidden state of layer {layer}: expected one of the captured layers {sorted(self)}; "
            f"call the model inside the with-block, and list the layer in capture_layers(model, layers)"
        )


@contextmanager
def capture_layers(model: nn.Module, layers: Sequence[int]) -> Iterator[CapturedStates]:
    """Collect the hidden states of chosen layers while the model runs; only those are kept.

    ``with capture_layers(model, [6, 9, 12]) as hidden: model(**batch)`` fills ``hidden[6]`` and so on; a second
    call overwrites them. Where transformers can select hidden states itself, it is asked to (this also works
    under torch.compile and gradient checkpointing); elsewhere forward hooks read the blocks. Layer k is the state after
    block k whatever the model's own tuple begins with (module docstring).

    Args:
        model: a transformers model, or one wrapped by PEFT, torch.compile, DDP or FSDP2.
        layers: hidden-state indices, 0 to the model's depth.

    Raises:
        InputError: an index out of range, reentrant gradient checkpointing (its first pass keeps no graph), or
            a model whose output or blocks can't be read, layer 0 of a compiled model whose tuple lacks it.
    """
    depth = num_layers(model)
    wanted = sorted(set(_indices(layers, depth)))
    _refuse_reentrant_checkpointing(model)
    captured = CapturedStates()
    with ExitStack() as hooks:
        if selects_hidden_states(model):
            _ask_for_states(model, {layer: layer for layer in wanted}, captured, hooks)
        elif _is_compiled(model):  # hooks on compiled blocks don't fire
            _ask_for_states(model, _places_in_tuple(model, wanted, depth), captured, hooks)
        else:
            _hook_blocks(model, wanted, depth, captured, hooks)
        yield captured


def _indices(layers: Sequence[int], depth: int) -> list[int]:
    """Checked hidden-state indices, 0 to ``depth``."""
    made = []
    for layer in layers:
        try:
            made.append(operator.index(layer))
        except TypeError:
            made.append(-1)
        if isinstance(layer, bool) or not 0 <= made[-1] <= depth:
            raise InputError(f"layers: expected hidden-state indices 0 to {depth} (the model's depth), got {layer!r}")
    return made


def _is_compiled(model: nn.Module) -> bool:
    """By torch.compile(model), or in place by model.compile()."""
    return hasattr(model, "_orig_mod") or getattr(unwrap(model), "_compiled_call_impl", None) is not None


def num_layers(model: nn.Module) -> int:
    """N, the number of transformer blocks of a (wrapped) transformers model.

    Raises:
        InputError: the model has no config.
    """
    config = getattr(unwrap(model), "config", None)
    if config is None:
        raise InputError(f"model: expected a transformers model with a config, got {type(model).__name__}")
    return depth_of(config)


def depth_of(config: Any) -> int:
    """The number of blocks of a model with this config; of an encoder and a decoder, the decoder's."""
    if depth_field(config) == "num_hidden_layers" and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return int(getattr(config, depth_field(config)))


def depth_field(config: Any) -> str:
    """The field of a text model's config that holds its depth."""
    return next(
        (name for name in ("num_decoder_layers", "decoder_layers") if hasattr(config, name)), "num_hidden_layers"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP and PEFT wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


def selects_hidden_states(model: nn.Module) -> bool:
    """Whether this architecture honours ``output_hidden_states=[indices]`` in the installed transformers.

    Some architectures (GPT-J) ignore the list and return every state.
    """
    try:
        from transformers.utils.output_capturing import selected_hidden_states  # noqa: F401
    except ImportError:
        return False
    inner = unwrap(model)
    backbone = getattr(inner, "base_model", inner)
    return any("hidden_states" in (getattr(m, "_can_record_outputs", None) or ()) for m in backbone.modules())


def hidden_widths(model: nn.Module, layers: Sequence[int]) -> dict[int, int]:
    """{layer: width} of hidden states, measured with a forward pass over two tokens (OPT-350m's last differs).

    Raises:
        InputError: a model that can't run on token ids alone, or whose hidden states are not [B, S, d] (Gemma-3n).
    """
    device, kind = next(model.parameters()).device, type(unwrap(model)).__name__
    with evaluating(model), torch.no_grad(), capture_layers(model, layers) as hidden:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
        try:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"model: expected a causal language model that runs on token ids alone, {kind} raised {error}"
            ) from None
    for layer in layers:
        if hidden[layer].ndim != 3:
            raise InputError(
                f"model: expected hidden states [B, S, d], those of {kind} are {list(hidden[layer].shape)} at layer "
                f"{layer}; it has no single stream of states to align"
            )
    return {layer: hidden[layer].shape[-1] for layer in layers}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards every module has its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _places_in_tuple(model: nn.Module, wanted: list[int], depth: int) -> dict[int, int]:
    """{layer: where it stands in the model's own hidden_states}."""
    kind = getattr(unwrap(model).config, "model_type", None)
    if kind not in _TUPLE_FROM_BLOCK_1:
        return {layer: layer for layer in wanted}
    if 0 in wanted:
        raise InputError(
            f"layers: expected 1 to {depth} of a compiled {kind} model, whose hidden_states lack the embeddings, "
            f"got 0; capture before compiling"
        )
    return {layer: layer if layer == depth else layer - 1 for layer in wanted}


def _ask_for_states(model: nn.Module, places: dict[int, int], captured: CapturedStates, hooks: ExitStack) -> None:
    """``places``: {layer: where it stands in the output's hidden_states}."""

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # a caller that asked for all states gets them, one that asked for some (a nested capture) gets those too
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(unwrap(model).config, "output_hidden_states", False)
        if asked is True:
            return args, kwargs
        others = [asked] if isinstance(asked, int) and asked is not False else asked or []
        return args, kwargs | {"output_hidden_states": sorted({*places.values(), *others})}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states = getattr(output, "hidden_states", None)
        if states is None or any(states[place] is None for place in places.values()):
            raise InputError(
                f"capture_layers: expected an output with the hidden states {list(places)}, got "
                f"{type(output).__name__} without them; call the model with return_dict=True"
            )
        captured.update({layer: states[place] for layer, place in places.items()})

    if not places:
        return
    hooks.enter_context(_removing(model.register_forward_pre_hook(ask, with_kwargs=True)))
    hooks.enter_context(_removing(model.register_forward_hook(keep)))


def _hook_blocks(model: nn.Module, wanted: list[int], depth: int, captured: CapturedStates, hooks: ExitStack) -> None:
    stack, blocks = _blocks(unwrap(model), depth)

    def keep_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured[0] = args[0] if args else kwargs["hidden_states"]

    def keeper(layer: int) -> Any:
        def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[layer] = output if isinstance(output, Tensor) else output[0]

        return keep_output

    if 0 in wanted:
        hooks.enter_context(_removing(blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)))
    for layer in wanted:
        if layer:
            module = stack if layer == depth else blocks[layer - 1]  # the stack's output has passed the final norm
            hooks.enter_context(_removing(module.register_forward_hook(keeper(layer))))


def _blocks(model: nn.Module, depth: int) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the blocks, and the blocks."""
    path, _, name = block_list(model, depth).rpartition(".")
    stack = model.get_submodule(path)
    return stack, getattr(stack, name)


def block_list(model: nn.Module, depth: int | None = None) -> str:
    """The dotted name of the ModuleList that holds a model's blocks, such as "transformer.h".

    Raises:
        InputError: there is not exactly one ModuleList of the model's depth.
    """
    depth = num_layers(model) if depth is None else depth
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(found) != 1:
        raise InputError(
            f"model: expected one ModuleList of its {depth} blocks, {type(model).__name__} has {len(found)} "
            f"{found}; call it with output_hidden_states=True and pass the tuple to MTALoss"
        )
    return found[0]


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise InputError(
                    "capture_layers: expected gradient checkpointing without reentry, got use_reentrant=True; call "
                    "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )


@contextmanager
def _removing(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
