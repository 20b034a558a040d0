"""FDD through the LM head: how far two models' distributions are apart over several layers, from states and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mta_fast import contract, reference
from mta_fast.errors import InputError
from mta_fast.layout import DivergenceGradient, Head, compute_dtype, kept_dtype
from mta_fast.ops._common import check_device, check_float, check_shape, product_dtype
from mta_fast.ops._operator import fake, operator, register_backward
from mta_fast.ops.linear_divergence import all_ids, softcap_or_zero
from mta_fast.reference import trajectory as trajectory


def trajectory_divergence(
    student_states: Sequence[Tensor] | Tensor,
    teacher_states: Sequence[Tensor] | Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor,
    *,
    tau: float,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    softcaps: tuple[float | None, float | None] = (None, None),
    scales: tuple[float, float] = (1.0, 1.0),
    vocabulary: int | None = None,
) -> Tensor:
    """traj + der of FDD, summed over the tokens, without logits of all of them (``mta_fast/reference.py``, part 7).

    Per layer l of L: u_l = softcap(scale (W h_l + bias)) of either side. traj = mean_l KL(softmax(u^T_l / tau) ||
    softmax(u^S_l / tau)); der = mean_{l >= 1} [1 - cos(D^T_l, D^S_l)], D_l = logsoftmax(u_l) - logsoftmax(u_(l-1)),
    0 for one layer. Differentiable (once) in the student's states, head and bias; the teacher receives no gradient.
    It runs in PyTorch on every device.

    Args:
        student_states: L states before the head, [n, d_S] each, or [L, n, d_S]; teacher_states: likewise, d_T.
        student_weight, teacher_weight: [V_S, d_S], [V_T, d_T].
        tau: temperature of traj, after the softcaps.
        biases, softcaps, scales: (student's, teacher's): [V_S] and [V_T]; c of c tanh(z / c); factors of the logits.
        vocabulary: how many first ids of both heads; None: all, of heads of one size.

    Returns:
        A scalar: float64 if a state or a head is, else float32. W h is multiplied in autocast's dtype where autocast
        is on; logits are float32 in any case.

    Raises:
        InputError: shape, dtype, device or option. DoubleBackwardError: a second derivative.
    """
    student, teacher = _stacked("student_states", student_states), _stacked("teacher_states", teacher_states)
    check_shape("teacher_states", teacher, (*student.shape[:2], teacher.shape[2]), "layers and tokens of the student's")
    check_float("student_weight", student_weight, (2,))
    check_float("teacher_weight", teacher_weight, (2,))
    check_device(
        student.device, student_weight=student_weight, student_bias=biases[0],
        teacher_states=teacher, teacher_weight=teacher_weight, teacher_bias=biases[1],
    )  # fmt: skip
    ids = all_ids(student_weight, teacher_weight) if vocabulary is None else vocabulary
    caps = softcap_or_zero("softcaps[0]", softcaps[0]), softcap_or_zero("softcaps[1]", softcaps[1])
    learnt = [x for x in (student, student_weight, biases[0]) if x is not None]
    made: tuple[Tensor, ...] = _trajectory_divergence(
        student, student_weight, biases[0],
        *(None if x is None else x.detach() for x in (teacher, teacher_weight, biases[1])),
        float(tau), float(scales[0]), float(caps[0]), float(scales[1]), float(caps[1]), ids,
        product_dtype(student, student_weight), product_dtype(teacher, teacher_weight),
        torch.is_grad_enabled() and any(x.requires_grad for x in learnt), any(x.requires_grad for x in learnt[1:]),
    )  # fmt: skip
    return made[0]


def _stacked(name: str, states: Sequence[Tensor] | Tensor) -> Tensor:
    """[L, n, d]."""
    if not isinstance(states, Tensor):
        if not len(states):
            raise InputError(f"{name}: expected a state for each of 1 or more layers, got none")
        for layer, state in enumerate(states):
            check_float(f"{name}[{layer}]", state, (2,))
            check_shape(f"{name}[{layer}]", state, states[0].shape, "as the first layer's")
            check_device(states[0].device, **{f"{name}[{layer}]": state})
        states = torch.stack(list(states))
    check_float(name, states, (3,))
    return states


# --- the op ------------------------------------------------------------------------------------------------------


@operator("trajectory_divergence")
def _trajectory_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    vocabulary: int,
    matmul_dtype: torch.dtype,
    teacher_matmul_dtype: torch.dtype,
    with_gradient: bool,
    with_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and its gradients: states [L, n, d_S], head, bias; empty where there is none."""
    arguments = (
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, tau,
        Head(student_scale, student_softcap), Head(teacher_scale, teacher_softcap), vocabulary,
        matmul_dtype, teacher_matmul_dtype,
    )  # fmt: skip
    contract.check_given("trajectory_divergence", arguments)
    contract.trajectory_divergence(*arguments)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        total, gradient = reference.trajectory_divergence(*arguments, with_gradient, with_head)
    return total, *([total.new_empty(0) for _ in range(3)] if gradient is None else gradient)


@fake(_trajectory_divergence)
def _(student: Tensor, student_weight: Tensor, student_bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(student, student_weight, *arguments[:2])
    nothing = student.new_empty(0, dtype=dtype)
    gradients = (nothing, nothing.clone(), nothing.clone())
    *_, with_gradient, with_head = arguments
    if with_gradient:
        rows = student_weight.shape[0] if with_head else 0
        states = student.new_empty(student.shape, dtype=kept_dtype(student.dtype, dtype))
        of_bias = student.new_empty(0 if student_bias is None else rows, dtype=dtype)
        gradients = (states, student.new_empty(rows, student_weight.shape[1], dtype=dtype), of_bias)
    return student.new_empty((), dtype=dtype), *gradients


_LEARNT = ("student", "student_weight", "student_bias")


def _save(ctx: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    weight, bias = inputs.student_weight, inputs.student_bias
    ctx.learnt = (True, inputs.with_head, inputs.with_head and bias is not None)
    ctx.dtypes = inputs.student.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.with_gradient = inputs.with_gradient
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    if not ctx.with_gradient:
        raise RuntimeError("trajectory_divergence: expected with_gradient=True for a backward, got False")
    gradient = DivergenceGradient(*ctx.saved_tensors)
    named = zip(_LEARNT, reference.linear_divergence_gradient(gradient, grad, *ctx.dtypes), ctx.learnt, strict=True)
    return {name: made if learns else None for name, made, learns in named}


register_backward(_trajectory_divergence, "trajectory_divergence", _save, _backward)
