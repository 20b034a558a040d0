"""What MTATrainer refuses before it changes anything: models that share memory, students that nothing would train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mta_fast.errors import InputError
from mta_fast.loss import MTALoss

Storage = tuple[str, int]  # device and address
Bytes = tuple[int, int]  # first address and end


def check_models(student: nn.Module, teacher: nn.Module | None, mta: object) -> None:
    """Refuse models that can't be trained as they are; none of them is changed.

    Raises:
        InputError: a student without a trainable parameter, in float16, on no device or over several, quantised
            without adapters, or with adapters that can't be merged; frozen projections; memory that the teacher
            shares with the student or the projections.
    """
    check_adapters(student)
    trained = _trained(student)
    if not trained:
        raise InputError(
            "student: expected parameters to train, got none with requires_grad; call student.requires_grad_(True), "
            "or load its adapter with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    for name, parameter in trained:
        if parameter.is_meta:
            raise InputError(
                f"student: expected weights in memory, {name} has none (meta device); load it without device_map"
            )
        if parameter.dtype == torch.float16:
            raise InputError(
                f"student: expected float32 or bfloat16 weights to train, {name} has float16, in which small updates "
                f"are lost; call student.float(), and set fp16 for mixed precision"
            )
    if len(set((getattr(student, "hf_device_map", None) or {}).values())) > 1:
        raise InputError(
            "student: expected one on a single device, got one spread by device_map; load it without, and shard its "
            "training with FSDP"
        )
    if isinstance(mta, MTALoss):
        frozen = [name for name, p in mta.named_parameters() if not p.requires_grad]
        if frozen:
            raise InputError(
                f"mta: expected projections that are trained, {frozen[0]} is frozen; call mta.requires_grad_(True)"
            )
    if teacher is not None:
        _check_apart("student", student, teacher)
        if isinstance(mta, MTALoss):
            _check_apart("mta", mta, teacher)


def check_adapters(student: Any) -> None:
    """Refuse adapters that checkpoints and exports could not hold.

    Raises:
        InputError: adapters that were not made by PEFT's own wrapper, can't be merged, or are several at once; a
            quantised student without any.
    """
    if getattr(student, "peft_config", None) is None:
        if getattr(student, "is_quantized", False):
            raise InputError(
                "student: expected weights that can be trained, got quantised ones; put adapters on them with "
                "peft.get_peft_model, or load it without quantisation"
            )
        return
    if not hasattr(student, "merge_and_unload"):
        raise InputError(
            f"student: expected adapters that can be merged into the weights (LoRA and its kin, on a model wrapped by "
            f"peft.get_peft_model), got {type(student).__name__}"
        )
    if len(active_adapters(student)) != 1:
        raise InputError(
            f"student: expected one active adapter, got {len(active_adapters(student))} of "
            f"{', '.join(student.peft_config)}; choose one with student.set_adapter(name)"
        )


def active_adapters(student: Any) -> list[str]:
    """The names of a PEFT student's adapters that take part in its forward."""
    return list(student.active_adapters)


def check_optimizer(optimizer: torch.optim.Optimizer | None, student: nn.Module, mta: nn.Module | None) -> None:
    """Refuse an optimiser that leaves something of what is to be trained as it is.

    Raises:
        InputError: names the first parameter that it lacks.
    """
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for side, module in (("student", student), ("mta", mta)):
        missing = [name for name, p in _trained(module) if id(p) not in held]
        if missing:
            raise InputError(
                f"optimizers: expected one over all trainable parameters of student and mta, it lacks {len(missing)} "
                f"of {side}, {missing[0]} first; make it over [*student.parameters(), *mta.parameters()] of an "
                f"MTALoss, or freeze what shall stay as it is"
            )


class GradientsArrive(TrainerCallback):
    """Stops a training whose loss reaches no parameter of the student, at its first step.

    Frozen parts, disabled adapters and layers above the last pair's can all lead there, while the projections still
    learn and the loss falls. For whole gradients: of sharded ones a rank knows its part.
    """

    def __init__(self, student: nn.Module, mta: nn.Module | None) -> None:
        self._student, self._mta, self._seen = student, mta, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        if self._seen:
            return
        trained = _trained(self._student)
        self._seen = any(_moves(p) for _, p in trained)
        none = all(p.grad is None for _, p in trained)
        if not self._seen and (none or any(_moves(p) for _, p in _trained(self._mta))):  # else the step has no loss
            raise InputError(
                f"student: expected a loss that reaches its trainable parameters, none of {len(trained)} has a "
                f"gradient ({', '.join(name for name, _ in trained[:3])}); unfreeze layers up to the last pair's, "
                f"enable its adapters, or add a base loss"
            )


def _moves(p: Tensor) -> bool:
    return p.grad is not None and bool((p.grad != 0).any())


def _trained(module: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    return [] if module is None else [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _check_apart(side: str, module: nn.Module, teacher: nn.Module) -> None:
    """Refuse parameters of a module that are, or lie in, the teacher's."""
    own = {id(p) for p in teacher.parameters()}
    taken: dict[Storage, list[Bytes]] = {}
    for p in teacher.parameters():
        for storage, part in _place(p):
            taken.setdefault(storage, []).append(part)
    shared = [
        name
        for name, p in module.named_parameters()
        if id(p) in own
        or any(
            first < other_end and other_first < end
            for storage, (first, end) in _place(p)
            for other_first, other_end in taken.get(storage, ())
        )
    ]
    if shared:
        raise InputError(
            f"teacher: expected a model of its own, it shares {len(shared)} parameters with {side}, {shared[0]} first, "
            f"which would be frozen with it; load the teacher a second time, or give copy.deepcopy of it"
        )


def _place(p: Tensor) -> Iterator[tuple[Storage, Bytes]]:
    """Where a parameter lies in memory; nothing where that is nowhere (meta, empty) or not told (wrapped tensors)."""
    if p.numel() and not p.is_meta and p.layout == torch.strided and type(p.data) is Tensor:
        length = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        storage = (str(p.device), p.untyped_storage().data_ptr())
        yield storage, (p.data_ptr(), p.data_ptr() + length * p.element_size())
