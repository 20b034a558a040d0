"""Hid: the vendor's GEMM for P h and its gradients, chunk by chunk, and one fused kernel a chunk between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_fast.contract import checked
from mta_fast.kernels._device import inverse_norm, load, power_of_two, row_power, squares_fit
from mta_fast.kernels._gemm import add_product, product
from mta_fast.kernels._launch import launch, numerics, writable
from mta_fast.layout import AlignmentGradient, DivergenceGradient, compute_dtype, kept_dtype

TOKEN_CHUNK = 4096  # tokens projected at a time: [4096, d_T], 34 MB of bfloat16 at d_T = 4,096, fits an H100's cache


@triton.jit
def _scaled_cosine(p_projected, p_teacher, stride_d, width, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """1 / |p|, 1 / |h| and cos(p, h), of rows whose squares leave the range of ACC."""
    down_p = row_power(p_projected, 1, width, BLOCK_D, ACC)
    down_t = row_power(p_teacher, stride_d, width, BLOCK_D, ACC)
    up_p, up_t = power_of_two(down_p), power_of_two(down_t)
    b_pp = tl.zeros((BLOCK_D,), dtype=ACC)
    b_pt = tl.zeros((BLOCK_D,), dtype=ACC)
    b_tt = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_p = load(p_projected + o_d, o_d < width, ACC, True) * down_p
        b_t = load(p_teacher + o_d * stride_d, o_d < width, ACC, True) * down_t
        b_pp += b_p * b_p
        b_pt += b_p * b_t
        b_tt += b_t * b_t
    inverse_p = inverse_norm(tl.sqrt(tl.sum(b_pp, 0)) * up_p)
    inverse_t = inverse_norm(tl.sqrt(tl.sum(b_tt, 0)) * up_t)
    return inverse_p, inverse_t, tl.sum(b_pt, 0) * (inverse_p * up_p) * (inverse_t * up_t)


@triton.jit
def _align(
    projected,  # [chunk, d_T], overwritten with its gradient
    teacher,
    tokens,
    weights,
    distances,
    scales,
    stride_t,
    stride_d,
    width,
    WITH_GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """g (1 - cos(p, h)) of one token and, in place of p, -g (h / |h| - cos p / |p|) / |p|.

    With UNIT the gradient is stored over g / |p|, which goes to ``scales``: float16 has no exponents for it, and the
    caller's loss scale comes later. Both rows are read twice; the second time they come from the cache. Where a sum of
    squares has left float32's safe range, the sums are taken again, of rows brought near 1 by powers of two.
    """
    i_c = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + i_c)
    p_teacher = teacher + tl.load(tokens + i_c).to(tl.int64) * stride_t
    p_projected = projected + i_c * width
    b_pp = tl.zeros((BLOCK_D,), dtype=ACC)
    b_pt = tl.zeros((BLOCK_D,), dtype=ACC)
    b_tt = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_p = load(p_projected + o_d, o_d < width, ACC, True)
        b_t = load(p_teacher + o_d * stride_d, o_d < width, ACC, True)
        b_pp += b_p * b_p
        b_pt += b_p * b_t
        b_tt += b_t * b_t
    square_p, square_t, product = tl.sum(b_pp, 0), tl.sum(b_tt, 0), tl.sum(b_pt, 0)
    inverse_p, inverse_t = inverse_norm(tl.sqrt(square_p)), inverse_norm(tl.sqrt(square_t))
    cosine = product * inverse_p * inverse_t
    if squares_fit(tl.minimum(square_p, square_t), tl.maximum(square_p, square_t)) == 0:
        inverse_p, inverse_t, cosine = _scaled_cosine(p_projected, p_teacher, stride_d, width, BLOCK_D, ACC)
    tl.store(distances + i_c, weight * (1 - cosine))
    if WITH_GRADIENT:
        factor = weight * inverse_p
        if UNIT:
            tl.store(scales + i_c, factor)
            factor = tl.where(factor == 0, 0.0, 1.0)
        along_p = cosine * inverse_p  # times the factor it could leave float32's range
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            b_p = load(p_projected + o_d, o_d < width, ACC, True)
            b_t = load(p_teacher + o_d * stride_d, o_d < width, ACC, True)
            b_gradient = factor * (b_p * along_p - b_t * inverse_t)
            tl.store(p_projected + o_d, b_gradient.to(projected.dtype.element_ty), mask=o_d < width)


@checked
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
    """``reference.hidden_alignment``: P h and its gradient share a buffer in ``matmul_dtype``; sums are float32."""
    dtype = compute_dtype(student, teacher, proj_weight)
    num = numerics(student, dtype=dtype)
    matrix = proj_weight.to(matmul_dtype)
    bias = None if proj_bias is None else proj_bias.to(matmul_dtype)
    unit = matmul_dtype == torch.float16
    distances, scales = (student.new_empty(tokens.shape[0], dtype=dtype) for _ in range(2))
    gradient = None
    if with_gradient:
        gradient = AlignmentGradient(
            student.new_empty(tokens.shape[0], student.shape[1], dtype=kept_dtype(student.dtype, dtype)),
            student.new_zeros(proj_weight.shape, dtype=dtype),
            matrix.new_zeros(0, dtype=dtype) if bias is None else student.new_zeros(bias.shape, dtype=dtype),
        )
    weights = weights.to(dtype)
    for start in range(0, tokens.shape[0], TOKEN_CHUNK):
        chunk = slice(start, start + TOKEN_CHUNK)
        h = student.index_select(0, tokens[chunk]).to(matmul_dtype)
        p = torch.mm(h, matrix.T) if bias is None else torch.addmm(bias, h, matrix.T)
        p = p.to(writable(p.dtype))
        launch(
            "align",
            _align,
            (h.shape[0],),
            num,
            projected=p,
            teacher=teacher,
            tokens=tokens[chunk],
            weights=weights[chunk],
            distances=distances[chunk],
            scales=scales[chunk],
            stride_t=teacher.stride(0),
            stride_d=teacher.stride(1),
            width=p.shape[1],
            WITH_GRADIENT=with_gradient,
            UNIT=unit,
        )
        if gradient is not None:
            add_gradients(gradient, chunk, p.to(matmul_dtype), h, matrix, scales[chunk] if unit else None)
    return distances.sum(dtype=torch.float64).to(dtype), gradient


def add_gradients(
    gradient: AlignmentGradient | DivergenceGradient,
    chunk: slice,
    dp: Tensor,
    h: Tensor,
    matrix: Tensor,
    scales: Tensor | None,
) -> None:
    """dh, dW and dbias of a chunk; ``scales`` [chunk] are what the rows of ``dp`` still have to be multiplied by.

    A gradient without rows is not wanted.
    """
    bias, rows = gradient.bias, gradient.student[chunk]
    if scales is None:
        if rows.dtype == dp.dtype:
            product(dp, matrix, rows.dtype, rows)
        else:
            rows.copy_(product(dp, matrix, dp.dtype))
        if len(gradient.weight):
            add_product(gradient.weight, dp.T, h)
        if bias.numel():
            bias.add_(dp.sum(0, dtype=bias.dtype))
        return
    torch.mul(torch.mm(dp, matrix), scales[:, None], out=rows)
    if not len(gradient.weight):
        return
    largest = scales.amax()  # the scales of the second product, relative to it, are in float16's range
    relative = torch.where(largest == 0, 0.0, scales / largest)[:, None]
    gradient.weight.addcmul_(product(dp.T, (h * relative).to(h.dtype), gradient.weight.dtype), largest)
    if bias.numel():
        bias.add_((dp * scales[:, None]).sum(0))
