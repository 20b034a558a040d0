"""Base losses through the LM head: the vendor's GEMMs chunk by chunk, and one fused kernel a chunk between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast.contract import DIVERGENCES, checked
from mta_fast.kernels._device import load
from mta_fast.kernels._gemm import ALIGNED, product
from mta_fast.kernels._launch import launch, numerics, writable
from mta_fast.kernels.hidden_alignment import add_gradients
from mta_fast.layout import DivergenceGradient, Head, compute_dtype, kept_dtype
from mta_fast.reference import empty_head_gradient

CHUNK_LOGITS = 1 << 26  # of each side at a time: 268 MB of float32
FORWARD_KL, REVERSE_KL, SKL, SRKL, JSD, CROSS_ENTROPY = (tl.constexpr(i) for i in range(len(DIVERGENCES)))
LOWEST = tl.constexpr(-1e38)  # below every logit; not infinite, as differences are taken


@triton.jit
def _tanh(x):
    """tanh of the softcap; near 0 as a series, where 1 - exp loses digits."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(
    p, p_bias, o_v, m_v, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr
):
    """``reference.head_logits`` of a block of products, and d logit / d product."""
    z = load(p + o_v, m_v, ACC, True)
    if p_bias is not None:
        z += load(p_bias + o_v, m_v, ACC, True)
    z *= SCALE
    slope = tl.full(z.shape, SCALE / TEMPERATURE, dtype=ACC)
    if SOFTCAP > 0:
        t = _tanh(z / SOFTCAP)
        z = t * SOFTCAP
        slope *= 1 - t * t
    return z / TEMPERATURE, slope


