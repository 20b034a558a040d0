"""Base losses through the LM head: the divergence of two models' distributions, from hidden states and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mta_fast import backends, contract
from mta_fast.choices import check_choice
from mta_fast.contract import DIVERGENCES
from mta_fast.errors import InputError
from mta_fast.layout import DivergenceGradient, Head, compute_dtype, kept_dtype
from mta_fast.ops._common import check_device, check_float, check_shape, product_dtype
from mta_fast.ops._operator import fake, operator, register_backward
from mta_fast.reference import divergence as divergence
from mta_fast.reference import head_logits as head_logits
from mta_fast.reference import processed as processed

REDUCTIONS = ("mean", "sum", "none")
Vocabulary = int | tuple[Tensor, Tensor]


def linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "srkl",
    alpha: float | Tensor = 0.1,
    beta: float = 0.5,
    detach_mixture: bool = False,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    vocabulary: Vocabulary | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """A base loss without logits: nothing of size [M, V] is kept (formulas: ``mta_fast/reference.py``, part 6).

    s = softcap(scale (W h + bias)) / temperature on either side, q = softmax of the student's, p of the teacher's.
    Differentiable (once) in the student's states, head and bias; the teacher, alpha and weights receive no gradient.

    Args:
        student_hidden: [M, d_S] states before the head, at the counted positions only; student_weight: [V_S, d_S].
        teacher_hidden, teacher_weight: [M, d_T] and [V_T, d_T]; None for "cross_entropy", which reads no teacher.
        divergence: forward_kl, reverse_kl, skl, srkl, jsd or cross_entropy.
        alpha: of skl and srkl, share of the other side in the mixture, between 0 and 1: a number or [M].
        beta: of jsd, share of the teacher, between 0 and 1.
        detach_mixture: of srkl, no gradient through the student's part of the mixture.
        temperature: divides both logits, after the softcaps.
        student_bias, teacher_bias: [V_S], [V_T]; softcaps: c of c tanh(z / c); scales: factors of the logits.
        vocabulary: how many first ids of both heads, or two index tensors [V] of rows of each; the distributions are
            normalised over them alone. None: all, of heads of one size.
        labels: [M] ids (of ``vocabulary``), for cross_entropy.
        weights: [M] w_i; None: 1.
        reduction: "mean": sum_i w_i l_i / M (0 for M = 0); "sum": without / M; "none": [M] w_i l_i, whose backward
            computes the logits a second time.
        backend: "auto" or a backend's name.

    Returns:
        A scalar, or [M]: float64 if a state or a head is, else float32. P h is multiplied in autocast's dtype where
        autocast is on; logits are float32 in any case.

    Raises:
        InputError: shape, dtype, device or option; skl with a detached mixture where a gradient is wanted, as it has
            none. DoubleBackwardError: a second derivative.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("divergence", divergence, DIVERGENCES)
    check_float("student_hidden", student_hidden, (2,))
    check_float("student_weight", student_weight, (2,))
    device, size = student_hidden.device, student_hidden.shape[0]
    given = {"student_weight": student_weight, "student_bias": student_bias}
    given |= {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    check_device(device, **given, labels=labels, weights=weights)
    learnt = [x for x in (student_hidden, student_weight, student_bias) if x is not None]
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in learnt)
    with_head = any(x.requires_grad for x in learnt[1:])
    if with_gradient:
        check_detached(divergence, detach_mixture)
    if not 0 < beta < 1:
        raise InputError(f"beta: expected a number between 0 and 1, got {beta}")
    if not temperature > 0:
        raise InputError(f"temperature: expected a number > 0, got {temperature}")
    heads = [
        Head(scale, softcap_or_zero(name, softcap), temperature)
        for name, scale, softcap in (
            ("student_softcap", student_scale, student_softcap),
            ("teacher_softcap", teacher_scale, teacher_softcap),
        )
    ]
    if divergence == "cross_entropy":
        if labels is None:
            raise InputError("labels: expected [M] ids with cross_entropy, got none")
        teacher_hidden = teacher_weight = teacher_bias = None
    elif teacher_hidden is None or teacher_weight is None:
        raise InputError(f"teacher_hidden, teacher_weight: expected both with {divergence}, got none")
    else:
        labels = None
        check_float("teacher_hidden", teacher_hidden, (2,))
        check_shape(
            "teacher_hidden", teacher_hidden, (size, teacher_hidden.shape[1]), "a row for each of the student's"
        )
        check_float("teacher_weight", teacher_weight, (2,))
    if isinstance(vocabulary, tuple):
        student_weight, student_bias = _chosen("vocabulary[0]", vocabulary[0], student_weight, student_bias)
        if teacher_weight is not None:
            teacher_weight, teacher_bias = _chosen("vocabulary[1]", vocabulary[1], teacher_weight, teacher_bias)
        vocabulary = None
    if vocabulary is None:
        vocabulary = all_ids(student_weight, teacher_weight)
    contract.check_head("student", student_hidden, student_weight, student_bias, student_hidden, vocabulary)
    matmul_dtype = teacher_matmul_dtype = product_dtype(student_hidden, student_weight)
    if teacher_hidden is not None and teacher_weight is not None:
        contract.check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, student_hidden, vocabulary)
        teacher_matmul_dtype = product_dtype(teacher_hidden, teacher_weight)
    raw = (
        student_hidden, student_weight, student_bias,
        *(None if x is None else x.detach() for x in (teacher_hidden, teacher_weight, teacher_bias)),
        labels, _alpha(alpha, student_hidden), _factors(weights, student_hidden),
        divergence, beta, detach_mixture, *map(float, heads[0]), *map(float, heads[1]), vocabulary,
        matmul_dtype, teacher_matmul_dtype,
    )  # fmt: skip
    backends.check_name(backend)
    if reduction == "none":
        values: Tensor = _linear_divergence_rows(*raw, backend)
        return values
    total, *_ = _linear_divergence(*raw, with_gradient, with_head, backend)
    return total / max(size, 1) if reduction == "mean" else total


