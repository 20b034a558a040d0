"""How the package's ops are known to torch: opaque under torch.compile, and with little between a call and its kernel.

``torch.library.custom_op`` registers the same, but its way through pytrees, dataclasses and filled-in schemas takes
several times as long on the host, which is what a step of a small batch on a GPU waits for.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mta_fast.errors import DoubleBackwardError
from mta_fast.layout import has_capacities

LIBRARY = torch.library.Library("mta_fast", "FRAGMENT")
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # what runs an op, by its name
_WITH_CAPACITIES: dict[OpOverload, OpOverload] = {}  # what a step that is captured calls in place of an op


def operator(
    name: str, schema: str | None = None, *, reads_lengths: bool = False
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Make ``mta_fast::name`` of a function that changes none of its arguments.

    Args:
        schema: "(arguments) -> results"; None: read from the function's annotations.
        reads_lengths: whether what is launched follows from lengths on the host. The op is then tagged as one that no
            CUDA graph may hold, and ``fitting`` finds another of the same function for batches with capacities.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        made = torch.library.infer_schema(function, mutates_args=()) if schema is None else schema
        unsafe = (torch.Tag.cudagraph_unsafe,) if reads_lengths else ()
        op = _define(name, made, function, unsafe)
        if reads_lengths:
            _WITH_CAPACITIES[op] = _define(f"{name}_with_capacities", made, function)
        return op

    return define


def _define(name: str, schema: str, function: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> OpOverload:
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    op: OpOverload = getattr(torch.ops.mta_fast, name).default
    FUNCTIONS[name] = function
    untraced: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal untraced
        if untraced is None:  # not when it is defined: Dynamo takes long to import
            untraced = torch.compiler.disable(function)
        return untraced(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return op


def fitting(op: OpOverload, host: Tensor) -> OpOverload:
    """The op, or where the table on the CPU has capacities the one that a CUDA graph may hold."""
    return _WITH_CAPACITIES[op] if has_capacities(host) else op


def _both(op: OpOverload) -> list[OpOverload]:
    """The op, and the one for batches with capacities where it has such."""
    return [op, _WITH_CAPACITIES[op]] if op in _WITH_CAPACITIES else [op]


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what ``op`` returns where tensors have no data."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for each in _both(op):
            torch.library.register_fake(each, function, lib=LIBRARY)
        return function

    return register


def register_backward(
    op: OpOverload,
    function: str,
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Mapping[str, Tensor | None]],
) -> None:
    """Autograd of an op by the names of its arguments, whose order stands in its signature alone.

    Only tensors that are arguments by themselves can have gradients, those in lists have none. Of several results only
    the first is differentiable.

    Args:
        function: what is called to run the op, for the message of a second derivative.
        save: (ctx, inputs, outputs) keeps what the backward needs; the arguments are attributes of ``inputs``.
        backward: (ctx, gradient of the first output) -> {argument: gradient}; the other arguments receive none.
    """
    for each in _both(op):
        _register_backward(each, function, save, backward)


def _register_backward(
    op: OpOverload,
    function: str,
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Mapping[str, Tensor | None]],
) -> None:
    names = [argument.name for argument in op._schema.arguments]
    inputs = _named(names)
    place = {name: i for i, name in enumerate(names)}
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *given: Any) -> Any:
        *args, keyset = given  # last: ``ctx.needs_input_grad`` is in the order of the arguments
        ctx.set_materialize_grads(False)  # outputs without a gradient cost no tensor of zeros
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op.redispatch(keyset & below, *args)
        save(ctx, inputs(*args), outputs)
        if isinstance(outputs, tuple):
            ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    def run(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Any, ...]:
        _refuse_second(function)
        made: list[Tensor | None] = [None] * (1 + len(names))
        if grad is not None:
            for name, gradient in backward(ctx, grad).items():
                made[place[name]] = gradient
        return tuple(made)

    differentiable = _function(op, forward, run)

    def dispatch(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return differentiable.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    _impl(op, dispatch)


def register_list_backward(
    op: OpOverload,
    function: str,
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Sequence[Tensor]],
) -> None:
    """Autograd of an op in the tensors of its first argument, a list; of its results, a list too, only the first is
    differentiable. The arguments are as in ``register_backward``, but ``backward`` returns the list's gradients."""
    for each in _both(op):
        _register_list_backward(each, function, save, backward)


def _register_list_backward(
    op: OpOverload,
    function: str,
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Sequence[Tensor]],
) -> None:
    names = [argument.name for argument in op._schema.arguments]
    inputs = _named(names)
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, others, keyset = given
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op.redispatch(keyset & below, tensors, *others)
        save(ctx, inputs(tensors, *others), outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    def run(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Any, ...]:
        _refuse_second(function)
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return (*backward(ctx, grad), None, None)

    differentiable = _function(op, forward, run)

    def dispatch(keyset: Any, first: Any, *others: Any) -> Any:
        if torch.is_grad_enabled():
            for tensor in first:
                if tensor is not None and tensor.requires_grad:
                    return list(differentiable.apply(*first, others, keyset))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, first, *others)

    _impl(op, dispatch)


def _named(names: list[str]) -> Any:
    """A type whose attributes are an op's arguments."""
    return namedtuple("inputs", names)  # of names that are not known before


def _refuse_second(function: str) -> None:
    if torch.is_grad_enabled():  # the backward is itself differentiated: it would give zeros silently
        raise DoubleBackwardError(
            f"{function}: expected a first derivative, got create_graph=True; it has no second one"
        )


def _function(op: OpOverload, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{op._schema.name}_backward", (torch.autograd.Function,), members)


def _impl(op: OpOverload, dispatch: Callable[..., Any]) -> None:
    LIBRARY.impl(op._schema.name.split("::")[1], dispatch, "Autograd", with_keyset=True)