@triton.jit
def _log_sum(
    p,
    p_bias,
    width,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """Log-sum-exp of a row's logits, online."""
    b_top = tl.full((BLOCK_V,), LOWEST, dtype=ACC)
    b_sum = tl.zeros((BLOCK_V,), dtype=ACC)
    for start in range(0, width, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(p, p_bias, o_v, o_v < width, SCALE, SOFTCAP, TEMPERATURE, ACC)
        z = tl.where(o_v < width, z, float("-inf"))
        b_new = tl.maximum(b_top, z)
        b_sum = b_sum * tl.exp(b_top - b_new) + tl.exp(z - b_new)
        b_top = b_new
    top = tl.max(b_top, 0)
    return top + tl.log(tl.sum(b_sum * tl.exp(b_top - top), 0))


@triton.jit
def _mixed(x, y):
    """log(exp x + exp y), and the shares of the two in the sum."""
    e = tl.exp(-tl.abs(x - y))
    larger = 1 / (1 + e)
    smaller = e * larger
    return tl.maximum(x, y) + tl.log(1 + e), tl.where(x >= y, larger, smaller), tl.where(x >= y, smaller, larger)


@triton.jit
def _terms(log_p, log_q, alpha, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr, BETA: tl.constexpr):
    """Of each id: its part of the value, q g and q; ``reference.divergence`` and ``logit_gradient``."""
    q = tl.exp(log_q)
    if DIVERGENCE == FORWARD_KL:
        p = tl.exp(log_p)
        return p * (log_p - log_q), -p, q
    elif DIVERGENCE == REVERSE_KL:
        value = q * (log_q - log_p)
        return value, value, q
    elif DIVERGENCE == SKL:
        p = tl.exp(log_p)
        mixture, _, of_q = _mixed(log_p + tl.log(alpha), log_q + tl.log(1 - alpha))
        return p * (log_p - mixture), (0.0 if DETACH else -1.0) * p * of_q, q
    elif DIVERGENCE == SRKL:
        mixture, of_q, _ = _mixed(log_q + tl.log(alpha), log_p + tl.log(1 - alpha))
        value = q * (log_q - mixture)
        return value, value - (0.0 if DETACH else 1.0) * q * of_q, q
    else:
        share = tl.zeros_like(log_q) + BETA
        mixture, _, _ = _mixed(log_p + tl.log(share), log_q + tl.log(1 - share))
        weighted = (1 - BETA) * q * (log_q - mixture)
        return BETA * tl.exp(log_p) * (log_p - mixture) + weighted, weighted, q


@triton.jit
def _diverge(
    student,  # [chunk, V] products of the student's head
    teacher,  # [chunk, V], or None
    student_bias,
    teacher_bias,
    labels,
    alphas,
    factors,
    values,
    out,  # [chunk, V] the gradient of the products; may be ``student``
    width,
    stride_m,  # from row to row, of all three
    DIVERGENCE: tl.constexpr,
    DETACH: tl.constexpr,
    BETA: tl.constexpr,
    S_SCALE: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    S_TEMPERATURE: tl.constexpr,
    T_SCALE: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    T_TEMPERATURE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """The value of one position and, in place of its products, their gradient; without its factor where UNIT.

    Three passes over the row: both log-sum-exps; the value and sum q g; the gradient.
    """
    i_m = tl.program_id(0).to(tl.int64)
    p_s = student + i_m * stride_m
    p_out = out + i_m * stride_m
    factor = 1.0 if UNIT else tl.load(factors + i_m)
    s_sum = _log_sum(p_s, student_bias, width, S_SCALE, S_SOFTCAP, S_TEMPERATURE, BLOCK_V, ACC)
    if DIVERGENCE == CROSS_ENTROPY:
        label = tl.load(labels + i_m)
        o_label = label + tl.arange(0, 1)
        m_label = (o_label >= 0) & (o_label < width)  # on a GPU nobody has looked
        z, _ = _logits(p_s, student_bias, o_label, m_label, S_SCALE, S_SOFTCAP, S_TEMPERATURE, ACC)
        tl.store(values + i_m, s_sum - tl.sum(tl.where(m_label, z, float("nan")), 0))
        if WITH_GRADIENT:
            for start in range(0, width, BLOCK_V):
                o_v = start + tl.arange(0, BLOCK_V)
                s, slope = _logits(p_s, student_bias, o_v, o_v < width, S_SCALE, S_SOFTCAP, S_TEMPERATURE, ACC)
                b_gradient = factor * slope * (tl.exp(s - s_sum) - (o_v == label).to(ACC))
                tl.store(p_out + o_v, b_gradient.to(out.dtype.element_ty), mask=o_v < width)
    else:
        alpha = tl.load(alphas + i_m)
        p_t = teacher + i_m * stride_m
        t_sum = _log_sum(p_t, teacher_bias, width, T_SCALE, T_SOFTCAP, T_TEMPERATURE, BLOCK_V, ACC)
        b_value = tl.zeros((BLOCK_V,), dtype=ACC)
        b_total = tl.zeros((BLOCK_V,), dtype=ACC)
        for start in range(0, width, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            s, _ = _logits(p_s, student_bias, o_v, o_v < width, S_SCALE, S_SOFTCAP, S_TEMPERATURE, ACC)
            t, _ = _logits(p_t, teacher_bias, o_v, o_v < width, T_SCALE, T_SOFTCAP, T_TEMPERATURE, ACC)
            value, weighted, _ = _terms(t - t_sum, s - s_sum, alpha, DIVERGENCE, DETACH, BETA)
            b_value += tl.where(o_v < width, value, 0.0)
            b_total += tl.where(o_v < width, weighted, 0.0)
        tl.store(values + i_m, tl.sum(b_value, 0))
        if WITH_GRADIENT:
            total = tl.sum(b_total, 0)
            if DIVERGENCE == FORWARD_KL:
                total = tl.zeros_like(total) - 1  # what it is, to rounding: ds = q - p
            for start in range(0, width, BLOCK_V):
                o_v = start + tl.arange(0, BLOCK_V)
                s, slope = _logits(p_s, student_bias, o_v, o_v < width, S_SCALE, S_SOFTCAP, S_TEMPERATURE, ACC)
                t, _ = _logits(p_t, teacher_bias, o_v, o_v < width, T_SCALE, T_SOFTCAP, T_TEMPERATURE, ACC)
                _, weighted, q = _terms(t - t_sum, s - s_sum, alpha, DIVERGENCE, DETACH, BETA)
                b_gradient = factor * slope * (weighted - q * total)
                tl.store(p_out + o_v, b_gradient.to(out.dtype.element_ty), mask=o_v < width)


@checked
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
    """``reference.linear_divergence``: float32 logits, whose gradient is rounded to ``matmul_dtype`` for its products.

    The factors of positions, which float16 could not hold beside it, are then multiplied afterwards.
    """
    given = [x for x in (student, student_weight, teacher, teacher_weight) if x is not None]
    dtype, size = compute_dtype(*given), student.shape[0]
    num = numerics(student, dtype=dtype)
    matrix, bias = _cut(student_weight, student_bias, vocabulary, matmul_dtype, dtype)
    of_teacher = None
    if teacher_weight is not None:
        of_teacher = _cut(teacher_weight, teacher_bias, vocabulary, teacher_matmul_dtype, dtype)
    values, scales = student.new_empty(size, dtype=dtype), factors.to(dtype)
    unit = matmul_dtype == torch.float16
    gradient = None
    if with_gradient:
        gradient = DivergenceGradient(
            student.new_empty(student.shape, dtype=kept_dtype(student.dtype, dtype)),
            *empty_head_gradient(student_weight, student_bias, dtype, with_head),
        )
    step = max(1, CHUNK_LOGITS // vocabulary)
    stride = -(-vocabulary // ALIGNED) * ALIGNED

    def rows(like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(like.shape[0], stride, dtype=dtype)[:, :vocabulary]

    for start in range(0, size, step):
        chunk = slice(start, start + step)
        h = student[chunk].to(matmul_dtype)
        s = product(h, matrix.T, dtype, rows(h, dtype))
        t = None
        if teacher is not None and of_teacher is not None:
            t = product(teacher[chunk].to(teacher_matmul_dtype), of_teacher[0].T, dtype, rows(h, dtype))
        ds = s if matmul_dtype == dtype else rows(h, writable(matmul_dtype))
        launch(
            "diverge",
            _diverge,
            (s.shape[0],),
            num,
            student=s,
            teacher=t,
            student_bias=bias,
            teacher_bias=None if of_teacher is None else of_teacher[1],
            labels=None if labels is None else labels[chunk],
            alphas=alpha[chunk].to(dtype),
            factors=scales[chunk],
            values=values[chunk],
            out=ds,
            width=vocabulary,
            stride_m=stride,
            DIVERGENCE=DIVERGENCES.index(divergence_name),
            DETACH=detach,
            BETA=beta,
            S_SCALE=student_head.scale,
            S_SOFTCAP=student_head.softcap,
            S_TEMPERATURE=student_head.temperature,
            T_SCALE=teacher_head.scale,
            T_SOFTCAP=teacher_head.softcap,
            T_TEMPERATURE=teacher_head.temperature,
            WITH_GRADIENT=with_gradient,
            UNIT=unit,
        )
        if gradient is not None:
            of_ids = gradient._replace(weight=gradient.weight[:vocabulary], bias=gradient.bias[:vocabulary])
            add_gradients(of_ids, chunk, ds.to(matmul_dtype), h, matrix, scales[chunk] if unit else None)
    return values, gradient


def _cut(
    weight: Tensor, bias: Tensor | None, vocabulary: int, matmul_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight[:vocabulary].to(matmul_dtype), None if bias is None else bias[:vocabulary].to(dtype)
