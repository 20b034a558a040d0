"""What can be known of a run before any weights are loaded: whether arguments, tokenizers and models fit together."""

from __future__ import annotations

import copy
import os
import tempfile
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from mta_fast.config import MTAConfig
from mta_fast.distill.models import UNFIT, tokens_in_use
from mta_fast.distill.training.settings import type_name
from mta_fast.errors import InputError
from mta_fast.layers import unwrap

if TYPE_CHECKING:
    from mta_fast.distill.training.arguments import MTATrainingArguments

LEAST = {"gradient_accumulation_steps": 1, "max_length": 2, "projection_learning_rate": 0, "learning_rate": 0}
ABOVE_ZERO = ("num_train_epochs", "save_steps")
METRICS = ("loss", "base", "dsa", "hid")  # of the evaluation set
_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


# --- training arguments ------------------------------------------------------------------------------------------


def check_values(values: Mapping[str, Any]) -> None:
    """See that the values of the ``training`` part have the types of their fields, and what no one else checks.

    Raises:
        InputError: names the key, the type or bound, and what came.
    """
    from mta_fast.distill.training.arguments import MTATrainingArguments

    hints = typing.get_type_hints(MTATrainingArguments)
    for key, value in values.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError:
            raise InputError(f"training.{key}: expected {type_name(hints[key])}, got {value!r}") from None
        if key in LEAST and value < LEAST[key]:
            raise InputError(f"training.{key}: expected a number >= {LEAST[key]}, got {value!r}")
        if key in ABOVE_ZERO and not value > 0:
            raise InputError(f"training.{key}: expected a number > 0, got {value!r}")


def check_evaluation(arguments: MTATrainingArguments, *, evaluated: bool) -> None:
    """See that what asks for evaluations has an evaluation set, and a metric that they give.

    Raises:
        InputError: names the key and the mend.
    """
    wanted = {
        "eval_strategy": arguments.eval_strategy.value != "no",
        "load_best_model_at_end": arguments.load_best_model_at_end,
        "save_strategy": arguments.save_strategy.value == "best",
        "eval_on_start": arguments.eval_on_start,
    }
    for key, asks in wanted.items():
        if asks and not evaluated:
            value = getattr(arguments, key)
            raise InputError(
                f"training.{key}: expected an evaluation set beside {getattr(value, 'value', value)}, data.eval is "
                f"null; give one"
            )
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in METRICS:
        raise InputError(
            f"training.metric_for_best_model: expected one of {', '.join(METRICS)}, got "
            f"{arguments.metric_for_best_model!r}"
        )


def rehearse(arguments: MTATrainingArguments, *, evaluated: bool) -> None:
    """Make transformers' Trainer of a single weight, which refuses what its arguments alone don't: a report or an
    optimiser without its package, options that a schedule does not have, batches of no rows.

    Raises:
        InputError: in transformers' own words.
    """
    if arguments.world_size > 1 and (arguments.deepspeed or arguments.fsdp or "ACCELERATE_USE_FSDP" in os.environ):
        return  # would shard it
    from transformers import Trainer

    rows = [{"labels": 0, "input_ids": [0]}]
    with tempfile.TemporaryDirectory() as folder:
        trial = copy.copy(arguments)
        trial.output_dir, trial.push_to_hub, trial.train_sampling_strategy = folder, False, "random"
        try:
            trainer = Trainer(nn.Linear(1, 1), trial, train_dataset=rows, eval_dataset=rows if evaluated else None)
            trainer.get_train_dataloader()
            if evaluated:
                trainer.get_eval_dataloader()
            if arguments.optim_target_modules is None:  # else it looks for modules by their names
                trainer.create_optimizer_and_scheduler(1)
        except (*UNFIT, ImportError, OSError) as error:
            raise InputError(f"training: {error}") from None


@contextmanager
def unsharded(arguments: MTATrainingArguments) -> Iterator[None]:
    """Models that are loaded here are whole on every rank, whatever DeepSpeed or FSDP in the arguments ask for."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    efficient, config = os.environ.pop(_EFFICIENT_LOADING, None), getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if efficient is not None:
            os.environ[_EFFICIENT_LOADING] = efficient
        if config is not None:
            set_hf_deepspeed_config(config)


# --- models ------------------------------------------------------------------------------------------------------


def check_room(side: str, model: Any, tokenizer: Any, max_length: int) -> None:
    """See that a model has an embedding for every token and a position for every place.

    Args:
        side: "student" or "teacher", for the message.
        model: of transformers, or its config, from which it is then built without weights.

    Raises:
        InputError: fewer embeddings than the tokenizer has tokens, fewer positions than ``max_length``.
    """
    network: Any = unwrap(model) if isinstance(model, nn.Module) else _without_weights(model)
    if network is None:
        return
    embeddings = network.get_input_embeddings()
    size, needed = getattr(embeddings, "num_embeddings", None), tokens_in_use(tokenizer)
    if size is not None and size < needed:
        raise InputError(
            f"{side}: expected embeddings for the tokenizer's {needed} tokens, it has {size}; give it its own "
            f"tokenizer, or resize it with model.resize_token_embeddings"
        )
    positions = max_positions(network)
    if positions is not None and positions < max_length:
        raise InputError(
            f"{side}: expected positions for max_length = {max_length} tokens, it has {positions}; lower max_length"
        )


def check_layers(config: MTAConfig, depths: Mapping[str, int]) -> None:
    """See that both models have the layers that MTA compares.

    Args:
        depths: of "student" and "teacher".

    Raises:
        InputError: names the side, its depth and the layer.
    """
    for side, layers in (("student", config.student_layers), ("teacher", config.teacher_layers)):
        if layers[-1] > depths[side]:
            raise InputError(
                f"mta.layer_pairs, {side} layers: expected hidden-state indices 0 to {depths[side]} (the model's "
                f"depth), got {layers[-1]}"
            )


def max_positions(model: nn.Module) -> int | None:
    """How many positions a model has a table of; None where it computes them (rotary embeddings, ALiBi)."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe"):
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - int(getattr(module, "offset", padding)))
        table = getattr(module, "embed_positions", None)
        if isinstance(table, torch.Tensor):
            found.append(table.shape[0])
    return min(found, default=None)


def _without_weights(config: Any) -> Any:
    """The model of a config on the meta device; None where it can't be built there: it is checked once it is loaded."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (*UNFIT, ImportError, OSError):
        return None
