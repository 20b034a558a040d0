"""Hid: the weighted cosine distance of projected student states and teacher states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mta_fast import backends, contract
from mta_fast.choices import check_choice
from mta_fast.errors import InputError
from mta_fast.layout import AlignmentGradient, compute_dtype, kept_dtype, refuse_capacities
from mta_fast.ops._common import (
    REDUCTIONS,
    check_device,
    check_float,
    check_shape,
    check_spans,
    flat,
    product_dtype,
    quotient,
    without_scale,
)
from mta_fast.ops._operator import fake, operator, register_backward
from mta_fast.ops.pooling import normalize_weights
from mta_fast.reference import ridge_projection as ridge_projection
from mta_fast.reference import ridge_sums as ridge_sums
from mta_fast.spans.batch import SpanBatch


def hidden_alignment_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    token_weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *,
    spans: SpanBatch | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """L_Hid of one layer pair (arXiv 2605.01374; formula: ``mta_fast/reference.py``, part 5).

    numerator = sum_j g_j (1 - cos(P h^S_j + bias, h^T_j)), denominator = sum_j g_j, with g_j = n_j w_j.
    Differentiable in the student and the projection (once); teacher and weights receive no gradient.

    Args:
        student_hidden: [B, S, d_S] or [T, d_S]; teacher_hidden: the same tokens, width d_T.
        token_weights: [B, S] or [T] g_j, not negative. Tokens of weight 0 are not read.
        proj_weight: [d_T, d_S]; proj_bias: [d_T] or None. Student, teacher and projection may differ in dtype;
            each gradient returns in its input's. P h is multiplied in autocast's dtype where autocast is on.
        spans: which tokens to read (its covered ones; what others weigh is not read) and the rows of packed
            tokens; without capacities. Without it the tokens with weight are looked up: one synchronisation on a GPU.
        reduction: as in ``span_pair_loss``.
        backend: "auto" or a backend's name.

    Returns:
        A scalar, or two for "none": float64 if student, teacher or projection is, else float32.

    Raises:
        InputError: shape, dtype, device or option. DoubleBackwardError: a second derivative.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        check_float(name, hidden, (2, 3))
    leading = student_hidden.shape[:-1]
    check_shape("teacher_hidden", teacher_hidden, (*leading, teacher_hidden.shape[-1]), "the student's tokens")
    check_float("token_weights", token_weights, (1, 2))
    check_shape("token_weights", token_weights, leading, "student_hidden.shape[:-1]")
    check_device(student_hidden.device, teacher_hidden=teacher_hidden, token_weights=token_weights)
    if spans is not None:
        check_spans(spans, leading, student_hidden.device, "student_hidden")
        refuse_capacities(spans.host)  # what fills up the covered tokens would count
        tokens = spans.covered
    elif reduction == "sample" and len(leading) == 1:
        raise InputError('hidden_alignment_loss: expected spans= with packed tokens and reduction="sample", got none')
    else:
        tokens = token_weights.detach().reshape(-1).nonzero().flatten()
    if reduction == "sample":
        weights, denominator = _row_mean_weights(token_weights.detach(), tokens, spans, backend)
    else:
        if reduction == "mean":  # in which their scale cancels
            token_weights = without_scale("token_weights", token_weights)
        weights = token_weights.detach().reshape(-1)[tokens]
        denominator = weights.sum()
    numerator = hidden_alignment_numerator(
        flat(student_hidden), flat(teacher_hidden), tokens, weights, proj_weight, proj_bias, backend=backend
    )
    denominator = denominator.to(numerator.dtype)
    return (numerator, denominator) if reduction == "none" else quotient(numerator, denominator)


