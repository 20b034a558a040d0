"""Base methods by their names. Only here is a method told by its name; everything else asks what it needs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from mta_fast.config import nearest
from mta_fast.distill.methods.base import BaseMethod, NoBaseLoss
from mta_fast.distill.methods.distillm import DistiLLM
from mta_fast.distill.methods.distillm2 import DistiLLM2
from mta_fast.distill.methods.fdd import FDD
from mta_fast.distill.methods.losses import BASE_LOSSES, TokenMethod
from mta_fast.errors import InputError

METHODS: dict[str, Callable[..., BaseMethod]] = {
    **{loss: functools.partial(TokenMethod, loss) for loss in BASE_LOSSES},
    "distillm": DistiLLM,
    "distillm2": DistiLLM2,
    "fdd": FDD,
    "none": NoBaseLoss,
}


def base_method(name: str, **options: Any) -> BaseMethod:
    """A base method by its name.

    Args:
        name: a loss of ``losses.BASE_LOSSES``, distillm, distillm2, fdd, none, or module:Class.
        options: of the loss or the class.

    Raises:
        InputError: an unknown name, or an option that the method does not have.
    """
    method = _maker(name)
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


def method_type(name: str) -> type[BaseMethod]:
    """The class of a base method, for what holds whatever its options are; BaseMethod where only a call would tell it.

    Raises:
        InputError: an unknown name.
    """
    method: Any = _maker(name)
    method = getattr(method, "func", method)
    return method if isinstance(method, type) and issubclass(method, BaseMethod) else BaseMethod


def _maker(name: str) -> Callable[..., BaseMethod]:
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        maker: Callable[..., BaseMethod] = import_name("base loss", name)
        return maker
    raise InputError(
        f"base loss: expected one of {', '.join(METHODS)}, or module:Class of one's own, got {name!r}"
        f"{nearest(name, METHODS)}"
    )


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
