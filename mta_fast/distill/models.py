"""Teacher, student and tokenizers: loading, the vocabulary they share, and a student cut from a teacher."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mta_fast.distill.manifest import MANIFEST_FILE, verify
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.files import user_source
from mta_fast.layers import block_list, num_layers, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- loading -----------------------------------------------------------------------------------------------------


def load_model(name: str, *, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    """A causal language model.

    Args:
        name: a folder, a hub name, or ``package:NAME`` for model files that an installed Python package brings. A
            folder with one .gguf file and no config.json is read as GGUF.
        dtype: "float32", "bfloat16" or "float16".
        options: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: no such model, an unknown dtype. MissingPackageError: transformers or gguf is not installed.
    """
    tf = _transformers()
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place, gguf = _resolve(name)
    options = {key: user_source(value) if isinstance(value, str) else value for key, value in options.items()}
    if (Path(place) / MANIFEST_FILE).is_file():  # a checkpoint
        verify(Path(place), student_only=True)
    try:
        model = tf.AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], **gguf, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: expected a causal language model: {error}") from None
    if gguf:  # the weights are plain numbers now, but a model that is marked as quantised is never saved
        model.hf_quantizer.remove_quantization_config(model)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer beside a model; names as in ``load_model``.

    Raises:
        InputError: none there. MissingPackageError: transformers or gguf is not installed.
    """
    tf = _transformers()
    place, gguf = _resolve(name)
    try:
        return tf.AutoTokenizer.from_pretrained(place, use_fast=True, **gguf)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer of {name!r}: expected one beside the model: {error}") from None


def model_depth(name: str, **options: Any) -> int:
    """How many blocks a model has, from its config alone; names as in ``load_model``.

    Raises:
        InputError: none there. MissingPackageError: transformers or gguf is not installed.
    """
    tf = _transformers()
    place, gguf = _resolve(name)
    try:
        config = tf.AutoConfig.from_pretrained(place, **gguf, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: expected one with a config: {error}") from None
    return int(config.get_text_config().num_hidden_layers)


def _resolve(name: str) -> tuple[str, dict[str, str]]:
    """The folder or hub name to load from, and the GGUF file where the model is one."""
    place = user_source(name)
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise MissingPackageError(
                f"model {name!r}: expected the Python package {package!r} with model files, it is not installed; "
                f"pip install {package.replace('_', '-')}"
            )
        place = found.submodule_search_locations[0]
    folder = Path(place)
    if not folder.is_dir() or any((folder / name).is_file() for name in CONFIG_FILES):
        return place, {}
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(
            f"model {name!r}: expected config.json or one .gguf file in {folder}, got {len(files)} of them"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"model {name!r}: expected the package gguf to read {files[0].name}; pip install gguf"
        )
    return place, {"gguf_file": files[0].name}


def model_places(name: str) -> list[Path]:
    """The files and folders that belong to a model, for ``files.check_target``; names as in ``load_model``.

    A hub name counts as a path too: a folder of that name would be loaded in its place from then on.

    Raises:
        InputError, MissingPackageError: as ``load_model`` does, for a folder without a model or a missing package.
    """
    place = Path(_resolve(name)[0])
    if place.exists():
        return [place]
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached = try_to_load_from_cache(name, "config.json")
    except (ImportError, HFValidationError):
        return [place]
    return [place, *([Path(cached).parents[2]] if isinstance(cached, str) else [])]  # REPO/snapshots/COMMIT/config.json


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            "models: expected the package transformers, it is not installed; pip install '.[train]' in the checkout"
        ) from None
    return transformers


