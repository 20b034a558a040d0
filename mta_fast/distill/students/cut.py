"""A student cut from a teacher: some of its blocks, with embeddings, final norm and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mta_fast.distill.models import UNFIT
from mta_fast.errors import InputError
from mta_fast.layers import block_list, depth_field, evaluating, num_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEADING_BLOCKS = {"first_k_dense_replace", "num_dense_layers", "max_window_layers"}  # so many blocks are of one kind
PROBE_TOKENS = 8
PASSING = {"training", "_is_hf_initialized"}  # attributes of a module that say nothing of how it is built


def cut_layers(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A student with some of a teacher's blocks; embeddings, final norm and head are copied.

    What the config says of single blocks (layer_types, mlp_only_layers, first_k_dense_replace ...) is cut with them.
    Each of the student's blocks is then compared with the teacher's: its modules, its settings, and what it makes of
    the states of a few tokens.

    Args:
        teacher: a causal language model of transformers whose blocks are one ModuleList.
        layers: how many blocks (spread evenly, first and last included), or which ones (0-based).

    Returns:
        A new model of the teacher's class, dtype and device; it shares no memory with the teacher.

    Raises:
        InputError: more blocks than there are, none, a model whose blocks can't be found, or one whose config can't
            say which blocks are left (every fourth one differs, say) or whose blocks use their number.
    """
    kept = check_layers(layers, num_layers(teacher))
    student = _built(teacher, kept)
    for parameter in student.parameters():  # not student.to: the buffers of rotary embeddings stay in float32
        parameter.data = parameter.data.to(teacher.dtype)
    student.load_state_dict(_kept_state(teacher, kept))
    student.to(teacher.device)
    _compare_blocks(teacher, student, kept)
    if teacher.generation_config is not None:
        student.generation_config = type(teacher.generation_config).from_dict(teacher.generation_config.to_dict())
    return student


def check_layers(layers: int | Sequence[int], depth: int) -> list[int]:
    """The blocks that ``cut_layers`` takes of a model of this depth.

    Raises:
        InputError: more blocks than there are, none, or blocks that don't ascend.
    """
    kept = _spread(layers, depth) if isinstance(layers, int) else list(layers)
    if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < depth:
        raise InputError(
            f"layers: expected 1 to {depth} ascending blocks of the teacher (0 to {depth - 1}), got {layers}"
        )
    return kept


def check_cut(teacher: PreTrainedModel, kept: Sequence[int]) -> None:
    """Refuse blocks that no student can be made of, as far as that shows without weights and a pass.

    Raises:
        InputError: as ``cut_layers`` does.
    """
    with torch.device("meta"):
        _built(teacher, kept)


def _built(teacher: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of random weights whose blocks are built as these of the teacher."""
    name = block_list(teacher)
    try:
        with torch.random.fork_rng(devices=[]):  # its random start is overwritten
            student: PreTrainedModel = type(teacher)(cut_config(teacher.config, kept))
    except UNFIT as error:
        raise _not_cut(teacher, kept, str(error)) from None
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    if shapes != {key: value.shape for key, value in _kept_state(teacher, kept).items()}:
        raise _not_cut(teacher, kept, "blocks of another kind would stand in their places")
    theirs, own = blocks_of(teacher, name), blocks_of(student, name)
    for i, block in enumerate(kept):
        if not _built_alike(theirs[block], own[i], (block, i), (len(theirs), len(own))):
            raise _not_cut(teacher, kept, f"block {block} would be built otherwise as block {i}")
    return student


def blocks_of(model: PreTrainedModel, name: str) -> nn.ModuleList:
    """The blocks by the name that ``layers.block_list`` finds."""
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model with these blocks; read from plain values, as that of a saved model is."""
    text, values = config.get_text_config(), copy.deepcopy(config.to_dict())
    nested = next((key for key in type(config).sub_configs if getattr(config, key, None) is text), None)
    part = values if nested is None else values[nested]
    field = depth_field(text)
    depth = int(getattr(text, field))
    for key, value in part.items():
        if isinstance(value, list) and not key.endswith(("token_id", "token_ids", "architectures")):
            part[key] = _cut_list(value, depth, kept, indices="layer" in key or "idx" in key or key.endswith("_at"))
    for key in LEADING_BLOCKS & part.keys():
        if isinstance(part[key], int):
            part[key] = sum(block < part[key] for block in kept)
    part.pop("attention_types", None)  # GPT-Neo's short form of attention_layers, below
    if "attention_layers" in part:
        part["attention_types"] = [[[kind], 1] for kind in part["attention_layers"]]
    part[text.attribute_map.get(field, field)] = len(kept)
    return type(config).from_dict(values)


def _cut_list(value: list[Any], depth: int, kept: Sequence[int], *, indices: bool) -> list[Any]:
    """One entry a block, or the numbers of some blocks; any other list as it is."""
    numbers = all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < depth for entry in value)
    if len(value) == depth and (value != list(range(depth)) or depth < 3):
        return [value[block] for block in kept]
    if indices and numbers and sorted(set(value)) == value:
        return [i for i, block in enumerate(kept) if block in value]
    return value


