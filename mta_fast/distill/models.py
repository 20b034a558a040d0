"""Teacher, student and tokenizers: loading, the vocabulary they share, and a student cut from a teacher."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mta_fast.choices import check_choice
from mta_fast.distill.manifest import FINGERPRINT_FILE, STATE_FILE, verify
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.files import user_source
from mta_fast.layers import block_list, depth_field, depth_of, evaluating, num_layers, unwrap
from mta_fast.packages import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*.py", "config.json")
CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
LEADING_BLOCKS = {"first_k_dense_replace", "num_dense_layers", "max_window_layers"}  # so many blocks are of one kind
CONFIG_OPTIONS = {
    *("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only", "force_download"),
    *("proxies", "code_revision", "gguf_file"),
}
PROBE_TOKENS = 8
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


# --- a student cut from a teacher --------------------------------------------------------------------------------


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
    depth = num_layers(teacher)
    kept = _spread(layers, depth) if isinstance(layers, int) else list(layers)
    if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < depth:
        raise InputError(
            f"layers: expected 1 to {depth} ascending blocks of the teacher (0 to {depth - 1}), got {layers}"
        )
    name = block_list(teacher)
    try:
        config = _cut_config(teacher.config, kept)
        with torch.random.fork_rng(devices=[]):  # its random start is overwritten
            student = type(teacher)(config)
    except UNFIT as error:
        raise _not_cut(teacher, kept, str(error)) from None
    for parameter in student.parameters():  # not student.to: the buffers of rotary embeddings stay in float32
        parameter.data = parameter.data.to(teacher.dtype)
    try:
        student.load_state_dict(_renumbered(teacher.state_dict(), f"{name}.", kept))
    except RuntimeError:
        raise _not_cut(teacher, kept, "blocks of another kind would stand in their places") from None
    student.to(teacher.device)
    _compare_blocks(teacher, student, name, kept)
    if teacher.generation_config is not None:
        student.generation_config = type(teacher.generation_config).from_dict(teacher.generation_config.to_dict())
    return student


def _cut_config(config: Any, kept: Sequence[int]) -> Any:
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


def _compare_blocks(teacher: PreTrainedModel, student: PreTrainedModel, name: str, kept: Sequence[int]) -> None:
    """Refuse a student one of whose blocks isn't the teacher's: built otherwise, or other states from the same."""
    theirs, own = teacher.get_submodule(name), student.get_submodule(name)
    assert isinstance(theirs, nn.ModuleList)
    assert isinstance(own, nn.ModuleList)
    differing: list[int] = []

    def compare(i: int) -> Any:
        def run_too(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not _equal(own[i](*args, **kwargs), output):
                differing.append(kept[i])

        return run_too

    with ExitStack() as hooks, torch.no_grad():
        for i, block in enumerate(kept):
            if not _built_alike(theirs[block], own[i], (block, i), (len(theirs), len(own))):
                raise _not_cut(teacher, kept, f"block {block} would be built otherwise as block {i}")
            hooks.callback(theirs[block].register_forward_hook(compare(i), with_kwargs=True).remove)
        hooks.enter_context(evaluating(teacher))
        hooks.enter_context(evaluating(student))
        tokens = torch.arange(PROBE_TOKENS, device=teacher.device)[None] % _vocabulary(teacher)
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
            if key != "training" and isinstance(one, (int, float, str, bool)) and one != two:
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