def all_ids(student_weight: Tensor, teacher_weight: Tensor | None) -> int:
    """How many ids heads of one size have."""
    ids = student_weight.shape[0]
    if teacher_weight is not None and teacher_weight.shape[0] != ids:
        raise InputError(
            f"vocabulary: expected the number of common ids, as the heads have {ids} and {teacher_weight.shape[0]}, "
            f"got none"
        )
    return ids


def softcap_or_zero(name: str, softcap: float | None) -> float:
    """A softcap as the backends take it."""
    if softcap is not None and not softcap > 0:
        raise InputError(f"{name}: expected a number > 0 or None, got {softcap}")
    return 0.0 if softcap is None else softcap


def check_detached(divergence: str, detach_mixture: bool) -> None:
    """Refuse to learn from SKL with a detached mixture, which leaves it no gradient."""
    if divergence == "skl" and detach_mixture:
        raise InputError(
            "detach_mixture: expected False with skl, got True: detached it has no gradient at all; take srkl"
        )


def _alpha(alpha: float | Tensor, student: Tensor) -> Tensor:
    """[M]; a tensor's values are the caller's to keep within 0 and 1, as reading them would synchronise."""
    if isinstance(alpha, Tensor):
        check_float("alpha", alpha, (1,))
        check_shape("alpha", alpha, (student.shape[0],), "one for each position")
        check_device(student.device, alpha=alpha)
        return alpha.detach()
    if not 0 < alpha < 1:
        raise InputError(f"alpha: expected a number between 0 and 1, got {alpha}")
    return student.new_full((student.shape[0],), alpha, dtype=compute_dtype(student))


def _factors(weights: Tensor | None, student: Tensor) -> Tensor:
    if weights is None:
        return student.new_ones(student.shape[0], dtype=compute_dtype(student))
    check_float("weights", weights, (1,))
    check_shape("weights", weights, (student.shape[0],), "one for each position")
    return weights.detach()


