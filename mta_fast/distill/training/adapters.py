"""A PEFT student as files: its adapter in a checkpoint, and a plain model with the adapter merged into the weights."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, BASE_FILE = "adapter_config.json", "base.json"
WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})  # PEFT's names within a parameter's


def is_peft(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT, with adapters that can be merged."""
    return hasattr(model, "merge_and_unload") and hasattr(model, "peft_config")


def active_adapter(student: Any) -> str:
    """The name of the adapter that takes part in a PEFT student's forward; MTATrainer sees to it that it is one."""
    return str(student.active_adapters[0])


# --- in a checkpoint ---------------------------------------------------------------------------------------------


def save_adapter(student: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the active adapter, whatever its name, where PEFT looks for one, and what its base was loaded as."""
    name = active_adapter(student)
    student.save_pretrained(folder, selected_adapters=[name], state_dict=state)
    if name != "default":
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        shutil.rmtree(folder / name)
    base = student.get_base_model()
    quantisation: Any = None
    if getattr(base, "is_quantized", False):
        quantisation = getattr(base.config, "quantization_config", None)
        quantisation = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation
    loaded_as = {"dtype": str(base.dtype).removeprefix("torch."), "quantization_config": quantisation}
    (folder / BASE_FILE).write_text(json.dumps(loaded_as, indent=2) + "\n", encoding="utf-8")


def load_adapted(checkpoint: Path) -> PreTrainedModel:
    """The PEFT student of a checkpoint, its base loaded as it was for the training.

    Raises:
        InputError: an adapter that names no base, or one that can't be loaded.
    """
    from peft import PeftModel
    from transformers.quantizers.auto import AutoQuantizationConfig

    from mta_fast.distill.models import DTYPES, load_model
    from mta_fast.distill.training import fingerprint

    name = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"{checkpoint / ADAPTER_CONFIG}: expected base_model_name_or_path, it names none: the student's base came "
            f"from no folder; write the folder or hub name of that model there"
        )
    file, options = checkpoint / BASE_FILE, {}
    if file.is_file():
        loaded_as = json.loads(file.read_text(encoding="utf-8"))
        if loaded_as["dtype"] in DTYPES:
            options["dtype"] = loaded_as["dtype"]
        if loaded_as["quantization_config"] is not None:
            options["quantization_config"] = AutoQuantizationConfig.from_dict(loaded_as["quantization_config"])
    student = PeftModel.from_pretrained(load_model(name, **options), checkpoint, is_trainable=True)
    run, _ = fingerprint.load(checkpoint)
    trained_on = None if run is None or "quantization_config" in options else run.get("student.base")
    if trained_on not in (None, fingerprint.of_weights(student, trained=False)):
        raise InputError(
            f"{checkpoint}: expected the base model that its adapter was trained on, {name} has other weights now; put "
            f"the former ones there, or merge into the right ones: PeftModel.from_pretrained(base, checkpoint)"
            f".merge_and_unload()"
        )
    return student


# --- merged into the weights -------------------------------------------------------------------------------------


def merged(student: nn.Module) -> PreTrainedModel:
    """A plain copy of a PEFT student that computes the same; the student stays as it is.

    Weights that the base ties together and the adapter tells apart (a LoRA on ``lm_head`` alone, say) are two in the
    copy, whose config says so. Quantised weights are dequantised first.

    Raises:
        InputError: quantised weights that transformers can't dequantise; tied weights other than the embeddings that
            the adapter tells apart.
    """
    made_of = {  # PEFT keeps what it made tied adapters of, which has a graph and so can't be copied
        id(value): value
        for module in student.modules()
        for value in ((getattr(module, "kwargs", None) or {}).get("tied_adapter") or {}).values()
    }
    copied: Any = _dequantised(copy.deepcopy(student, made_of))
    base = copied.get_base_model()
    was_tied = [bool(config.tie_word_embeddings) for config in _tying_configs(base)]
    tied = _untie(base)
    with _without_warning("Input and output embeddings are no longer tied"):
        plain = copied.merge_and_unload()
    apart = _tie_again(plain, tied)
    for config, tie in zip(_tying_configs(plain), was_tied, strict=True):
        config.tie_word_embeddings = tie and not apart
    return plain


def _dequantised(student: Any) -> Any:
    """A PEFT student over plain weights; adapters can't be merged into quantised ones without a loss."""
    if not getattr(student.get_base_model(), "is_quantized", False):
        return student
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    name = active_adapter(student)
    config, state = student.peft_config[name], get_peft_model_state_dict(student, adapter_name=name)
    base = student.unload()
    try:
        base = base.dequantize()
    except (NotImplementedError, ValueError, ImportError) as error:
        raise InputError(
            f"export: expected quantised weights that transformers can dequantise, got: {error}; load the base model "
            f"in full precision and merge a checkpoint into it: PeftModel.from_pretrained(base, checkpoint)"
            f".merge_and_unload()"
        ) from None
    plain = get_peft_model(base, config, adapter_name=name)
    set_peft_model_state_dict(plain, state, adapter_name=name)
    return plain


def _tying_configs(model: Any) -> list[Any]:
    """The configs of a model that say whether its embeddings are tied: its own, and its text model's."""
    found = {id(config): config for config in (model.config, model.config.get_text_config())}
    return [config for config in found.values() if hasattr(config, "tie_word_embeddings")]


def _untie(model: nn.Module) -> list[list[str]]:
    """Give every parameter that several modules hold to each of them for itself; their names, without PEFT's parts."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(p), []).append((f"{prefix}.{name}", module, name))
    groups = [group for group in holders.values() if len(group) > 1]
    for group in groups:
        for _, module, name in group[1:]:
            p = getattr(module, name)
            setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    return [sorted({_plain_name(name) for name, *_ in group}) for group in groups]


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tie_again(model: Any, groups: list[list[str]]) -> bool:
    """Make those one again that are still equal; whether the embeddings are not."""
    ends = {
        id(end.weight)
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
        if getattr(end, "weight", None) is not None
    }
    weights = dict(model.named_parameters(remove_duplicate=False))
    apart = False
    for group in groups:
        first, *rest = names = [name for name in group if name in weights] or [""]
        if all(torch.equal(weights[first], weights[name]) for name in rest):
            for name in rest:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, weights[first])
        elif {id(weights[name]) for name in names} <= ends:
            apart = True
        else:
            raise InputError(
                f"export: expected an adapter that leaves tied weights equal, {' and '.join(names)} are one in the "
                f"model and two with it; take one of them out of its target_modules"
            )
    return apart


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=text)
        yield
