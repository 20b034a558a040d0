"""The definition of every quantity of MTA in plain PyTorch: the oracle of all tests and benchmarks.

Read it beside the paper (arXiv 2605.01374). Everything works per row on flat tokens [T, d]: nothing of size
(spans of the batch)^2, [B, S, spans] or [all tokens, d_T] is made. What receives a gradient (pooling, span pairs,
hidden alignment) is differentiable by autograd; the explicit gradients beside it are what the ops' backward uses.

Numerics: each input is read in its own dtype and computed in float32 (float64 for float64 input); weight totals,
numerators and the last sums of the Gram form, which cancel, are taken in float64. Squares are taken of rows that a
power of two has brought near 1 (``row_norms``), so that states from 1e-30 to 1e30 have lengths, cosines and gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mta_fast.contract import gram_from
from mta_fast.layout import (
    AlignmentGradient,
    DivergenceGradient,
    Head,
    Spans,
    compute_dtype,
    kept_dtype,
    refuse_capacities,
)

STD_EPS = 1e-5  # added to the standard deviation of a hidden state (importance)
# What is held at once: bounds on memory, not tuned for speed
QUERY_BLOCK = 1024  # queries of the score matrix: [1024, row length], 32 MB of float32 at 8,192 tokens
SPAN_BLOCK = 2048  # spans of the error matrix: [2048, spans of the row], 16 MB at 2,048 spans
TOKEN_CHUNK = 1024  # tokens of the projected states: [1024, d_T], 7 MB at d_T = 1,600
LOGIT_BUDGET = 1 << 22  # logits of the entropy: 16 MB
CHUNK_LOGITS = 1 << 22  # of each side that a divergence holds, 16 MB of float32 a copy
TRAJECTORY_LOGITS = 12 << 20  # of each side that FDD holds, 48 MB of float32
ROW_LOGITS = 1 << 20  # of each side that its passes over rows read at a time: 4 MB a copy, which caches hold


def power_of_two(values: Tensor) -> Tensor:
    """2^-e for values >= 0 in [2^e, 2^(e + 1)), from their bits: exact to multiply with. e is kept within +-126
    (float64: +-1022), so that the power and its reciprocal are normal numbers, whatever the value."""
    integer, mantissa, bias = (torch.int64, 52, 1023) if values.dtype == torch.float64 else (torch.int32, 23, 127)
    exponent = (values.view(integer) >> mantissa).clamp(1, 2 * bias - 1)
    return ((2 * bias - exponent) << mantissa).view(values.dtype)


def row_norms(vectors: Tensor) -> Tensor:
    """|v| of every row [N, d] -> [N] in the dtype of ``vectors``; no square leaves its range."""
    if not vectors.shape[-1]:
        return vectors.new_zeros(vectors.shape[:-1])
    v = vectors.detach()
    scale = power_of_two(torch.maximum(v.amax(-1, keepdim=True), -v.amin(-1, keepdim=True)))
    return torch.linalg.vector_norm(vectors * scale, dim=-1) / scale.squeeze(-1)


def inverse_norms(norm: Tensor) -> Tensor:
    """1 / norm; 0 below the smallest normal number: so short a vector counts as the zero vector. NaN for an infinite
    norm, whose reciprocal would pass for a zero vector's."""
    inverse = torch.where(norm < torch.finfo(norm.dtype).tiny, 0.0, 1 / norm)
    return torch.where(norm == torch.inf, torch.nan, inverse)


# --- 1 token importance ------------------------------------------------------------------------------------------


def token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool
) -> Tensor:
    """How much each token is attended by the others of its row: a_j = mean_i softmax_j(z_i . z_j / sqrt(d)).

    z = h / (std(h) + 1e-5); no self-loop; 0 at padding; 1 in a row of one token.

    Args:
        hidden: [T, d] flat hidden states.
        rows, rows_host: [B, 2] (start, length) on the device and on the host.
        seq_len: S of a padded batch (used by ``count_padding`` only).
        causal: a query sees earlier keys only; the first query's empty softmax adds 0.
        count_padding: the mean runs over all S positions of the padded row, padded queries included.

    Returns:
        [T] importances in the compute dtype.
    """
    refuse_capacities(rows_host)
    importance = hidden.new_zeros(hidden.shape[0], dtype=compute_dtype(hidden))
    for b, (start, length) in enumerate(rows_host.tolist()):
        if length == 0:
            continue
        first, count = (b * seq_len, seq_len) if count_padding else (start, length)
        keys = slice(start - first, start - first + length)
        importance[start : start + length] = _row_importance(hidden[first : first + count], keys, causal)
    return importance


