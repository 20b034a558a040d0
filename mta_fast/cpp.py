"""C++ kernels of the ops for CPU tensors: the backend "cpp".

The functions are named and called as in ``mta_fast/reference.py``, which defines them; the kernels stand in ``csrc/``,
one file per op. They check what they are given before they touch a pointer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mta_fast import reference
from mta_fast.choices import check_choice
from mta_fast.contract import DIVERGENCES, METHODS, checked, gram_from
from mta_fast.errors import InputError
from mta_fast.layout import AlignmentGradient, DivergenceGradient, Head, Spans, refuse_capacities

_ops = torch.ops.mta_fast_cpp


def token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool
) -> Tensor:
    """``reference.token_importance``."""
    refuse_capacities(rows_host)
    importance: Tensor = _ops.token_importance(hidden, rows_host, seq_len, causal, count_padding)
    return importance


def span_weights(values: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.span_weights``."""
    refuse_capacities(spans.host)
    token, span, total = _ops.span_weights(
        values, spans.ranges, spans.span_splits, spans.covered, spans.covered_splits, spans.cover_splits
    )
    return token, span, total


def pool_spans(
    hidden: Tensor, weights: Tensor, spans: Spans, rows: Tensor, rows_host: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.pool_spans``."""
    refuse_capacities(spans.host)
    pooled, span_weight, norm = _ops.pool_spans(hidden, weights, spans.ranges)
    return pooled, span_weight, norm


def pool_spans_gradient(grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
    """``reference.pool_spans_gradient``."""
    gradient: Tensor = _ops.pool_spans_gradient(
        grad, span_weight, weights, spans.token_splits, spans.cover_spans, dtype
    )
    return gradient


def span_pairs(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
    span_splits: Tensor,
    host: Tensor,
    method: str,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.span_pairs``."""
    refuse_capacities(host)
    check_choice("method", method, METHODS)
    widths = [x.shape[1] if x.ndim == 2 and x.shape[1] else 1 for x in (student, teacher)]  # others the kernel refuses
    least = {"pairwise": -1, "gram": 0, "auto": gram_from(*widths)}[method]
    numerator, denominator, gradient = _ops.span_pairs(
        student, teacher, weights, student_norm, teacher_norm, span_splits, least, with_gradient
    )
    return numerator, denominator, gradient


def span_pairs_gradient(gradient: Tensor, grad: Tensor, span_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``reference.span_pairs_gradient``."""
    scaled: Tensor = _ops.span_pairs_gradient(gradient, grad, span_rows, dtype)
    return scaled


def hidden_alignment(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    matmul_dtype: torch.dtype,
    with_gradient: bool = False,
) -> tuple[Tensor, AlignmentGradient | None]:
    """``reference.hidden_alignment``."""
    numerator, *gradient = _ops.hidden_alignment(
        student, teacher, _int32(tokens), weights, proj_weight, proj_bias, matmul_dtype, with_gradient
    )
    return numerator, AlignmentGradient(*gradient) if with_gradient else None


def hidden_alignment_gradient(
    gradient: AlignmentGradient,
    tokens: Tensor,
    grad: Tensor,
    num_tokens: int,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.hidden_alignment_gradient``."""
    student, weight, bias = _ops.hidden_alignment_gradient(
        *gradient, _int32(tokens), grad, num_tokens, student_dtype, weight_dtype, bias_dtype
    )
    return student, weight, bias


def linear_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    alpha: Tensor,
    factors: Tensor,
    divergence_name: str,
    beta: float,
    detach: bool,
    student_head: Head,
    teacher_head: Head,
    vocabulary: int,
    matmul_dtype: torch.dtype,
    teacher_matmul_dtype: torch.dtype,
    with_gradient: bool = False,
    with_head: bool = True,
) -> tuple[Tensor, DivergenceGradient | None]:
    """``reference.linear_divergence``."""
    check_choice("divergence", divergence_name, DIVERGENCES)
    values, *gradient = _ops.linear_divergence(
        student,
        student_weight,
        student_bias,
        teacher,
        teacher_weight,
        teacher_bias,
        None if labels is None else _int32(labels),
        alpha,
        factors,
        DIVERGENCES.index(divergence_name),
        beta,
        detach,
        *student_head,
        *teacher_head,
        vocabulary,
        matmul_dtype,
        teacher_matmul_dtype,
        with_gradient,
        with_head,
    )
    return values, DivergenceGradient(*gradient) if with_gradient else None


linear_divergence_gradient = checked(reference.linear_divergence_gradient)  # products with one number


def _int32(tokens: Tensor) -> Tensor:
    """Indices as the kernels read them; a value that int32 can't hold is refused, not wrapped."""
    if (
        tokens.dtype != torch.int32
        and tokens.numel()
        and not -(2**31) <= int(tokens.min()) <= int(tokens.max()) < 2**31
    ):
        raise InputError(f"tokens: expected indices below 2^31, got {int(tokens.min())} to {int(tokens.max())}")
    return tokens.int()
