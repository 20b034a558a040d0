"""Base methods: what a distillation step minimises beside MTA, alone and in the trainer.

A method's loss is a sum of ratios, ``sums(student, teacher, batch) / counts(batch)``. The counts need the batch alone,
so that the trainer knows those of a whole optimisation step before the first of its micro-batches is run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from mta_fast.config import LayerPairs, nearest
from mta_fast.distill.losses import BASE_LOSSES, SEQUENCE_LEVEL_LOSSES, base_loss, check_share, counted_positions
from mta_fast.errors import InputError

SKEWED_LOSSES = ("srkl", "skl")
Batch = Mapping[str, Any]


class ModelOutput(Protocol):
    """What a method reads of a model: an output of transformers, or anything with these two.

    Attributes:
        logits: [B, S, V]; None for a teacher whose distribution is not read.
        hidden_states: by layer, [B, S, d] each: a tuple of all, or {layer: state}.
    """

    @property
    def logits(self) -> Any: ...

    @property
    def hidden_states(self) -> Any: ...


class BaseMethod:
    """A base method, called as ``method(student_out, teacher_out, batch)``.

    Attributes:
        reads_teacher: whether the teacher's logits are read; where not, the two may have different vocabularies.
        student_layers, teacher_layers: the hidden states that are read.
        progress: how much of the training is done, 0 to 1, for methods with a schedule; the trainer sets it.
        reduce: sums a tensor over the ranks, for methods with a running average; the trainer sets it.
    """

    reads_teacher = True
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.progress = 0.0
        self.reduce: Callable[[Tensor], Tensor] = lambda own: own

    @property
    def name(self) -> str:
        """What it is called in an error."""
        return type(self).__name__

    def attach(self, student: nn.Module, teacher: nn.Module, layer_pairs: LayerPairs | None = None) -> BaseMethod:
        """Take what the method needs of the models; ``layer_pairs`` are MTA's, for a method that was given none."""
        return self

    def counts(self, batch: Batch) -> Tensor:
        """[K] what each sum is divided by."""
        raise NotImplementedError

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[K] sums over the batch, with a graph."""
        raise NotImplementedError

    def __call__(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """The loss of one batch.

        Args:
            student, teacher: their outputs on the batch's rows.
            batch: from the method's collator; "labels" [B, S] are -100 where a token does not count.

        Returns:
            A scalar; 0 with a graph where nothing counts.
        """
        return (self.sums(student, teacher, batch) / self.counts(batch).clamp(min=1)).sum()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of ``state_dict``."""


class TokenMethod(BaseMethod):
    """A loss of ``losses.BASE_LOSSES``: the mean over the counted positions."""

    def __init__(self, loss: str = "srkl", **options: float | bool) -> None:
        super().__init__()
        self._name, self._loss = loss, base_loss(loss, **options)
        for option in ("alpha", "beta"):
            if option in options:
                check_share(option, float(options[option]))
        self.reads_teacher = loss not in SEQUENCE_LEVEL_LOSSES

    @property
    def name(self) -> str:
        """That of the loss."""
        return self._name

    def counts(self, batch: Batch) -> Tensor:
        """[1] counted positions."""
        return counted_positions(batch["labels"]).sum()[None]

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[1] the loss, summed over the counted positions."""
        return self._loss(student.logits, teacher.logits, batch["labels"], reduction="sum")[None]


def skewed_method(loss: str, alpha: float, detach_mixture: bool) -> TokenMethod:
    """SRKL or SKL, as the token loss of another method.

    Raises:
        InputError: another loss, or an alpha outside 0 to 1.
    """
    if loss not in SKEWED_LOSSES:
        raise InputError(
            f"loss: expected one of {', '.join(SKEWED_LOSSES)}, got {loss!r}{nearest(loss, SKEWED_LOSSES)}"
        )
    return TokenMethod(loss, alpha=alpha, detach_mixture=detach_mixture)


def base_method(name: str, **options: Any) -> BaseMethod:
    """A base method by its name: distillm, distillm2, fdd, a loss of ``losses.BASE_LOSSES``, or module:Class.

    Raises:
        InputError: an unknown name, or an option that the method does not have.
    """
    if name in BASE_LOSSES:
        return TokenMethod(name, **options)
    methods = _methods()
    if name not in methods and ":" not in name:
        known = [*BASE_LOSSES, *methods]
        raise InputError(
            f"base loss: expected one of {', '.join(known)}, or module:Class of one's own, got {name!r}"
            f"{nearest(name, known)}"
        )
    method = methods[name] if name in methods else import_name("base loss", name)
    described = inspect.signature(method).parameters
    parameters = list(described)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in described.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise InputError(
                f"base loss {name}: expected options among {', '.join(parameters) or 'none'}, got {option!r}"
                f"{nearest(option, parameters)}"
            )
    made = method(**options)
    if not isinstance(made, BaseMethod):
        raise InputError(f"base loss {name}: expected a BaseMethod, got {type(made).__name__}")
    return made


def import_name(what: str, name: str) -> Any:
    """The object that "module:name" names; ``what`` it is for, in an error.

    Raises:
        InputError: no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{what}: expected module:name of something that can be imported, got {name!r} ({error}); is its folder on "
            f"PYTHONPATH?"
        ) from None


def _methods() -> dict[str, Callable[..., BaseMethod]]:
    from mta_fast.distill.distillm import DistiLLM
    from mta_fast.distill.distillm2 import DistiLLM2
    from mta_fast.distill.fdd import FDD

    return {"distillm": DistiLLM, "distillm2": DistiLLM2, "fdd": FDD}