def _row_importance(hidden: Tensor, keys: slice, causal: bool) -> Tensor:
    """a_j of the tokens ``keys`` of one row, with every position of ``hidden`` [Q, d] as a query."""
    h = hidden.to(compute_dtype(hidden))
    queries, width = h.shape
    if keys.stop - keys.start == 1:
        return h.new_ones(1)
    mean = h.mean(-1, keepdim=True, dtype=torch.float64).to(h.dtype)  # off by a rounding, it would be what STD_EPS is
    std = row_norms(h - mean)[:, None] / (width - 1) ** 0.5
    z = h / ((std + STD_EPS) * width**0.25)
    total = h.new_zeros(keys.stop - keys.start)
    for block in _chunks(queries, QUERY_BLOCK):
        scores = z[block] @ z[keys].T
        if causal:
            position = torch.arange(queries, device=h.device)
            unseen = position[keys] >= position[block, None]
            attention = scores.masked_fill_(unseen, -torch.inf).softmax(-1)
            attention.masked_fill_(unseen.all(-1, keepdim=True), 0)  # an empty softmax adds 0
        else:
            scores.diagonal(block.start - keys.start).fill_(-torch.inf)  # no self-loop
            attention = scores.softmax(-1)
        total += attention.sum(0)
    return total / queries


# --- 2 span weights ----------------------------------------------------------------------------------------------


