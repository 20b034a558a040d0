"""Teacher, student and tokenizers: loading, and the vocabulary they share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mta_fast.choices import check_choice
from mta_fast.distill._moved import find_name
from mta_fast.distill.manifest import FINGERPRINT_FILE, STATE_FILE, verify
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.files import user_source
from mta_fast.layers import depth_of, unwrap
from mta_fast.packages import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*.py", "config.json")
CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
CONFIG_OPTIONS = {
    *("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only", "force_download"),
    *("proxies", "code_revision", "gguf_file"),
}
UNFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)  # what a model raises that can't be
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
    check_choice("dtype", dtype, DTYPES)
    load_config(name, **options)
    place, gguf = _resolve(name)
    options = gguf | {key: user_source(value) if isinstance(value, str) else value for key, value in options.items()}
    if any((Path(place) / file).is_file() for file in (FINGERPRINT_FILE, STATE_FILE)):  # a checkpoint
        verify(Path(place), student_only=True)
    try:
        model = tf.AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: expected a causal language model: {error}") from None
    if "gguf_file" in options:  # weights are plain numbers now, but a model that is marked as quantised is never saved
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


def load_config(name: str, **options: Any) -> Any:
    """The config of a causal language model; names as in ``load_model``.

    Args:
        options: of ``from_pretrained``; those that choose the config are read.

    Raises:
        InputError: none there, or of a model of another kind. MissingPackageError: transformers or gguf is not
            installed.
    """
    tf = _transformers()
    place, gguf = _resolve(name)
    options = {key: options[key] for key in CONFIG_OPTIONS & options.keys()}
    options = gguf | {key: user_source(value) if isinstance(value, str) else value for key, value in options.items()}
    try:
        config = tf.AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        where, adapter = {key: options[key] for key in ("revision", "token", "subfolder") if key in options}, None
        with suppress(OSError, ValueError):  # no place for a model at all
            adapter = tf.utils.find_adapter_config_file(place, **where)
        if adapter is None:
            raise InputError(f"model {name!r}: expected a causal language model: {error}") from None
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise InputError(f"{adapter}: expected base_model_name_or_path, it names none; write it there") from None
        return load_config(base, **{key: options[key] for key in ("trust_remote_code", "token") if key in options})
    kind = type(config).__name__
    known = type(config) in tf.MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        what = "an encoder-decoder" if config.is_encoder_decoder else "one of another kind"
        raise InputError(
            f"model {name!r}: expected a causal language model, got {what} ({kind}); transformers has no "
            f"AutoModelForCausalLM for it"
        )
    return config


def choose_device(name: str) -> torch.device:
    """The device of a name as torch has it; "auto": the GPU, or the CPU where there is none.

    Raises:
        InputError: no such device, or none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r} ({error})") from None
    return device


def model_depth(name: str, **options: Any) -> int:
    """How many blocks a model has, from its config alone; names, options and errors as in ``load_config``."""
    return depth_of(load_config(name, **options))


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
    require("gguf", "test", f"model {name!r}, to read {files[0].name}")
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


def model_files(name: str, **options: Any) -> list[Path]:
    """The files that a model's weights, config and adapters are read from; names and options as in ``load_model``.

    Empty where the weights aren't all on this machine, or can't be told without loading (an adapter's base).
    """
    folder = Path(_resolve(name)[0])
    if not folder.is_dir():
        try:
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError

            where = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
            cached = try_to_load_from_cache(name, "config.json", **where)
        except (ImportError, HFValidationError):
            return []
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    folder /= options.get("subfolder", "")
    if (folder / "adapter_config.json").is_file():
        return []
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    weights = {file.name for file in files if file.suffix in (".safetensors", ".bin", ".gguf")}
    for index in folder.glob("*.index.json"):
        weights = weights if set(_shards(index)) <= weights else set()
    return files if weights else []


def _shards(index: Path) -> Iterable[str]:
    """The files that an index lists."""
    try:
        listed: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return [index.name]  # no weights
    return listed.values()


def _transformers() -> Any:
    require("transformers", "train", "models")
    import transformers

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


def common_vocabulary(
    student: nn.Module, teacher: nn.Module, tokenizer: Any, teacher_ids: torch.Tensor | None = None
) -> int:
    """How many ids both models' logits share; what lies beyond is padding of the embedding matrix.

    Args:
        student, teacher: causal language models that read the same tokens.
        tokenizer: the student's.
        teacher_ids: [V] the teacher's id of each of the student's; None: the same.

    Raises:
        InputError: a model with fewer ids than the tokenizer has tokens: the rest can't be padding.
    """
    sizes = {"student": _vocabulary(student), "teacher": _vocabulary(teacher)}
    needed = dict.fromkeys(sizes, tokens_in_use(tokenizer))
    if teacher_ids is not None:
        needed = {"student": len(teacher_ids), "teacher": 1 + int(teacher_ids.max())}
    for side, size in sizes.items():
        if size < needed[side]:
            raise InputError(
                f"{side}: expected logits for the tokenizer's {needed[side]} tokens, it has {size}; the two share no "
                f"distribution: give both sides their own tokenizer, or resize with model.resize_token_embeddings"
            )
    return min(sizes.values()) if teacher_ids is None else len(teacher_ids)


def tokens_in_use(tokenizer: Any) -> int:
    """How many ids a model must know: those of text, and the special ones that begin, end or pad it.

    Some tokenizers have more, which no text holds: that of an image in Gemma 3.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    special = [each for name in names if (each := getattr(tokenizer, name, None)) is not None]
    return 1 + max(tokenizer.vocab_size - 1, *special, 0)


def _vocabulary(model: nn.Module) -> int:
    head: Any = unwrap(model)
    output = head.get_output_embeddings()
    if output is None:
        return int(head.config.get_text_config().vocab_size)
    return int(getattr(output, "out_features", output.weight.shape[0]))  # a quantised weight has a shape of its own


def __getattr__(name: str) -> Any:
    """``cut_layers``, which now lies in ``students.cut``."""
    return find_name(__name__, name)