# --- vocabularies ------------------------------------------------------------------------------------------------


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers give the same text the same ids: equal tokens, special tokens and merges."""
    if first is second:
        return True
    if first.get_vocab() != second.get_vocab():
        return False
    probe = "Words, phrases 3.14 and\n\tcode(x) += [1]; naïve façade 你好 🙂"
    return bool(first(probe)["input_ids"] == second(probe)["input_ids"])


def common_vocabulary(student: nn.Module, teacher: nn.Module, tokenizer: Any) -> int:
    """How many ids both models' logits share; what lies beyond is padding of the embedding matrix.

    Args:
        student, teacher: causal language models that read the same tokens.
        tokenizer: their tokenizer.

    Raises:
        InputError: a model with fewer ids than the tokenizer has tokens: the rest can't be padding.
    """
    sizes = {"student": _vocabulary(student), "teacher": _vocabulary(teacher)}
    needed = len(tokenizer)
    for side, size in sizes.items():
        if size < needed:
            raise InputError(
                f"{side}: expected logits for the tokenizer's {needed} tokens, it has {size}; the two share no "
                f"distribution: give both sides their own tokenizer, or resize with model.resize_token_embeddings"
            )
    return min(sizes.values())


def _vocabulary(model: nn.Module) -> int:
    head: Any = unwrap(model)
    output = head.get_output_embeddings()
    if output is None:
        return int(head.config.get_text_config().vocab_size)
    return int(getattr(output, "out_features", output.weight.shape[0]))  # a quantised weight has a shape of its own


# --- a student cut from a teacher --------------------------------------------------------------------------------


def cut_layers(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A student with some of a teacher's blocks; embeddings, final norm and head are copied.

    Args:
        teacher: a causal language model of transformers whose blocks are one ModuleList.
        layers: how many blocks (spread evenly, first and last included), or which ones (0-based).

    Returns:
        A new model of the teacher's class and dtype; it shares no memory with the teacher.

    Raises:
        InputError: more blocks than there are, none, or a model whose blocks can't be found.
    """
    depth = num_layers(teacher)
    kept = _spread(layers, depth) if isinstance(layers, int) else list(layers)
    if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < depth:
        raise InputError(
            f"layers: expected 1 to {depth} ascending blocks of the teacher (0 to {depth - 1}), got {layers}"
        )
    name = block_list(teacher)
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    for field, value in config.to_dict().items():  # such as layer_types: one entry a block
        if isinstance(value, list) and len(value) == depth:
            setattr(config, field, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    with torch.random.fork_rng(devices=[]):  # its random start is overwritten
        student = type(teacher)(config)
    for parameter in student.parameters():  # not student.to: the buffers of rotary embeddings stay in float32
        parameter.data = parameter.data.to(teacher.dtype)
    student.load_state_dict(_renumbered(teacher.state_dict(), f"{name}.", kept))
    if teacher.generation_config is not None:
        student.generation_config = type(teacher.generation_config).from_dict(teacher.generation_config.to_dict())
    return student


def parse_layers(text: str) -> int | list[int]:
    """The ``layers`` of ``cut_layers`` from a text: "10", or "0,4,9".

    Raises:
        InputError: no such numbers.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"layers: expected a number or numbers such as 0,4,9, got {text!r}") from None
    return numbers if "," in text else numbers[0]


def _spread(count: int, depth: int) -> list[int]:
    """``count`` blocks of 0 ... depth - 1, evenly spread with both ends; the last one where there is a single one."""
    if not 1 <= count <= depth:
        raise InputError(f"layers: expected 1 to {depth} (the teacher's blocks), got {count}")
    if count == 1:
        return [depth - 1]
    return [(2 * i * (depth - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def _renumbered(state: dict[str, torch.Tensor], prefix: str, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The state with block ``kept[i]`` as block i and without the other blocks."""
    position = {str(block): str(i) for i, block in enumerate(kept)}
    renumbered = {}
    for key, value in state.items():
        if key.startswith(prefix):
            block, _, rest = key.removeprefix(prefix).partition(".")
            if block not in position:
                continue
            key = f"{prefix}{position[block]}.{rest}"
        renumbered[key] = value.clone()
    return renumbered