def span_weights(values: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Token values normalised over the span incidences of a row, and their sum over each span.

    w_j = v_j / sum_j' n_j' v_j' with n_j the number of spans that cover token j; W_u = sum of w over span u.
    Only covered tokens are read; w is 0 elsewhere, and everywhere in a row whose total is 0.

    Args:
        values: [T] importances or entropy weights.

    Returns:
        w [T], W [N] (span salience) and the row totals [B] before normalisation.
    """
    refuse_capacities(spans.host)
    covered = spans.covered
    value = values[covered].double()
    counts = spans.cover_splits.diff()
    total = _segment_sums(counts * value, spans.covered_splits.diff())
    per_token = total[spans.covered_rows]
    token_weight = torch.where(per_token == 0, 0.0, value / per_token)
    dense = values.new_zeros(values.shape[0], dtype=torch.float64).index_copy(0, covered.long(), token_weight)
    incidence, lengths = span_incidences(spans.ranges, spans.host.tolist()[-1][1])
    by_span = _segment_sums(dense[incidence], lengths)
    dtype = compute_dtype(values)
    return dense.to(dtype), by_span.to(dtype), total.to(dtype)


def span_incidences(ranges: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The tokens of every range [N, 2] one after the other [total], and the length of each range [N]."""
    start, end = ranges.long().unbind(1)
    lengths = end - start
    offset = torch.repeat_interleave(start - (lengths.cumsum(0) - lengths), lengths, output_size=total)
    return offset + torch.arange(total, device=offset.device), lengths


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive segments; unsafe=True skips the check of the lengths, which would synchronise."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


# --- 3 span pooling ----------------------------------------------------------------------------------------------


def pool_spans(
    hidden: Tensor, weights: Tensor, spans: Spans, rows: Tensor, rows_host: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean hidden state of each span: v_u = sum_j w_j h_j / sum_j w_j; 0 where the weights sum to 0.

    The scale of the weights does not matter: subnormal ones, and sums beyond float32, give the same means.

    Args:
        hidden: [T, d]; weights: [T]; rows, rows_host: [B, 2] (start, length) on the device and the host.

    Returns:
        pooled [N, d] and norm [N] = |v_u| in the compute dtype of ``hidden``, span_weight [N] = sum_j w_j in float64.
    """
    refuse_capacities(spans.host)
    dtype = compute_dtype(hidden)
    weights = weights.double()
    parts = [(0, hidden.shape[0], *spans.host.tolist()[-1])]
    if hidden.dtype != dtype:  # row by row, so that no copy of the whole batch is made
        sizes = spans.host.diff(dim=0).tolist()
        parts = [(*row, *size) for row, size in zip(rows_host.tolist(), sizes, strict=True)]
    pooled, totals, first = [], [], 0
    for start, length, count, num_tokens in parts:
        incidence, lengths = span_incidences(spans.ranges[first : first + count] - start, num_tokens)
        w = weights[start : start + length][incidence]
        total = _segment_sums(w, lengths)
        share = _shares(w, torch.repeat_interleave(total, lengths, output_size=num_tokens)).to(dtype)
        states = hidden[start : start + length].to(dtype)
        offsets = lengths.cumsum(0) - lengths
        pooled.append(F.embedding_bag(incidence, states, offsets, mode="sum", per_sample_weights=share))
        totals.append(total)
        first += count
    vectors = _concat(pooled, hidden, dtype)
    return vectors, torch.cat([*totals, weights[:0]]), row_norms(vectors)


def pool_spans_gradient(grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
    """Gradient of the hidden states: dh_j = w_j sum over the spans u of j of dv_u / sum(w over u).

    Args:
        grad: [N, d] gradient of the pooled spans; span_weight: [N]; weights: [T].

    Returns:
        [T, d] in ``dtype``; 0 where no span covers the token.
    """
    covered, cover_spans = spans.covered.long(), spans.cover_spans.long()
    w = torch.repeat_interleave(
        weights[covered].double(), spans.cover_splits.diff().long(), output_size=cover_spans.shape[0]
    )
    share = _shares(w, span_weight.double()[cover_spans]).to(grad.dtype)
    sums = F.embedding_bag(cover_spans, grad, spans.cover_splits[:-1].long(), mode="sum", per_sample_weights=share)
    return grad.new_zeros(weights.shape[0], grad.shape[1], dtype=dtype).index_copy_(0, covered, sums.to(dtype))


def _shares(weights: Tensor, totals: Tensor) -> Tensor:
    """weights / totals, and 0 where a total is 0; a quotient, as the reciprocal of a subnormal total is infinite."""
    return torch.where(totals == 0, 0.0, weights / totals)


# --- 4 DSA: span pairs -------------------------------------------------------------------------------------------


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
    """Weighted squared difference of all span-pair cosines of each row (DSA).

    num_b = sum_{u != v} W_u W_v (cos(v^S_u, v^S_v) - cos(v^T_u, v^T_v))^2 and den_b = sum_{u != v} W_u W_v.
    A cosine with a zero vector is 0.

    Args:
        student: [N, d_S] pooled spans; teacher: [N, d_T]; weights: [N]; student_norm, teacher_norm: [N] lengths of
            the pooled spans, as ``pool_spans`` returns them (constants to autograd: see ``ops/span_pairs.py``).
        span_splits: [B + 1] on the device; host: [B + 1, 2], the same in its first column, on the host.
        method: "pairwise", "gram" or "auto" (per row, by ``gram_from``).

    Returns:
        num [B], den [B], and d(sum of num) / d(student) [N, d_S] ([0, d_S] without).
    """
    refuse_capacities(host)
    dtype = compute_dtype(student, teacher)
    numerators, denominators, gradients = [], [], []
    for first, last in itertools.pairwise(host[:, 0].tolist()):
        w = weights[first:last].to(dtype)
        u, scale = _unit(student[first:last].to(dtype), student_norm[first:last])
        v, _ = _unit(teacher[first:last].to(dtype), teacher_norm[first:last])
        gram = method == "gram" or (method == "auto" and len(w) >= gram_from(u.shape[1], v.shape[1]))
        numerator, gradient = (_gram if gram else _pairwise)(u, v, w, with_gradient)
        numerators.append(numerator.clamp(min=0))  # the Gram form's terms cancel: rounding may leave less
        denominators.append((w.double().sum() ** 2 - w.double().square().sum()).to(dtype))
        if gradient is not None:
            # through the normalisation: the part orthogonal to u, over the length
            radial = torch.linalg.vecdot(gradient, u)[:, None]
            gradients.append(gradient.addcmul_(radial, u, value=-1).mul_(scale))
    return _stack(numerators, student, dtype), _stack(denominators, student, dtype), _concat(gradients, student, dtype)


def span_pairs_gradient(gradient: Tensor, grad: Tensor, span_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the pooled spans: what ``span_pairs`` left [N, d_S], times ``grad`` [B] of each span's row."""
    return (gradient * grad.index_select(0, span_rows)[:, None]).to(dtype)


def _pairwise(u: Tensor, v: Tensor, w: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """num of unit rows u [N, d_S], v [N, d_T], and dnum/du = 4 W_u sum_v W_v (c^S - c^T)_uv u_v."""
    total, gradients = u.new_zeros((), dtype=torch.float64), []
    for block in _chunks(len(w), SPAN_BLOCK):
        error = torch.addmm(u[block] @ u.T, v[block], v.T, alpha=-1)
        error.diagonal(block.start).fill_(0)  # u = v is no pair: with a zero vector its error is not 0
        total = total + (w[block] * (error.square() @ w)).double().sum()
        if with_gradient:
            gradients.append((error @ (w[:, None] * u)).mul_(4 * w[block, None]))
    return total.to(u.dtype), _concat(gradients, u, u.dtype) if with_gradient else None


def _gram(u: Tensor, v: Tensor, w: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same in the centred Gram form: linear in N, no N x N matrix. The last sums are float64.

    With omega = sum W, m and n the weighted means of u and v, x = u - m, y = v - n, D = diag(W):
    num = omega^2 delta^2 + 2 omega sum W b^2 + |x'Dx|^2 - 2 |x'Dy|^2 + |y'Dy|^2, less the diagonal u = v,
    where delta = |m|^2 - |n|^2 and b = x.m - y.n.
    """
    omega = w.double().sum()
    scale = torch.where(omega == 0, 1.0, omega).to(u.dtype)
    m, n = (w @ u) / scale, (w @ v) / scale
    x, y = u - m, v - n
    wx = w[:, None] * x
    xx, yx, yy = x.T @ wx, y.T @ wx, y.T @ (w[:, None] * y)
    delta = m.double().square().sum() - n.double().square().sum()
    b = x.double() @ m.double() - y.double() @ n.double()
    lengths = u.double().square().sum(-1) - v.double().square().sum(-1)  # 0 unless a row is the zero vector
    numerator = omega**2 * delta**2 + 2 * omega * (w * b.square()).sum()
    numerator = numerator + xx.double().square().sum() - 2 * yx.double().square().sum() + yy.double().square().sum()
    numerator = numerator - (w.double() * lengths).square().sum()
    if not with_gradient:
        return numerator.to(u.dtype), None
    offset, pull = (omega * (delta + b)).to(u.dtype), b.to(u.dtype)
    gradient = 4 * w[:, None] * (offset[:, None] * m + (w * pull) @ x + x @ xx - y @ yx)
    # the subtracted diagonal acts along u only: the tangent part, which alone matters, has no term of it
    return numerator.to(u.dtype), gradient


def span_distances(pooled: Tensor) -> Tensor:
    """[N, N] distances 1 - c_uv of one row's pooled spans [N, d]; 0 on the diagonal, 1 with a zero vector."""
    unit, _ = _unit(pooled, row_norms(pooled))
    distances = (1 - unit @ unit.T).clamp(0, 2)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def _unit(vectors: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., d] scaled from length ``norm`` [...] to 1 (zero rows stay zero), and the scales [..., 1]."""
    scale = inverse_norms(norm.to(vectors.dtype))[..., None]
    return vectors * scale, scale


def _stack(scalars: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack(scalars) if scalars else like.new_zeros(0, dtype=dtype)


def _concat(parts: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0, like.shape[1], dtype=dtype)


# --- 5 Hid: hidden representation alignment ----------------------------------------------------------------------


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
    """Weighted cosine distance of projected student states and teacher states (Hid), chunk by chunk.

    num = sum_c g_c (1 - cos(P h^S + bias, h^T)) over the listed tokens;
    dnum/dp = -g (h^T / (|p| |h^T|) - cos p / |p|^2), 0 where a vector is zero.

    Args:
        student: [T, d_S]; teacher: [T, d_T]; tokens: [C] distinct indices; weights: [C];
        proj_weight: [d_T, d_S]; proj_bias: [d_T] or None.
        matmul_dtype: what h and P are rounded to before they are multiplied; everything else is the compute dtype.

    Returns:
        num (scalar), and its gradients or None.
    """
    dtype = compute_dtype(student, teacher, proj_weight)
    matrix = proj_weight.to(matmul_dtype).to(dtype)
    bias = None if proj_bias is None else proj_bias.to(dtype)
    total = student.new_zeros((), dtype=torch.float64)
    gradient = None
    if with_gradient:
        gradient = AlignmentGradient(
            student.new_empty(tokens.shape[0], student.shape[1], dtype=kept_dtype(student.dtype, dtype)),
            torch.zeros_like(matrix),
            matrix.new_zeros(0) if bias is None else torch.zeros_like(bias),
        )
    for chunk in _chunks(tokens.shape[0], TOKEN_CHUNK):
        h = student.index_select(0, tokens[chunk]).to(matmul_dtype).to(dtype)
        t = teacher.index_select(0, tokens[chunk]).to(dtype)
        g = weights[chunk].to(dtype)
        p = F.linear(h, matrix, bias)
        unit, scale = _unit(p, row_norms(p))
        target, _ = _unit(t, row_norms(t))
        cosine = torch.linalg.vecdot(unit, target)
        total = total + (g * (1 - cosine)).double().sum()
        if gradient is not None:  # the factors one after the other: 1 / |p|^2 has no place in float32
            dp = unit.mul_(cosine[:, None]).sub_(target).mul_(g[:, None] * scale)
            gradient.student[chunk] = torch.mm(dp, matrix)
            gradient.weight.addmm_(dp.T, h)
            if bias is not None:
                gradient.bias.add_(dp.sum(0))
    return total.to(dtype), gradient


def hidden_alignment_gradient(
    gradient: AlignmentGradient,
    tokens: Tensor,
    grad: Tensor,
    num_tokens: int,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``hidden_alignment`` left (an empty tensor for no bias), times the scalar ``grad``.

    Returns:
        The gradients of the student [num_tokens, d_S], 0 but for the listed tokens, of the weight and of the bias.
    """
    rows, weight, bias = gradient
    dense = rows.new_zeros(num_tokens, rows.shape[1], dtype=student_dtype)
    dense.index_copy_(0, tokens.long(), _times(rows, grad, student_dtype))
    return dense, _times(weight, grad, weight_dtype), _times(bias, grad, bias_dtype)


def _times(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values * factor in ``dtype``, by one launch."""
    made = values.new_empty(values.shape, dtype=dtype)
    return torch.mul(values, factor, out=made) if values.numel() else made


def ridge_sums(student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A'wA [d_S, d_S] and A'wB [d_S, d_T] of the listed tokens in float64; rows of A (student) and B (teacher) are the
    states at length 1, a zero state stays zero.

    Args:
        As in ``hidden_alignment``.
    """
    gram = student.new_zeros(student.shape[1], student.shape[1], dtype=torch.float64)
    cross = student.new_zeros(student.shape[1], teacher.shape[1], dtype=torch.float64)
    for chunk in _chunks(tokens.shape[0], TOKEN_CHUNK):
        states = (side.index_select(0, tokens[chunk]).double() for side in (student, teacher))
        a, b = (_unit(side, row_norms(side))[0] for side in states)
        weighted = (weights[chunk].double()[:, None] * a).T
        gram.addmm_(weighted, a)
        cross.addmm_(weighted, b)
    return gram, cross


def ridge_projection(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """P = [(A'wA + r tr(A'wA)/d_S I)^-1 A'wB]' [d_T, d_S]: what maps A onto B with the least weighted squares, and
    ``strength`` r.

    Args:
        gram, cross: sums of ``ridge_sums``, of as many batches as there are; the trace is above 0.
    """
    regular = gram.clone()
    regular.diagonal().add_(strength * gram.trace() / len(gram))
    return torch.cholesky_solve(cross, torch.linalg.cholesky(regular)).T


def _chunks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


# --- 6 divergences of two distributions, and the LM heads that make them -----------------------------------------


def divergence(
    log_p: Tensor, log_q: Tensor, name: str, alpha: float | Tensor = 0.1, beta: float = 0.5, detach: bool = False
) -> Tensor:
    """How far the student's distribution q is from the teacher's p, at each position.

    KL(a || b) = sum_v a_v (log a_v - log b_v), and with m a mixture, taken in log space:
    "forward_kl": KL(p || q); "reverse_kl": KL(q || p); "skl": KL(p || alpha p + (1 - alpha) q);
    "srkl": KL(q || (1 - alpha) p + alpha q); "jsd": beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Args:
        log_p, log_q: [..., V] log-probabilities.
        alpha: a number or [...].
        detach: no gradient through the student's part of the mixture of "skl" and "srkl".

    Returns:
        [...], differentiable by autograd in log_q.
    """
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    mixture = _mixture(log_p, log_q.detach() if detach and name != "jsd" else log_q, name, alpha, beta)
    if name == "skl":
        return _kl(log_p, mixture)
    if name == "srkl":
        return _kl(log_q, mixture)
    return beta * _kl(log_p, mixture) + (1 - beta) * _kl(log_q, mixture)


def logit_gradient(
    log_p: Tensor, log_q: Tensor, name: str, alpha: float | Tensor = 0.1, beta: float = 0.5, detach: bool = False
) -> Tensor:
    """The gradient of ``divergence`` in the student's logits, [..., V]: q_k (g_k - sum_v q_v g_v), g_v = dL / dq_v."""
    q = log_q.exp()
    if name == "forward_kl":
        return q - log_p.exp()
    if name == "reverse_kl":
        weighted = q * (log_q - log_p)
    elif name == "skl" and detach:
        return torch.zeros_like(q)
    else:
        mixture = _mixture(log_p, log_q, name, alpha, beta)
        if name == "skl":
            weighted = -(log_p + (log_q + _logs(alpha)[1] - mixture)).exp()
        elif name == "srkl":
            weighted = q * (log_q - mixture)
            if not detach:
                weighted = weighted - q * (log_q + _logs(alpha)[0] - mixture).exp()
        else:
            weighted = (1 - beta) * q * (log_q - mixture)
    return weighted - q * weighted.sum(-1, keepdim=True)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _logs(share: float | Tensor) -> tuple[Any, Any]:
    """log(share) and log(1 - share), against [..., V]."""
    if isinstance(share, Tensor):
        return share[..., None].log(), (-share[..., None]).log1p()
    return math.log(share), math.log1p(-share)


def _mixture(log_p: Tensor, log_q: Tensor, name: str, alpha: float | Tensor, beta: float) -> Tensor:
    """log(share first + (1 - share) second); first is q in "srkl", else p."""
    first, second = (log_q, log_p) if name == "srkl" else (log_p, log_q)
    of_first, of_second = _logs(beta if name == "jsd" else alpha)
    return torch.logaddexp(first + of_first, second + of_second)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """[M, V] what a softmax is taken of: softcap(scale (W h + bias)) / temperature, softcap(z) = c tanh(z / c)."""
    return processed(F.linear(hidden, weight, bias), head)


def processed(logits: Tensor, head: Head) -> Tensor:
    """What a model makes of its head's own W h + bias; see ``head_logits``."""
    if head.scale != 1:
        logits = logits * head.scale
    if head.softcap:
        logits = (logits / head.softcap).tanh() * head.softcap
    return logits if head.temperature == 1 else logits / head.temperature


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
    """``divergence`` of the distributions that two LM heads make of hidden states; no [M, V] is kept.

    Chunk by chunk: both logits, the values, and d/ds = factor q (g - sum q g) through softcap, scale and temperature;
    then dh = ds W, dW += ds' h.

    Args:
        student: [M, d_S]; student_weight: [V_S, d_S]; student_bias: [V_S] or None; teacher: likewise, or None.
        labels: [M] ids below ``vocabulary``, of "cross_entropy" (-log q at the label), which reads no teacher.
        alpha, factors: [M] the skew, and what a position's value counts in the sum that the gradients are of.
        vocabulary: the distributions are over the first so many ids of both heads.
        with_gradient: whether gradients are made; with_head: the head's too, which may be frozen.
        matmul_dtype, teacher_matmul_dtype: what states and heads are rounded to before they are multiplied.

    Returns:
        [M] values in the compute dtype, and the gradients of sum_i factors_i values_i, or None.
    """
    given = [x for x in (student, student_weight, teacher, teacher_weight) if x is not None]
    dtype = compute_dtype(*given)
    values = student.new_empty(student.shape[0], dtype=dtype)
    matrix, bias = _cut(student_weight, student_bias, vocabulary, matmul_dtype, dtype)
    of_teacher = None
    if teacher_weight is not None:
        of_teacher = _cut(teacher_weight, teacher_bias, vocabulary, teacher_matmul_dtype, dtype)
    gradient = None
    if with_gradient:
        gradient = DivergenceGradient(
            student.new_empty(student.shape, dtype=kept_dtype(student.dtype, dtype)),
            *empty_head_gradient(student_weight, student_bias, dtype, with_head),
        )
    for chunk in _chunks(student.shape[0], max(1, CHUNK_LOGITS // vocabulary)):
        h = student[chunk].to(matmul_dtype).to(dtype)
        z = head_logits(h, matrix, bias, student_head)
        log_q = z.log_softmax(-1)
        if labels is not None:
            values[chunk] = -log_q.gather(-1, labels[chunk, None].long())[:, 0]
        if teacher is not None and of_teacher is not None:
            t = teacher[chunk].to(teacher_matmul_dtype).to(dtype)
            log_p = head_logits(t, *of_teacher, teacher_head).log_softmax(-1)
            how = (divergence_name, alpha[chunk].to(dtype), beta, detach)
            values[chunk] = divergence(log_p, log_q, *how)
        if gradient is None:
            continue
        if labels is not None:
            ds = log_q.exp()
            ds.scatter_add_(-1, labels[chunk, None].long(), ds.new_full((len(ds), 1), -1.0))
        else:
            ds = logit_gradient(log_p, log_q, *how)
        ds *= factors[chunk, None].to(dtype) * (student_head.scale / student_head.temperature)
        if student_head.softcap:
            ds *= 1 - (z * (student_head.temperature / student_head.softcap)) ** 2
        gradient.student[chunk] = torch.mm(ds, matrix)
        if with_head:
            gradient.weight[:vocabulary].addmm_(ds.T, h)
        if gradient.bias.numel():
            gradient.bias[:vocabulary] += ds.sum(0)
    return values, gradient


def empty_head_gradient(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, with_head: bool
) -> tuple[Tensor, Tensor]:
    """Zeros [V, d] and [V], without rows where there is no bias or the head has no gradient."""
    rows = weight.shape[0] if with_head else 0
    made = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
    return made, weight.new_zeros(0 if bias is None else rows, dtype=dtype)


def _cut(
    weight: Tensor, bias: Tensor | None, vocabulary: int, matmul_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight[:vocabulary].to(matmul_dtype).to(dtype), None if bias is None else bias[:vocabulary].to(dtype)


def linear_divergence_gradient(
    gradient: DivergenceGradient,
    grad: Tensor,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``linear_divergence`` left (an empty tensor for no bias), times the scalar ``grad``."""
    student, weight, bias = gradient
    return _times(student, grad, student_dtype), _times(weight, grad, weight_dtype), _times(bias, grad, bias_dtype)


# --- 7 FDD: the distributions of several layers, and how they change from one to the next -------------------------


def trajectory(log_p: Tensor, log_q: Tensor, tau: float, with_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """traj + der of each token, from the teacher's p and the student's q of L mapped layers.

    traj = mean_l KL(p_l^(1/tau) || q_l^(1/tau)), both normalised again; der = mean_{l >= 1} (1 - cos(D^T_l, D^S_l)),
    D_l = log q_l - log q_(l-1) (the teacher's of p): 0 for one layer. A cosine with a zero vector is 0.

    Args:
        log_p, log_q: [L, n, V] log-probabilities at temperature 1.

    Returns:
        [n], differentiable by autograd; [L, n, V] its gradient in the student's logits, or None.
    """
    layers = log_q.shape[0]
    soft_p, soft_q = ((log / tau).log_softmax(-1) for log in (log_p, log_q))
    values = _kl(soft_p, soft_q).mean(0)
    gradient = (soft_q.exp() - soft_p.exp()) / (tau * layers) if with_gradient else None
    if layers == 1:
        return values, gradient
    of_q, of_p = log_q.diff(dim=0), log_p.diff(dim=0)
    unit, scale = _unit(of_q, row_norms(of_q))
    target, _ = _unit(of_p, row_norms(of_p))
    cosine = torch.linalg.vecdot(unit, target)
    values = values + (1 - cosine).mean(0)
    if gradient is not None:
        slope = (unit * cosine[..., None] - target) * (scale / (layers - 1))  # in D^S
        total, q = slope.sum(-1, keepdim=True), log_q.exp()
        gradient[1:] += slope - q[1:] * total
        gradient[:-1] -= slope - q[:-1] * total
    return values, gradient


def trajectory_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    tau: float,
    student_head: Head,
    teacher_head: Head,
    vocabulary: int,
    matmul_dtype: torch.dtype,
    teacher_matmul_dtype: torch.dtype,
    with_gradient: bool = False,
    with_head: bool = True,
) -> tuple[Tensor, DivergenceGradient | None]:
    """``trajectory`` of what two LM heads make of the states of L layers, summed over the tokens.

    Chunk by chunk, all layers at once, as ``linear_divergence``: no [M, V] is kept.

    Args:
        student: [L, M, d_S]; teacher: [L, M, d_T]; the others as in ``linear_divergence``.

    Returns:
        A scalar in the compute dtype, and its gradients (the student's [L, M, d_S]), or None.
    """
    layers, size, _ = student.shape
    dtype = compute_dtype(student, student_weight, teacher, teacher_weight)
    own = _Factors(student_weight, student_bias, vocabulary, matmul_dtype, dtype)
    other = _Factors(teacher_weight, teacher_bias, vocabulary, teacher_matmul_dtype, dtype)
    row_logits = ROW_LOGITS if student.device.type == "cpu" else TRAJECTORY_LOGITS
    total = student.new_zeros((), dtype=torch.float64)
    gradient = None
    if with_gradient:
        gradient = DivergenceGradient(
            student.new_empty(student.shape, dtype=kept_dtype(student.dtype, dtype)),
            *empty_head_gradient(student_weight, student_bias, dtype, with_head),
        )
    for chunk in _chunks(size, max(1, TRAJECTORY_LOGITS // (layers * vocabulary))):
        h = own.rounded(student[:, chunk].flatten(0, 1))
        s = own.logits(h).unflatten(0, (layers, -1))
        t = other.logits(other.rounded(teacher[:, chunk].flatten(0, 1))).unflatten(0, (layers, -1))
        for rows in _chunks(s.shape[1], max(1, row_logits // (layers * vocabulary))):
            log_p = processed(t[:, rows], teacher_head).log_softmax(-1)
            z = processed(s[:, rows], student_head)
            values, ds = trajectory(log_p, z.log_softmax(-1), tau, with_gradient)
            total += values.double().sum()
            if ds is not None:
                if student_head.softcap:
                    ds *= 1 - (z / student_head.softcap) ** 2
                torch.mul(ds, student_head.scale, out=s[:, rows])  # in place of the logits
        if gradient is not None:
            of_ids = gradient._replace(weight=gradient.weight[:vocabulary], bias=gradient.bias[:vocabulary])
            gradient.student[:, chunk] = own.add_gradients(of_ids, s.flatten(0, 1), h).unflatten(0, (layers, -1))
    return total.to(dtype), gradient


class _Factors:
    """A head's weight [V, d] and bias as products take them, which sum in ``dtype``.

    Rounded to ``matmul_dtype`` and held in ``dtype``; bfloat16 as it is where CUDA multiplies it into float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, vocabulary: int, matmul_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        self.matmul_dtype, self.dtype = matmul_dtype, dtype
        self.weight = self.rounded(weight[:vocabulary])
        self.bias = None if bias is None else bias[:vocabulary].to(dtype)

    def rounded(self, factor: Tensor) -> Tensor:
        whole = (self.matmul_dtype, self.dtype, factor.device.type) == (torch.bfloat16, torch.float32, "cuda")
        return factor.to(self.matmul_dtype).to(self.matmul_dtype if whole and not torch.version.hip else self.dtype)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right) if left.dtype == self.dtype else torch.mm(left, right, out_dtype=self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, V] W h + bias."""
        logits = self.product(hidden, self.weight.T)
        return logits if self.bias is None else logits.add_(self.bias)

    def add_gradients(self, gradient: DivergenceGradient, ds: Tensor, hidden: Tensor) -> Tensor:
        """Add those of weight and bias, where they have rows; the states' [M, d]."""
        if gradient.bias.numel():
            gradient.bias.add_(ds.sum(0))
        ds = ds.to(hidden.dtype)
        if len(gradient.weight) and ds.dtype == self.dtype:
            gradient.weight.addmm_(ds.T, hidden)
        elif len(gradient.weight):
            gradient.weight.add_(self.product(ds.T, hidden))
        return torch.mm(ds, self.weight)


# --- 8 normalisation ---------------------------------------------------------------------------------------------


def reduce_rows(numerators: Tensor, denominators: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Row numerators and denominators [..., B] to the two [...] whose quotient is the loss.

    "sample": (sum of num_b / den_b, rows with den_b > 0); otherwise the two sums. A NaN stays a NaN.
    """
    if reduction != "sample":
        return numerators.sum(-1), denominators.sum(-1)
    empty = denominators <= 0
    quotient = torch.where(empty, numerators * 0, numerators / torch.where(empty, 1.0, denominators))
    return quotient.sum(-1), (~empty).sum(-1).to(denominators.dtype)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 (with the numerator's graph) where the denominator is 0."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


# --- 9 entropy weights -------------------------------------------------------------------------------------------


def entropy_weights(logits: Tensor) -> Tensor:
    """e = 1 - H(softmax(logits)) / ln V with H = -sum p log(p + 1e-8): 1 where the teacher is certain.

    Args:
        logits: [..., V]; a bounded part is turned to float32 at a time.

    Returns:
        [...] in the compute dtype.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    dtype = compute_dtype(logits)
    weights = logits.new_empty(flat.shape[0], dtype=dtype)
    scale = 1 / torch.log(torch.tensor(flat.shape[1], dtype=torch.float64)).item()
    for chunk in _chunks(flat.shape[0], max(1, LOGIT_BUDGET // flat.shape[1])):
        p = flat[chunk].to(dtype).softmax(-1)
        weights[chunk] = 1 + (p * (p + 1e-8).log()).sum(-1) * scale
    return weights.reshape(logits.shape[:-1])
