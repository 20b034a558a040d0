"""``python -m bench recipes``: time and memory that the recipes of examples/ should take on a GPU. Nothing is run.

A coarse model, to know whether a recipe takes an hour or a week and fits a GPU. Products alone, at a share of the data
sheet's peak: the teacher's pass 2 P T, the student's passes 6 P T (4 P T with an adapter, whose base has no weight
gradients), P parameters, T tokens of whole windows. FDD adds the heads of its layers. Parameters are counted on models
without memory, of the published sizes below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_model.costs import GPUS
from bench.report import Entry, Report, Section, entry, markdown_table
from mta_fast import __version__
from mta_fast.distill.training.settings import TrainSettings
from mta_fast.kernels.linear_divergence import CHUNK_LOGITS

ROOT = Path(__file__).resolve().parents[1]
ROWS = 14_000  # databricks-dolly-15k without the 1,000 that are held out; prompts that are too long count too
SHARE = 0.4  # of the peak: what well-kept training loops reach
ACTIVATIONS = 34  # bytes of a token, layer and unit of width that the backward keeps, 16-bit, no attention map
LOGIT_BYTES = 4 + 4 + 2  # of an entry of a chunk: both sides in float32, the gradient in 16 bits
NAMES = ("gpt2", "qwen1.5", "opt", "gpt2-fdd", "qwen1.5-fdd", "qwen1.5-distillm2", "opt-distillm2")


@dataclass(frozen=True)
class Size:
    """A model's parameters, layers, width and vocabulary."""

    parameters: int
    layers: int
    width: int
    vocabulary: int


def measure() -> Report:
    """Every recipe's minutes and memory."""
    found = [_recipe(name) for name in NAMES]
    head = ("recipe", "steps", *(f"{gpu.name}, minutes" for gpu in GPUS), "memory, GB")
    table = [
        (name, f"{steps:,}", *(f"{each.median:.0f}" for each in figures))
        for name, (steps, figures) in zip(NAMES, found, strict=True)
    ]
    text = (
        f"Modelled, not measured: products at {SHARE:.0%} of the data sheet's bf16 peak, every row a full window of "
        f"256 tokens, {ROWS:,} rows. Without what the student writes during training (DistiLLM), evaluation and "
        f"saving. Memory: weights (teacher in bfloat16; student, gradients and AdamW in float32), activations without "
        f"checkpointing, a chunk of logits and the head's gradient."
    )
    about = {"mta_fast": __version__, **{gpu.name: gpu.sheet for gpu in GPUS}}
    entries = [each for _, figures in found for each in figures]
    return Report("mta-fast bench recipes", about, [Section("Recipes", entries, text, markdown_table(head, table))])


def _recipe(name: str) -> tuple[int, list[Entry]]:
    """Steps; minutes on each GPU, and memory."""
    settings = TrainSettings.from_yaml(ROOT / "examples" / f"{name}.yaml")
    family = name.removesuffix("-fdd").removesuffix("-distillm2")
    student, teacher = (_size(side) for side in FAMILIES[family])
    training, adapter = settings.training, settings.student.lora
    batch = training["per_device_train_batch_size"] * (2 if settings.base.loss == "distillm2" else 1)
    in_step = training.get("gradient_accumulation_steps", 1)
    tokens = batch * training["max_length"]
    flops = tokens * (2 * teacher.parameters + (6 if adapter is None else 4) * student.parameters)
    if settings.base.loss == "fdd":  # heads forward, the student's also backward
        config = settings.mta_config(student.layers, teacher.layers)
        assert config is not None
        heads = len(config.layer_pairs) * (2 * teacher.width + 6 * student.width)
        flops += tokens * heads * student.vocabulary
    steps = ROWS // (training["per_device_train_batch_size"] * in_step) * training["num_train_epochs"]
    minutes = [steps * in_step * flops / (SHARE * gpu.bfloat16) / 60 for gpu in GPUS]
    weights = 2 * teacher.parameters + (16 if adapter is None else 4) * student.parameters
    activations = ACTIVATIONS * student.layers * student.width * tokens
    logits = LOGIT_BYTES * min(CHUNK_LOGITS, tokens * student.vocabulary)
    logits += 4 * student.vocabulary * student.width if adapter is None else 0  # the head's gradient before it is added
    memory = (weights + activations + logits) / 1e9
    times = [entry(f"{name}, {gpu.name}", [each], "minutes") for gpu, each in zip(GPUS, minutes, strict=True)]
    return steps, [*times, entry(f"{name}, memory", [memory], "GB")]


def _size(make: Callable[[Any], Any]) -> Size:
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make(transformers))
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    return Size(count, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def _gpt2(layers: int, width: int, heads: int) -> Callable[[Any], Any]:
    return lambda tf: tf.GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def _qwen(width: int, inner: int, tied: bool) -> Callable[[Any], Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 24, "vocab_size": 151936}
    return lambda tf: tf.Qwen2Config(**sizes, num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=tied)


def _opt(layers: int, width: int) -> Callable[[Any], Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    return lambda tf: tf.OPTConfig(**sizes, num_attention_heads=32)


FAMILIES = {  # student, teacher, as published
    "gpt2": (_gpt2(12, 768, 12), _gpt2(48, 1600, 25)),
    "qwen1.5": (_qwen(1024, 2816, True), _qwen(2048, 5504, False)),
    "opt": (_opt(24, 2048), _opt(32, 4096)),
}
