"""A new, small model of a teacher's architecture: other sizes, a random start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mta_fast.distill.data import load_rows, texts_of
from mta_fast.distill.models import UNFIT, load_config, load_tokenizer
from mta_fast.distill.students.cut import cut_config
from mta_fast.distill.students.vocabulary import coverage, numbers_of, trim_tokenizer
from mta_fast.errors import InputError
from mta_fast.layers import depth_of, evaluating

WIDTH_STEP, INTERMEDIATE_STEP = 32, 8  # what sizes that aren't given are multiples of
PROBE_TOKENS = 8
# config fields by the part that they play, as families name them
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner")
FREE = (  # sizes that don't follow the width
    *("vocab_size", "sliding_window", "window_size", "attention_chunk_size", "chunk_size_feed_forward"),
    *("vocab_size_per_layer_input", "n_positions", "n_ctx"),
)
SIZED = ("_size", "_dim", "_rank", "_channels", "_width")  # ends of names of sizes


@dataclass(frozen=True)
class Sizes:
    """What a fresh student's sizes are; those that are None follow from the teacher's.

    Attributes:
        layers: blocks, at most the teacher's.
        width: of the hidden states; None: as wide for its depth as the teacher, in steps of 32.
        heads: attention heads, which divide the width; None: so many that a head is about as wide as the teacher's.
        kv_heads: heads of keys and values, which divide ``heads``; None: the teacher's share.
        intermediate: width inside an MLP; None: the teacher's share, in steps of 8.
    """

    layers: int
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: expected an integer >= 1, got {value!r}")


def fresh_config(teacher: Any, sizes: Sizes, numbers: Mapping[int, int] | None = None) -> Any:
    """The config of a model like the teacher's, but smaller.

    What the teacher's config says of single blocks (layer_types ...) is that of its first blocks.

    Args:
        teacher: the config of a causal language model of transformers.
        numbers: {teacher's id: student's id} of a trimmed vocabulary; None: the teacher's.

    Raises:
        InputError: sizes that don't fit together, or a config whose sizes aren't known.
    """
    depth = depth_of(teacher)
    if sizes.layers > depth:
        raise InputError(f"layers: expected 1 to {depth} (the teacher's blocks), got {sizes.layers}")
    config = cut_config(teacher, range(sizes.layers))
    text = config.get_text_config()
    if text is not config:
        raise _unknown(teacher, "it is made of several models")
    named = {name: text.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads")}
    for field in named.values():
        if not isinstance(getattr(text, field, None), int):
            raise _unknown(teacher, f"it has no {field}")
    old_width, old_heads = (int(getattr(text, field)) for field in named.values())
    width = _width(sizes, depth, old_width)
    old_head_dim = getattr(text, "head_dim", None) or old_width // old_heads
    heads = _heads(sizes, width, old_width, old_head_dim)
    values = dict.fromkeys((named["hidden_size"],), width) | {named["num_attention_heads"]: heads}
    head_dim = _even(old_head_dim * old_heads * width / (old_width * heads))
    if old_head_dim * old_heads == old_width:
        head_dim = width // heads
    if hasattr(text, "head_dim"):
        values["head_dim"] = head_dim
    values |= _kv_heads(text, sizes, heads, old_heads) | _intermediate(text, sizes, width, old_width)
    if hasattr(text, "word_embed_proj_dim"):  # OPT
        values["word_embed_proj_dim"] = max(1, round(text.word_embed_proj_dim * width / old_width))
    for field in ("rotary_dim", "query_pre_attn_scalar"):  # of a head: GPT-J; Gemma
        if getattr(text, field, None) is not None:
            values[field] = _even(getattr(text, field) * head_dim / old_head_dim)
    _refuse_unknown(teacher, text, values)
    for field, value in values.items():
        setattr(text, field, value)
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    if numbers is not None:
        _renumber(text, numbers)
        text.vocab_size = len(numbers)
    return config


def fresh_student(config: Any, seed: int = 42) -> Any:
    """A model of a config in float32, started as transformers starts one (``_init_weights``).

    Raises:
        InputError: no model can be made of the config, or it doesn't run.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        tokens = torch.arange(PROBE_TOKENS)[None] % config.vocab_size
        with torch.no_grad(), evaluating(student):
            student(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except (*UNFIT, ImportError, AssertionError) as error:
        raise InputError(f"{type(config).__name__}: expected sizes that a model can be made of, got: {error}") from None
    return student


@dataclass(frozen=True, eq=False)
class Fresh:
    """A fresh student with its tokenizer, and what there is to say of them."""

    student: Any
    tokenizer: Any
    lines: Sequence[str]


def make_fresh(
    teacher: str,
    sizes: Sizes,
    data: Sequence[str] = (),
    *,
    vocabulary_size: int | None = None,
    seed: int = 42,
    **reading: Any,
) -> Fresh:
    """What ``mta-fast new`` makes.

    Args:
        teacher: as ``load_model`` takes it; its config and tokenizer are read.
        data: sources whose tokens are kept; none: the whole vocabulary.
        vocabulary_size: keep at most so many of them. seed: of the weights.
        reading: options of ``load_rows``.

    Raises:
        InputError: as ``fresh_config``, ``trim_tokenizer`` and ``load_rows`` do; a size without data.
    """
    if vocabulary_size is not None and not data:
        raise InputError("vocabulary_size: expected --vocabulary beside it, the data whose tokens are kept; give it")
    config = load_config(teacher)
    fresh_config(config, sizes)  # refuses what can't be, before the data is read
    tokenizer = whole = load_tokenizer(teacher)
    texts = [text for source in data for text in texts_of(load_rows(source, tokenizer=whole, **reading).rows)]
    if data:
        tokenizer = trim_tokenizer(whole, texts, vocabulary_size)
    student = fresh_student(fresh_config(config, sizes, numbers_of(tokenizer, whole)), seed)
    blocks, of_tokens = parameters(student)
    made = student.config
    lines = [
        f"{sizes.layers} blocks of width {made.hidden_size} with {made.num_attention_heads} heads, "
        f"{blocks / 1e6:.2f} million parameters and {of_tokens / 1e6:.2f} million of embeddings"
    ]
    if data:
        kept = coverage(whole, tokenizer, texts)
        lines.append(
            f"{len(tokenizer):,} of {len(whole):,} tokens, which are {kept.share:.2%} of the data's; "
            f"{kept.before:.1f} tokens a row before, {kept.after:.1f} now"
        )
    return Fresh(student, tokenizer, lines)


def parameters(student: Any) -> tuple[int, int]:
    """How many parameters a model has without embeddings and head, and how many those have."""
    tables = [student.get_input_embeddings(), student.get_output_embeddings()]
    of_tokens = {id(p): p.numel() for table in tables if table is not None for p in table.parameters()}
    total = sum(p.numel() for p in student.parameters())
    return total - sum(of_tokens.values()), sum(of_tokens.values())


def _width(sizes: Sizes, depth: int, old: int) -> int:
    if sizes.width is not None:
        return sizes.width
    return WIDTH_STEP * max(1, round(old * sizes.layers / (depth * WIDTH_STEP)))


def _heads(sizes: Sizes, width: int, old_width: int, old_head_dim: int) -> int:
    """Heads that divide the width into even parts, the nearest (by their ratio) to the teacher's."""
    if sizes.heads is not None:
        if width % sizes.heads:
            raise InputError(f"heads: expected a number that divides the width {width}, got {sizes.heads}")
        return sizes.heads
    fitting = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads % 2 == 0]
    if not fitting:
        raise InputError(f"width: expected an even number, got {width}; or give heads")
    return min(fitting, key=lambda heads: max(width / heads / old_head_dim, old_head_dim * heads / width))