def _chosen(name: str, ids: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{name}: expected [V] of int32 or int64, got shape {tuple(ids.shape)} of {ids.dtype}")
    check_device(weight.device, **{name: ids})
    return weight.index_select(0, ids), None if bias is None else bias.index_select(0, ids)


# --- the ops -----------------------------------------------------------------------------------------------------


_LEARNT = ("student", "student_weight", "student_bias")
_TENSORS = (*_LEARNT, "teacher", "teacher_weight", "teacher_bias", "labels", "alpha", "factors")
_ARGUMENTS = """
    Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? teacher, Tensor? teacher_weight,
    Tensor? teacher_bias, Tensor? labels, Tensor alpha, Tensor factors, str divergence, float beta, bool detach,
    float student_scale, float student_softcap, float student_temperature, float teacher_scale, float teacher_softcap,
    float teacher_temperature, SymInt vocabulary, ScalarType matmul_dtype, ScalarType teacher_matmul_dtype"""


@operator(
    "linear_divergence",
    f"({_ARGUMENTS}, bool with_gradient, bool with_head, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_divergence(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_i factors_i l_i, and its gradients: states [M, d_S], head, bias; empty where there is none."""
    *raw, with_gradient, with_head, backend = arguments
    values, gradient = _run(raw, backend, with_gradient, with_head)
    total = (values.double() * raw[_TENSORS.index("factors")].double()).sum().to(values.dtype)
    if gradient is None:
        return total, *(total.new_empty(0) for _ in range(3))
    return total, *gradient


def _run(raw: Sequence[Any], backend: str, *wanted: bool) -> tuple[Tensor, DivergenceGradient | None]:
    tensors, options = raw[: len(_TENSORS)], raw[len(_TENSORS) :]
    name, beta, detach, *numbers, vocabulary, matmul_dtype, teacher_matmul_dtype = options
    heads = Head(*numbers[:3]), Head(*numbers[3:])
    made: tuple[Tensor, DivergenceGradient | None] = backends.run(
        "linear_divergence",
        backend,
        _states_and_heads(raw),
        *(*tensors, name, beta, detach, *heads, vocabulary, matmul_dtype, teacher_matmul_dtype, *wanted),
    )
    return made


def _states_and_heads(raw: Sequence[Any]) -> list[Tensor]:
    return [raw[i] for i in (0, 1, 3, 4) if raw[i] is not None]


@fake(_linear_divergence)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    student, weight, bias = arguments[: len(_LEARNT)]
    dtype = compute_dtype(*_states_and_heads(arguments))
    nothing = student.new_empty(0, dtype=dtype)
    gradients = (nothing, nothing.clone(), nothing.clone())
    *_, with_gradient, with_head, _ = arguments
    if with_gradient:
        rows = weight.shape[0] if with_head else 0
        of_bias = student.new_empty(0 if bias is None else rows, dtype=dtype)
        states = student.new_empty(student.shape, dtype=kept_dtype(student.dtype, dtype))
        gradients = (states, student.new_empty(rows, weight.shape[1], dtype=dtype), of_bias)
    return student.new_empty((), dtype=dtype), *gradients


@operator("linear_divergence_gradient")
def _linear_divergence_gradient(
    gradient: Sequence[Tensor],
    grad: Tensor,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_linear_divergence`` left, times ``grad``."""
    made = DivergenceGradient(*contract.unpacked("gradient", gradient, DivergenceGradient._fields))
    result: tuple[Tensor, Tensor, Tensor] = backends.run(
        "linear_divergence_gradient", backend, gradient, made, grad, student_dtype, weight_dtype, bias_dtype
    )
    return result


@fake(_linear_divergence_gradient)
def _(
    gradient: Sequence[Tensor],
    grad: Tensor,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    dtypes = (student_dtype, weight_dtype, bias_dtype)
    return tuple(made.new_empty(made.shape, dtype=dtype) for made, dtype in zip(gradient, dtypes, strict=True))


def _save(ctx: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    weight, bias = inputs.student_weight, inputs.student_bias
    ctx.learnt = (True, inputs.with_head, inputs.with_head and bias is not None)
    ctx.dtypes = inputs.student.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.with_gradient, ctx.backend = inputs.with_gradient, inputs.backend
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    if not ctx.with_gradient:
        raise RuntimeError("linear_divergence: expected with_gradient=True for a backward, got False")
    made = _linear_divergence_gradient(list(ctx.saved_tensors), grad, *ctx.dtypes, ctx.backend)
    named = zip(_LEARNT, made, ctx.learnt, strict=True)
    return {name: gradient if learns else None for name, gradient, learns in named}


register_backward(_linear_divergence, "linear_divergence_loss", _save, _backward)


@operator("linear_divergence_rows", f"({_ARGUMENTS}, str backend) -> Tensor")
def _linear_divergence_rows(*arguments: Any) -> Tensor:
    """[M] factors_i l_i; the backward is ``_linear_divergence`` with the upstream gradient among the factors."""
    *raw, backend = arguments
    values, _ = _run(raw, backend, False)
    return values * raw[_TENSORS.index("factors")].to(values.dtype)


@fake(_linear_divergence_rows)
def _(*arguments: Any) -> Tensor:
    made: Tensor = arguments[0].new_empty(arguments[0].shape[0], dtype=compute_dtype(*_states_and_heads(arguments)))
    return made


def _save_rows(ctx: Any, inputs: Any, outputs: Any) -> None:
    named = inputs._asdict()
    ctx.save_for_backward(*(named[name] for name in _TENSORS))
    ctx.others = [value for name, value in named.items() if name not in _TENSORS]


def _backward_rows(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    *tensors, factors = ctx.saved_tensors
    *options, backend = ctx.others
    learns = ctx.needs_input_grad[: len(_LEARNT)]
    _, *made = _linear_divergence(*tensors, factors.to(grad.dtype) * grad, *options, True, any(learns[1:]), backend)
    named = zip(_LEARNT, tensors[: len(_LEARNT)], made, learns, strict=True)
    return {name: gradient.to(leaf.dtype) if wanted else None for name, leaf, gradient, wanted in named}


register_backward(_linear_divergence_rows, "linear_divergence_loss", _save_rows, _backward_rows)
