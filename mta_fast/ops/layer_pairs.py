"""All layer pairs of a loss at once: one op for their weights, one for DSA with its pooling, one for its gradient.

They do what the ops of one layer pair do, by the same functions of a backend, but the host prepares and checks one call
where it would be seven a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast import backends, contract
from mta_fast.layout import Spans, compute_dtype
from mta_fast.ops._operator import fake, fitting, operator, register_list_backward
from mta_fast.ops.pooling import SpanWeights
from mta_fast.reference import reduce_rows
from mta_fast.spans.batch import SpanBatch


class PairedStates(NamedTuple):
    """What one layer pair gives to DSA."""

    student: Tensor  # [T, d_S]
    teacher: Tensor  # [T, d_T]
    student_weights: Tensor  # [T] what the student's spans are pooled with
    teacher_weights: Tensor  # [T]
    span_weights: Tensor  # [N] W_u
    spans: SpanBatch


def joinable(spans: Sequence[SpanBatch], *sides: Sequence[Tensor]) -> bool:
    """Whether layer pairs fit one call: tokens and rows of all are the same, the states of each side of one dtype."""
    same = all(own.shape == spans[0].shape and own.num_rows == spans[0].num_rows for own in spans)
    return same and all(states.dtype == side[0].dtype for side in sides for states in side)


def span_terms(pairs: Sequence[PairedStates], *, reduction: str, method: str, backend: str) -> tuple[Tensor, Tensor]:
    """(numerators, denominators) [L] of DSA; ``joinable`` layer pairs, of which nothing else is checked before the op.

    Differentiable in the students' states (once).
    """
    *sides, spans = zip(*pairs, strict=True)
    students, teachers, *weights = (list(side) for side in sides)
    index, kind_of = _index(spans)
    with_gradient = torch.is_grad_enabled() and any(student.requires_grad for student in students)
    numerators, denominators, *_ = fitting(_layer_pairs, spans[0].host)(
        students, teachers, *weights, index, kind_of, method, with_gradient, backend
    )
    return reduce_rows(numerators, denominators, reduction)


def importance_weights(
    hidden: Sequence[Tensor], hidden_of: Sequence[int], spans: Sequence[SpanBatch], *, causal: bool,
    count_padding: bool, backend: str,
) -> list[tuple[Tensor, SpanWeights]]:  # fmt: skip
    """``token_importance`` of the teacher's states and ``normalize_weights`` of it, of each layer pair.

    Args:
        hidden: [T, d] of each layer, and hidden_of: which of them a layer pair has; spans: of each layer pair, all with
            as many rows.
    """
    index, kind_of = _index(spans)
    made = fitting(_layer_weights, spans[0].host)(
        list(hidden), list(hidden_of), index, kind_of, spans[0].shape[-1], causal, count_padding, backend
    )
    shape = spans[0].shape
    importances = [importance.reshape(shape) for importance in made[: len(hidden)]]
    weights = [made[i : i + 3] for i in range(len(hidden), len(made), 3)]
    return [
        (importances[i], SpanWeights(token.reshape(shape), span, row_total))
        for i, (token, span, row_total) in zip(hidden_of, weights, strict=True)
    ]


_PER_KIND = (*Spans._fields, "rows", "rows_host")


def _index(spans: Sequence[SpanBatch]) -> tuple[list[Tensor], list[int]]:
    """The tensors of each kind of spans, one after the other, and which kind a layer pair has."""
    kinds: list[SpanBatch] = []
    for own in spans:
        if not any(own is kind for kind in kinds):
            kinds.append(own)
    index = [t for kind in kinds for t in (*kind.index_tensors(), kind.rows.table, kind.rows.host)]
    return index, [next(i for i, kind in enumerate(kinds) if kind is own) for own in spans]


def _kinds(kinds: Sequence[Tensor], kind_of: Sequence[int]) -> list[tuple[Spans, Tensor, Tensor]]:
    """Spans, rows and rows_host of each layer pair."""
    contract.kinds(len(kinds), len(_PER_KIND), kind_of)
    size = len(_PER_KIND)
    made = []
    for first in range(0, len(kinds), size):
        *spans, rows, rows_host = contract.unpacked("kinds", kinds[first : first + size], _PER_KIND)
        made.append((Spans(*spans), rows, rows_host))
    return [made[kind] for kind in kind_of]


@operator("layer_weights", reads_lengths=True)
def _layer_weights(
    hidden: Sequence[Tensor],
    hidden_of: Sequence[int],
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    seq_len: int,
    causal: bool,
    count_padding: bool,
    backend: str,
) -> list[Tensor]:
    """The importances [T] of ``hidden``, then of each layer pair the three results of ``span_weights``."""
    of_pairs = _kinds(kinds, kind_of)
    contract.layer_weights(hidden, hidden_of, of_pairs, seq_len, count_padding)
    importances: dict[int, Tensor] = {}
    weights: list[Tensor] = []
    with backends.ready(hidden[0].device):
        for i, (spans, rows, rows_host) in zip(hidden_of, of_pairs, strict=True):
            if i not in importances:
                states = hidden[i]
                function = backends.unchecked("token_importance", backend, [states])
                importances[i] = function(states, rows, rows_host, seq_len, causal, count_padding)
            values = importances[i]
            weights += backends.unchecked("span_weights", backend, [values])(values, spans)
    return [*(importances[i] for i in range(len(hidden))), *weights]


@fake(_layer_weights)
def _(
    hidden: Sequence[Tensor],
    hidden_of: Sequence[int],
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    seq_len: int,
    causal: bool,
    count_padding: bool,
    backend: str,
) -> list[Tensor]:
    importances = [states.new_empty(states.shape[0], dtype=compute_dtype(states)) for states in hidden]
    weights = []
    for i, (spans, *_) in zip(hidden_of, _kinds(kinds, kind_of), strict=True):
        sizes = (hidden[i].shape[0], spans.ranges.shape[0], spans.span_splits.shape[0] - 1)
        weights += [hidden[i].new_empty(size, dtype=importances[i].dtype) for size in sizes]
    return [*importances, *weights]


@operator("layer_pairs", reads_lengths=True)
def _layer_pairs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_weights: Sequence[Tensor],
    teacher_weights: Sequence[Tensor],
    span_weights: Sequence[Tensor],
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    method: str,
    with_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """num and den [L, B]; of each pair the gradient of the summed num in the student's pooled spans ([0, d_S] without),
    then of each the sums of its student's weights over the spans [N] float64."""
    of_pairs = _kinds(kinds, kind_of)
    sides = (students, teachers, student_weights, teacher_weights, span_weights)
    contract.layer_pairs(*sides, of_pairs, method)
    with backends.ready(students[0].device):
        made = [
            _layer_pair(pair, spans_and_rows, method, with_gradient, backend)
            for *pair, spans_and_rows in zip(*sides, of_pairs, strict=True)
        ]
        terms, gradients, sums = zip(*made, strict=True)
        columns = [column[0][None] if len(column) == 1 else torch.stack(column) for column in zip(*terms, strict=True)]
    return [*columns, *gradients, *sums]