def _kv_heads(text: Any, sizes: Sizes, heads: int, old_heads: int) -> dict[str, int]:
    old = getattr(text, "num_key_value_heads", None)
    if old is None:
        if sizes.kv_heads not in (None, heads):
            raise InputError(
                f"kv_heads: expected a model with heads of keys and values of their own, {type(text).__name__} has "
                f"none; leave it out"
            )
        return {}
    if sizes.kv_heads is not None:
        if heads % sizes.kv_heads:
            raise InputError(f"kv_heads: expected a number that divides the {heads} heads, got {sizes.kv_heads}")
        return {"num_key_value_heads": sizes.kv_heads}
    wanted = heads * old / old_heads
    fitting = [count for count in range(1, heads + 1) if heads % count == 0]
    return {"num_key_value_heads": min(fitting, key=lambda count: max(count / wanted, wanted / count))}


def _intermediate(text: Any, sizes: Sizes, width: int, old_width: int) -> dict[str, int]:
    field = next((name for name in INTERMEDIATE if hasattr(text, name)), None)
    old = None if field is None else getattr(text, field)
    if sizes.intermediate is not None:
        if field is None:
            raise InputError(
                f"intermediate: expected a model whose config names it, {type(text).__name__} names none of "
                f"{', '.join(INTERMEDIATE)}; leave it out"
            )
        return {field: sizes.intermediate}
    if field is None or old is None:  # a fixed multiple of the width
        return {}
    if not isinstance(old, int):
        raise _unknown(text, f"its {field} is {old!r}")
    return {field: INTERMEDIATE_STEP * max(1, round(old * width / (old_width * INTERMEDIATE_STEP)))}


def _refuse_unknown(teacher: Any, text: Any, values: Mapping[str, int]) -> None:
    """Refuse a config with sizes that are in no list here: they would stay those of the teacher."""
    unknown = sorted(
        name
        for name, value in text.to_dict().items()
        if name.endswith(SIZED) and isinstance(value, int) and value > 0 and name not in values and name not in FREE
    )
    if unknown:
        raise _unknown(teacher, f"what {', '.join(unknown)} must be is not known")


def _renumber(config: Any, numbers: Mapping[int, int]) -> None:
    """The ids of special tokens, of a config or a generation config; None for one that was dropped."""
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, numbers.get(value))
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [numbers[each] for each in value if each in numbers] or None)


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))


def _unknown(config: Any, why: str) -> InputError:
    return InputError(
        f"teacher: expected an architecture whose sizes can be changed, of {type(config).__name__} {why}; make the "
        f"model with transformers, or cut one with mta-fast cut"
    )
