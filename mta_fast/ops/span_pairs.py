"""DSA: the weighted squared difference of all span-pair cosine distances, student against teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mta_fast import backends
from mta_fast.choices import check_choice
from mta_fast.contract import METHODS, unpacked
from mta_fast.errors import InputError
from mta_fast.layout import compute_dtype
from mta_fast.ops._common import (
    REDUCTIONS,
    check_device,
    check_float,
    check_shape,
    quotient,
    without_scale,
)
from mta_fast.ops._operator import fake, fitting, operator, register_backward
from mta_fast.reference import reduce_rows, row_norms
from mta_fast.reference import span_distances as span_distances
from mta_fast.spans.batch import SpanBatch


def span_pair_loss(
    student_spans: Tensor,
    teacher_spans: Tensor,
    span_weights: Tensor,
    spans: SpanBatch,
    *,
    reduction: str = "mean",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """L_DSA of one layer pair (arXiv 2605.01374; formula: ``mta_fast/reference.py``, part 4).

    numerator = sum over rows and pairs u != v of W_u W_v (cos(v^S_u, v^S_v) - cos(v^T_u, v^T_v))^2;
    denominator = sum of W_u W_v over the same pairs. Pairs never cross rows; a cosine with a zero vector is 0.
    Differentiable in ``student_spans`` (once); teacher and weights receive no gradient.

    Args:
        student_spans: [N, d_S] pooled spans (``pool_spans``); teacher_spans: [N, d_T].
        span_weights: [N] salience W_u, not negative.
        spans: which row each span is of. With two tokenizers either SpanBatch of the pair serves.
        reduction: "mean": numerator / denominator over the batch; "sample": mean over the rows with a
            denominator > 0 of the row's quotient; "none": (numerator, denominator). 0 where nothing counts.
        method: "pairwise" (N^2 d); "gram" (the centred Gram form, N d^2, no N x N matrix); "auto": per row the
            one with fewer products.
        backend: "auto" or a backend's name.

    Returns:
        A scalar, or two for "none": float64 if student or teacher is, else float32.

    Raises:
        InputError: shape, dtype, device or option. DoubleBackwardError: a second derivative.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction != "none":  # where their scale cancels
        span_weights = without_scale("span_weights", span_weights)
    numerator, denominator = span_pair_terms(
        student_spans, teacher_spans, span_weights, spans, reduction=reduction, method=method, backend=backend
    )
    return (numerator, denominator) if reduction == "none" else quotient(numerator, denominator)


def span_pair_terms(
    student_spans: Tensor,
    teacher_spans: Tensor,
    span_weights: Tensor,
    spans: SpanBatch,
    *,
    reduction: str,
    method: str = "auto",
    backend: str = "auto",
    norms: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The (numerator, denominator) whose quotient is ``span_pair_loss``; for "sample" (sum of quotients, rows).

    Args:
        norms: [N] lengths of the student's and the teacher's spans where pooling has left them; else they are taken.
    """
    for name, tensor in (("student_spans", student_spans), ("teacher_spans", teacher_spans)):
        check_float(name, tensor, (2,))
        if tensor.shape[0] != spans.num_spans:
            raise InputError(f"{name}: expected {spans.num_spans} spans as in `spans`, got shape {tuple(tensor.shape)}")
    check_float("span_weights", span_weights, (1,))
    check_shape("span_weights", span_weights, (spans.num_spans,), "one weight a span")
    check_device(student_spans.device, teacher_spans=teacher_spans, span_weights=span_weights, spans=spans.span_splits)
    check_choice("method", method, METHODS)
    backends.check_name(backend)
    if norms is None:
        dtype = compute_dtype(student_spans, teacher_spans)
        norms = row_norms(student_spans.detach().to(dtype)), row_norms(teacher_spans.detach().to(dtype))
    index = [spans.span_rows, spans.span_splits, spans.host]
    with_gradient = torch.is_grad_enabled() and student_spans.requires_grad
    numerators, denominators, _ = fitting(_span_pairs, spans.host)(
        student_spans, teacher_spans.detach(), span_weights.detach(), norms, index, method, with_gradient, backend
    )
    return reduce_rows(numerators, denominators.detach(), reduction)


@operator("span_pairs", reads_lengths=True)
def _span_pairs(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    norms: Sequence[Tensor],
    index: Sequence[Tensor],
    method: str,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """index: span_rows, span_splits, host -> num [B], den [B], gradient of the summed num ([0, d_S] without)."""
    _span_rows, span_splits, host = unpacked("index", index, ("span_rows", "span_splits", "host"))
    norms = unpacked("norms", norms, ("student_norm", "teacher_norm"))
    result: tuple[Tensor, Tensor, Tensor] = backends.run(
        "span_pairs",
        backend,
        [student, teacher, weights],
        student,
        teacher,
        weights,
        *norms,
        span_splits,
        host,
        method,
        with_gradient,
    )
    return result


@fake(_span_pairs)
def _(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    norms: Sequence[Tensor],
    index: Sequence[Tensor],
    method: str,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = compute_dtype(student, teacher), index[1].shape[0] - 1
    gradient = student.new_empty(student.shape[0] if with_gradient else 0, student.shape[1], dtype=dtype)
    return student.new_empty(rows, dtype=dtype), student.new_empty(rows, dtype=dtype), gradient


@operator("span_pairs_gradient")
def _span_pairs_gradient(gradient: Tensor, grad: Tensor, span_rows: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    result: Tensor = backends.run("span_pairs_gradient", backend, [gradient], gradient, grad, span_rows, dtype)
    return result


@fake(_span_pairs_gradient)
def _(gradient: Tensor, grad: Tensor, span_rows: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _save(ctx: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.with_gradient, ctx.backend = inputs.student.dtype, inputs.with_gradient, inputs.backend
    _numerators, _denominators, gradient = outputs
    span_rows, _span_splits, _host = inputs.index
    ctx.save_for_backward(gradient, span_rows)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    if not ctx.with_gradient:
        raise RuntimeError("span_pairs: expected with_gradient=True for a backward, got False")
    gradient, span_rows = ctx.saved_tensors
    return {"student": _span_pairs_gradient(gradient, grad, span_rows, ctx.dtype, ctx.backend)}


register_backward(_span_pairs, "span_pair_loss", _save, _backward)