def _layer_pair(
    sides: Sequence[Tensor],
    spans_and_rows: tuple[Spans, Tensor, Tensor],
    method: str,
    with_gradient: bool,
    backend: str,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """(num, den), gradient and sums of one layer pair, whose pooled spans are gone when the next one's are made."""
    student, teacher, student_weights, teacher_weights, span_weights = sides
    spans, *rows = spans_and_rows
    (pooled, total, norm), (other, _, other_norm) = [
        backends.unchecked("pool_spans", backend, [states, own])(states, own, spans, *rows)
        for states, own in ((student, student_weights), (teacher, teacher_weights))
    ]
    given = (pooled, other, span_weights, norm, other_norm, spans.span_splits, spans.host, method, with_gradient)
    *terms, gradient = backends.unchecked("span_pairs", backend, [pooled, other, span_weights])(*given)
    return (terms[0], terms[1]), gradient, total


@fake(_layer_pairs)
def _(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_weights: Sequence[Tensor],
    teacher_weights: Sequence[Tensor],
    span_weights: Sequence[Tensor],
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    method: str,
    with_gradient: bool,
    backend: str,
) -> list[Tensor]:
    of_pairs = _kinds(kinds, kind_of)
    dtype = compute_dtype(students[0], teachers[0])
    terms = [
        students[0].new_empty(len(students), of_pairs[0][0].span_splits.shape[0] - 1, dtype=dtype) for _ in range(2)
    ]
    sizes = [spans.ranges.shape[0] for spans, *_ in of_pairs]
    gradients = [
        student.new_empty(size if with_gradient else 0, student.shape[1], dtype=compute_dtype(student, teacher))
        for student, teacher, size in zip(students, teachers, sizes, strict=True)
    ]
    return [*terms, *gradients, *(students[0].new_empty(size, dtype=torch.float64) for size in sizes)]


@operator("layer_pairs_gradient")
def _layer_pairs_gradient(
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad: Tensor,
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """What ``_layer_pairs`` left, times ``grad`` [L, B] -> the students' gradients [T, d_S]."""
    of_pairs = _kinds(kinds, kind_of)
    contract.layer_pairs_gradient(gradients, sums, weights, grad, of_pairs, dtype)
    made = []
    with backends.ready(grad.device):
        for gradient, total, own, factors, (spans, *_) in zip(
            gradients, sums, weights, grad.unbind(), of_pairs, strict=True
        ):
            scale = backends.unchecked("span_pairs_gradient", backend, [gradient])
            scaled = scale(gradient, factors, spans.span_rows, gradient.dtype)
            spread = backends.unchecked("pool_spans_gradient", backend, [scaled, own])
            made.append(spread(scaled, total, own, spans, dtype))
    return made


@fake(_layer_pairs_gradient)
def _(
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad: Tensor,
    kinds: Sequence[Tensor],
    kind_of: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return [
        gradient.new_empty(own.shape[0], gradient.shape[1], dtype=dtype)
        for gradient, own in zip(gradients, weights, strict=True)
    ]


def _save(ctx: Any, inputs: Any, outputs: Sequence[Tensor]) -> None:
    ctx.given = inputs.kind_of, inputs.students[0].dtype, inputs.backend
    ctx.with_gradient, ctx.count = inputs.with_gradient, len(inputs.students)
    ctx.save_for_backward(*outputs[2:], *inputs.student_weights, *inputs.kinds)


def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
    if not ctx.with_gradient:
        raise RuntimeError("layer_pairs: expected with_gradient=True for a backward, got False")
    tensors, count = list(ctx.saved_tensors), ctx.count
    kind_of, dtype, backend = ctx.given
    parts = [tensors[i * count : (i + 1) * count] for i in range(3)]
    made: list[Tensor] = _layer_pairs_gradient(*parts, grad, tensors[3 * count :], kind_of, dtype, backend)
    return made


register_list_backward(_layer_pairs, "MTALoss", _save, _backward)