def _row_mean_weights(
    token_weights: Tensor, tokens: Tensor, spans: SpanBatch | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Weights [C] of the listed tokens divided by their row's sum, and the number of rows with a sum > 0."""
    if spans is None:
        total = token_weights.sum(1, keepdim=True)
        scaled = token_weights / torch.where(total == 0, 1.0, total)
        return scaled.reshape(-1)[tokens], (total > 0).sum()
    counts = spans.cover_splits.diff()
    per_span = torch.zeros_like(token_weights).reshape(-1)
    per_span = per_span.index_copy(0, tokens.long(), token_weights.reshape(-1)[tokens] / counts)
    made = normalize_weights(per_span.reshape(token_weights.shape), spans, backend=backend)
    return made.token.reshape(-1)[tokens] * counts, (made.row_total > 0).sum()


def hidden_alignment_numerator(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """sum_c g_c (1 - cos(P h^S + bias, h^T)) over the listed tokens.

    Args:
        student: [T, d_S]; teacher: [T, d_T]; tokens: [C] distinct int32 or int64 indices; weights: [C] g_c.
        proj_weight: [d_T, d_S]; proj_bias: [d_T] or None.
    """
    check_shape("proj_weight", proj_weight, (teacher.shape[-1], student.shape[-1]), "[d_T, d_S]")
    check_float("proj_weight", proj_weight, (2,))
    if proj_bias is not None:
        check_shape("proj_bias", proj_bias, (teacher.shape[-1],), "[d_T]")
        check_float("proj_bias", proj_bias, (1,))
    check_device(student.device, teacher=teacher, weights=weights, proj_weight=proj_weight, proj_bias=proj_bias)
    backends.check_name(backend)
    learnt = [t for t in (student, proj_weight, proj_bias) if t is not None]
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in learnt)
    numerator, *_ = _hidden_alignment(
        student,
        teacher.detach() if teacher.requires_grad else teacher,
        tokens,
        weights.detach() if weights.requires_grad else weights,
        proj_weight,
        proj_bias,
        product_dtype(student, proj_weight),
        with_gradient,
        backend,
    )
    return numerator


@operator("hidden_alignment")
def _hidden_alignment(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    matmul_dtype: torch.dtype,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numerator and its gradients: listed tokens [C, d_S], weight, bias; empty where there is none."""
    numerator, gradient = backends.run(
        "hidden_alignment",
        backend,
        [student, teacher, proj_weight],
        student,
        teacher,
        tokens,
        weights,
        proj_weight,
        proj_bias,
        matmul_dtype,
        with_gradient,
    )
    if gradient is None:
        return numerator, *(numerator.new_empty(0) for _ in range(3))
    return numerator, *gradient


@fake(_hidden_alignment)
def _(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    matmul_dtype: torch.dtype,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(student, teacher, proj_weight)
    nothing = student.new_empty(0, dtype=dtype)
    gradients = (nothing, nothing.clone(), nothing.clone())
    if with_gradient:
        bias = nothing if proj_bias is None else student.new_empty(proj_bias.shape, dtype=dtype)
        listed = student.new_empty(tokens.shape[0], student.shape[1], dtype=kept_dtype(student.dtype, dtype))
        gradients = (listed, student.new_empty(proj_weight.shape, dtype=dtype), bias)
    return student.new_empty((), dtype=dtype), *gradients


@operator("hidden_alignment_gradient")
def _hidden_alignment_gradient(
    gradient: Sequence[Tensor],
    tokens: Tensor,
    grad: Tensor,
    num_tokens: int,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_hidden_alignment`` left for the listed tokens, weight and bias -> [num_tokens, d_S], weight, bias."""
    made = AlignmentGradient(*contract.unpacked("gradient", gradient, AlignmentGradient._fields))
    result: tuple[Tensor, Tensor, Tensor] = backends.run(
        "hidden_alignment_gradient",
        backend,
        gradient,
        made,
        tokens,
        grad,
        num_tokens,
        student_dtype,
        weight_dtype,
        bias_dtype,
    )
    return result


@fake(_hidden_alignment_gradient)
def _(
    gradient: Sequence[Tensor],
    tokens: Tensor,
    grad: Tensor,
    num_tokens: int,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    contract.count("num_tokens", num_tokens)
    student, weight, bias = gradient
    return (
        student.new_empty(num_tokens, student.shape[1], dtype=student_dtype),
        weight.new_empty(weight.shape, dtype=weight_dtype),
        bias.new_empty(bias.shape, dtype=bias_dtype),
    )


def _save(ctx: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    student, matrix, bias = inputs.student, inputs.proj_weight, inputs.proj_bias
    ctx.num_tokens, ctx.has_bias = student.shape[0], bias is not None
    ctx.dtypes = student.dtype, matrix.dtype, matrix.dtype if bias is None else bias.dtype
    ctx.with_gradient, ctx.backend = inputs.with_gradient, inputs.backend
    _numerator, *gradient = outputs
    ctx.save_for_backward(inputs.tokens, *gradient)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    if not ctx.with_gradient:
        raise RuntimeError("hidden_alignment: expected with_gradient=True for a backward, got False")
    tokens, *gradient = ctx.saved_tensors
    student, weight, bias = _hidden_alignment_gradient(gradient, tokens, grad, ctx.num_tokens, *ctx.dtypes, ctx.backend)
    return {"student": student, "proj_weight": weight, "proj_bias": bias if ctx.has_bias else None}


register_backward(_hidden_alignment, "hidden_alignment_loss", _save, _backward)