def _compare_blocks(teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int]) -> None:
    """Refuse a student one of whose blocks makes other states of the same than the teacher's."""
    name = block_list(teacher)
    theirs, own = blocks_of(teacher, name), blocks_of(student, name)
    differing: list[int] = []

    def compare(i: int) -> Any:
        def run_too(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not _equal(own[i](*args, **kwargs), output):
                differing.append(kept[i])

        return run_too

    with ExitStack() as hooks, torch.no_grad():
        for i, block in enumerate(kept):
            hooks.callback(theirs[block].register_forward_hook(compare(i), with_kwargs=True).remove)
        hooks.enter_context(evaluating(teacher))
        hooks.enter_context(evaluating(student))
        ids = int(teacher.get_input_embeddings().num_embeddings)
        tokens = torch.arange(PROBE_TOKENS, device=teacher.device)[None] % ids
        try:
            teacher(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        except UNFIT as error:
            raise _not_cut(teacher, kept, f"the blocks can't be run: {error}") from None
    if differing:
        raise _not_cut(teacher, kept, f"block {differing[0]} gives other states under its new number")


def _built_alike(first: nn.Module, second: nn.Module, *numbers: tuple[int, int]) -> bool:
    """Whether two blocks have the same modules and plain attributes.

    Args:
        numbers: pairs by which an attribute of the two may differ: their own numbers, their models' depths.
    """
    pairs = list(zip(first.named_modules(), second.named_modules(), strict=False))
    if any(name != other or type(a) is not type(b) for (name, a), (other, b) in pairs):
        return False
    for (_, a), (_, b) in pairs:
        for key in vars(a).keys() | vars(b).keys():
            one, two = vars(a).get(key), vars(b).get(key)
            if key not in PASSING and isinstance(one, (int, float, str, bool)) and one != two:
                if not any(isinstance(two, int) and one - x == two - y for x, y in numbers if isinstance(one, int)):
                    return False
    return len(list(first.modules())) == len(list(second.modules()))


def _equal(first: Any, second: Any) -> bool:
    """Whether what two blocks return holds the same tensors."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.shape == second.shape
        return same and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return True


def _not_cut(teacher: PreTrainedModel, kept: Sequence[int], reason: str) -> InputError:
    return InputError(
        f"layers: expected blocks that {type(teacher).__name__} can be made of, got {', '.join(map(str, kept))} of "
        f"{num_layers(teacher)}: {reason}; keep other blocks, such as the first ones or whole periods of those that "
        f"differ"
    )


def _spread(count: int, depth: int) -> list[int]:
    """``count`` blocks of 0 ... depth - 1, evenly spread with both ends; the last one where there is a single one."""
    if not 1 <= count <= depth:
        raise InputError(f"layers: expected 1 to {depth} (the teacher's blocks), got {count}")
    if count == 1:
        return [depth - 1]
    return [(2 * i * (depth - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def _kept_state(teacher: PreTrainedModel, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The teacher's own tensors, those of block ``kept[i]`` as block i, without the other blocks."""
    prefix, position = f"{block_list(teacher)}.", {str(block): str(i) for i, block in enumerate(kept)}
    renumbered = {}
    for key, value in teacher.state_dict().items():
        if key.startswith(prefix):
            block, _, rest = key.removeprefix(prefix).partition(".")
            if block not in position:
                continue
            key = f"{prefix}{position[block]}.{rest}"
        renumbered[key] = value
    return renumbered
