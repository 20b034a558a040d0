"""What a backend may rely on: an op's raw arguments are checked before anything reads them.

One function per op, named and called as in ``mta_fast/reference.py``. Shapes, dtypes and devices are read on the host.
The values of index tensors are looked at where they lie on the CPU; on a GPU that would synchronise, so there the
caller answers for them: ``SpanBatch`` and ``Rows`` make them on the CPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mta_fast.choices import check_choice
from mta_fast.errors import InputError
from mta_fast.layout import AlignmentGradient, DivergenceGradient, Head, Spans, has_capacities

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIVERGENCES = ("forward_kl", "reverse_kl", "skl", "srkl", "jsd", "cross_entropy")
METHODS = ("auto", "pairwise", "gram")
MOST = 2**31 - 1  # tokens, spans and features: indices are int32

_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A backend's function behind the check of its op.

    Raises (when it is called):
        InputError: an argument is not what the op takes.
    """
    check = CHECKS[function.__name__]

    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        check(*args, **options)
        return function(*args, **options)

    call.unchecked = function  # type: ignore[attr-defined]
    return call


def check_given(op: str, arguments: Sequence[Any]) -> None:
    """No tensor is None, which an op's schema lets through, but for those that need not be there."""
    for name, value in zip(_needed(op), arguments, strict=False):
        if value is None and name is not None:
            raise InputError(f"{name}: expected a tensor, got None")


@functools.cache
def _needed(op: str) -> list[str | None]:
    """The names of an op's arguments; None in place of those that need not be there."""
    parameters = inspect.signature(CHECKS[op]).parameters.values()
    return [None if "None" in parameter.annotation else parameter.name for parameter in parameters]


def as_spans(tensors: Sequence[Tensor]) -> Spans:
    """The index tensors of a SpanBatch, which an op takes as a list."""
    return Spans(*unpacked("spans", tensors, Spans._fields))


def unpacked(name: str, tensors: Sequence[Tensor], fields: Sequence[str]) -> Sequence[Tensor]:
    """A list of tensors that an op takes as one argument, of the right length and without a None."""
    if len(tensors) != len(fields):
        raise InputError(f"{name}: expected {len(fields)} tensors ({', '.join(fields)}), got {len(tensors)}")
    for field, tensor in zip(fields, tensors, strict=True):
        if tensor is None:
            raise InputError(f"{name}: expected a tensor as {field}, got None")
    return tensors


# --- the ops -----------------------------------------------------------------------------------------------------


def token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool
) -> None:
    """hidden [T, d >= 2], rows and rows_host [B, 2] int32."""
    _floating("hidden", hidden, (None, None))
    if hidden.shape[1] < 2:
        raise InputError(f"hidden: expected a width of at least 2, got {hidden.shape[1]}")
    count("seq_len", seq_len)
    _rows(rows, rows_host, hidden)
    if count_padding:
        _padded_rows(rows_host, seq_len, hidden.shape[0])


def span_weights(values: Tensor, spans: Spans) -> None:
    """values [T]."""
    _floating("values", values, (None,))
    _spans(spans, values)


def pool_spans(hidden: Tensor, weights: Tensor, spans: Spans, rows: Tensor, rows_host: Tensor) -> None:
    """hidden [T, d], weights [T]."""
    _floating("hidden", hidden, (None, None))
    _floating("weights", weights, (hidden.shape[0],), hidden)
    _spans(spans, hidden)
    _rows(rows, rows_host, hidden)
    _same_size("rows", rows, len(spans.span_splits) - 1, "rows, as in spans.span_splits")


def pool_spans_gradient(grad: Tensor, span_weight: Tensor, weights: Tensor, spans: Spans, dtype: torch.dtype) -> None:
    """grad [N, d], span_weight [N], weights [T]."""
    _floating("weights", weights, (None,))
    _spans(spans, weights)
    _floating("grad", grad, (len(spans.ranges), None), weights)
    _floating("span_weight", span_weight, (len(spans.ranges),), weights)
    _dtype("dtype", dtype)


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
) -> None:
    """student [N, d_S], teacher [N, d_T], the others [N]; span_splits [B + 1] int32, host [B + 1, 2]."""
    _floating("student", student, (None, None))
    size = student.shape[0]
    _floating("teacher", teacher, (size, None), student)
    for name, tensor in (("weights", weights), ("student_norm", student_norm), ("teacher_norm", teacher_norm)):
        _floating(name, tensor, (size,), student)
    _index("span_splits", span_splits, (None,), student.device)
    _splits_of_host(span_splits, host, size)
    _method(method, host)


def _method(method: str, host: Tensor) -> None:
    """A form of the span pairs; the Gram form is taken row by row of the lengths on the host."""
    check_choice("method", method, METHODS)
    if method == "gram" and has_capacities(host):
        raise InputError("method: expected 'auto' or 'pairwise' for spans with capacities, got 'gram'")


def kinds(given: int, each: int, kind_of: Sequence[int]) -> None:
    """kind_of: of which of the ``given / each`` kinds of spans a layer pair is."""
    if not given or given % each or not kind_of or not all(0 <= kind < given // each for kind in kind_of):
        raise InputError(
            f"kinds, kind_of: expected {each} tensors a kind, and the kind of each layer pair, got {given} tensors and "
            f"{list(kind_of)}"
        )


def layer_weights(
    hidden: Sequence[Tensor],
    hidden_of: Sequence[int],
    kinds: Sequence[tuple[Spans, Tensor, Tensor]],
    seq_len: int,
    count_padding: bool,
) -> None:
    """hidden: [T, d >= 2] of each layer; hidden_of: which of them a layer pair has; spans and rows of each pair."""
    _lists({"hidden": hidden}, len(hidden) or 1)
    if len(hidden_of) != len(kinds) or sorted(set(hidden_of)) != list(range(len(hidden))):
        raise InputError(
            f"hidden_of: expected one of {len(hidden)} layers for each of {len(kinds)} layer pairs, and each layer at "
            f"least once, got {list(hidden_of)}"
        )
    _floating("hidden", hidden[0], (None, None))
    for states in hidden:
        _floating("hidden", states, (hidden[0].shape[0], None), hidden[0])
        if states.shape[1] < 2:
            raise InputError(f"hidden: expected a width of at least 2, got {states.shape[1]}")
    count("seq_len", seq_len)
    _kinds(kinds, hidden[0])
    if count_padding:
        for _, _, rows_host in {id(kind): kind for kind in kinds}.values():
            _padded_rows(rows_host, seq_len, hidden[0].shape[0])


def layer_pairs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_weights: Sequence[Tensor],
    teacher_weights: Sequence[Tensor],
    span_weights: Sequence[Tensor],
    kinds: Sequence[tuple[Spans, Tensor, Tensor]],
    method: str,
) -> None:
    """Of each layer pair: student [T, d_S], teacher [T, d_T], both's weights [T], span_weights [N], spans and rows."""
    lists = {"students": students, "teachers": teachers, "student_weights": student_weights}
    lists |= {"teacher_weights": teacher_weights, "span_weights": span_weights}
    _lists(lists, len(kinds))
    _floating("students", students[0], (None, None))
    tokens, own = students[0].shape[0], students[0]
    _kinds(kinds, own)
    _method(method, kinds[0][0].host)
    for student, teacher, first, second, weights, (spans, *_) in zip(*lists.values(), kinds, strict=True):
        _floating("students", student, (tokens, None), own)
        _floating("teachers", teacher, (tokens, None), own)
        _floating("student_weights", first, (tokens,), own)
        _floating("teacher_weights", second, (tokens,), own)
        _floating("span_weights", weights, (spans.ranges.shape[0],), own)
        if student.dtype is not own.dtype:
            raise InputError(f"students: expected one dtype, got {own.dtype} and {student.dtype}")
    if len({torch.float64 in (s.dtype, t.dtype) for s, t in zip(students, teachers, strict=True)}) > 1:
        raise InputError("teachers: expected float64 states in all layer pairs or in none, got both")


def layer_pairs_gradient(
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad: Tensor,
    kinds: Sequence[tuple[Spans, Tensor, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Of each layer pair: gradients [N, d_S], sums [N], weights [T]; grad [L, B]."""
    _lists({"gradients": gradients, "sums": sums, "weights": weights}, len(kinds))
    _floating("weights", weights[0], (None,))
    own = weights[0]
    _kinds(kinds, own)
    for gradient, total, other, (spans, *_) in zip(gradients, sums, weights, kinds, strict=True):
        _floating("gradients", gradient, (spans.ranges.shape[0], None), own)
        if not gradient.shape[1]:
            raise InputError("gradients: expected a width of at least 1, got 0")
        _floating("sums", total, (spans.ranges.shape[0],), own)
        _floating("weights", other, own.shape, own)
    _floating("grad", grad, (len(kinds), kinds[0][0].span_splits.shape[0] - 1), own)
    _dtype("dtype", dtype)


def _lists(lists: dict[str, Sequence[Tensor]], size: int) -> None:
    for name, tensors in lists.items():
        if len(tensors) != size or any(tensor is None for tensor in tensors):
            raise InputError(f"{name}: expected {size} tensors, one a layer pair, got {len(tensors)} or a None")


def _kinds(kinds: Sequence[tuple[Spans, Tensor, Tensor]], tokens: Tensor) -> None:
    """Spans and rows of all layer pairs, each kind looked at once; as many rows in all."""
    for spans, rows, rows_host in {id(kind): kind for kind in kinds}.values():
        _spans(spans, tokens)
        _rows(rows, rows_host, tokens)
        _same_size("rows", rows, spans.span_splits.shape[0] - 1, "rows, as in spans.span_splits")
        _same_size("rows", rows, kinds[0][1].shape[0], "rows, as in the first kind of spans")


def span_pairs_gradient(gradient: Tensor, grad: Tensor, span_rows: Tensor, dtype: torch.dtype) -> None:
    """gradient [N, d_S], grad [B], span_rows [N] int32."""
    _floating("gradient", gradient, (None, None))
    _floating("grad", grad, (None,), gradient)
    _index("span_rows", span_rows, (gradient.shape[0],), gradient.device)
    _within("span_rows", span_rows, grad.shape[0])
    _dtype("dtype", dtype)


def hidden_alignment(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    matmul_dtype: torch.dtype,
    with_gradient: bool = False,
) -> None:
    """student [T, d_S], teacher [T, d_T], tokens and weights [C], proj_weight [d_T, d_S], proj_bias [d_T]."""
    _floating("student", student, (None, None))
    _floating("teacher", teacher, (student.shape[0], None), student)
    if 0 in (student.shape[1], teacher.shape[1]):
        raise InputError(
            f"student, teacher: expected widths of at least 1, got {student.shape[1]} and {teacher.shape[1]}"
        )
    _tokens(tokens, student.shape[0], student.device)
    _floating("weights", weights, (tokens.shape[0],), student)
    _floating("proj_weight", proj_weight, (teacher.shape[1], student.shape[1]), student)
    if proj_bias is not None:
        _floating("proj_bias", proj_bias, (teacher.shape[1],), student)
    _dtype("matmul_dtype", matmul_dtype)


def hidden_alignment_gradient(
    gradient: AlignmentGradient,
    tokens: Tensor,
    grad: Tensor,
    num_tokens: int,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> None:
    """gradient: rows [C, d_S], weight [d_T, d_S], bias [d_T] or [0]; tokens [C]; grad: one value."""
    rows, weight, bias = gradient
    _floating("gradient.weight", weight, (None, None))
    _floating("gradient.student", rows, (None, weight.shape[1]), weight)
    _floating("gradient.bias", bias, (weight.shape[0] if bias.numel() else 0,), weight)
    if grad.numel() != 1 or grad.dtype not in FLOATS or grad.device != weight.device:
        raise InputError(f"grad: expected one floating value on {weight.device}, got {_described(grad)}")
    count("num_tokens", num_tokens)
    _tokens(tokens, num_tokens, weight.device)
    _same_size("tokens", tokens, rows.shape[0], "tokens, as in gradient.student")
    _dtype("student_dtype", student_dtype)
    _dtype("weight_dtype", weight_dtype)
    _dtype("bias_dtype", bias_dtype)


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
) -> None:
    """student [M, d_S], student_weight [V_S, d_S], bias [V_S]; the teacher's likewise; labels, alpha, factors [M]."""
    check_choice("divergence", divergence_name, DIVERGENCES)
    check_head("student", student, student_weight, student_bias, student, vocabulary)
    size = student.shape[0]
    _floating("alpha", alpha, (size,), student)
    _floating("factors", factors, (size,), student)
    if divergence_name == "cross_entropy":
        if labels is None or teacher is not None or teacher_weight is not None or teacher_bias is not None:
            raise InputError("labels: expected labels and no teacher with cross_entropy, got others")
        if labels.dtype != torch.int64 or labels.device != student.device:
            raise InputError(f"labels: expected int64 on {student.device}, got {_described(labels)}")
        _shape("labels", labels, (size,))
        _within("labels", labels, vocabulary)
    elif labels is not None or teacher is None or teacher_weight is None:
        raise InputError(f"teacher: expected states and a head, and no labels, with {divergence_name}, got others")
    else:
        _floating("teacher", teacher, (size, None), student)
        check_head("teacher", teacher, teacher_weight, teacher_bias, student, vocabulary)
    if not 0 < beta < 1:
        raise InputError(f"beta: expected a number between 0 and 1, got {beta}")
    _heads(student_head, teacher_head)
    _dtype("matmul_dtype", matmul_dtype)
    _dtype("teacher_matmul_dtype", teacher_matmul_dtype)


def _heads(student_head: Head, teacher_head: Head) -> None:
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        if not head.temperature > 0:
            raise InputError(f"{side}_temperature: expected a number > 0, got {head.temperature}")
        if not head.softcap >= 0:
            raise InputError(f"{side}_softcap: expected a number >= 0, got {head.softcap}")


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, beside: Tensor, vocabulary: int) -> None:
    """States [M, d], head [V, d] and bias [V] of one model, and no more ids than the head has."""
    _floating(side, hidden, (None, None), beside)
    if not hidden.shape[1]:
        raise InputError(f"{side}: expected a width of at least 1, got 0")
    _floating(f"{side}_weight", weight, (None, hidden.shape[1]), beside)
    if bias is not None:
        _floating(f"{side}_bias", bias, (weight.shape[0],), beside)
    if not 1 <= vocabulary <= weight.shape[0]:
        raise InputError(
            f"vocabulary: expected from 1 to {weight.shape[0]} ids, as {side}_weight has, got {vocabulary}"
        )


def linear_divergence_gradient(
    gradient: DivergenceGradient,
    grad: Tensor,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> None:
    """gradient: student [M, d_S], weight [V_S, d_S], bias [V_S] or [0]; grad: one value."""
    student, weight, bias = gradient
    _floating("gradient.weight", weight, (None, None))
    _floating("gradient.student", student, (None, weight.shape[1]), weight)
    _floating("gradient.bias", bias, (weight.shape[0] if bias.numel() else 0,), weight)
    if grad.numel() != 1 or grad.dtype not in FLOATS or grad.device != weight.device:
        raise InputError(f"grad: expected one floating value on {weight.device}, got {_described(grad)}")
    _dtype("student_dtype", student_dtype)
    _dtype("weight_dtype", weight_dtype)
    _dtype("bias_dtype", bias_dtype)


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
) -> None:
    """student [L >= 1, M, d_S], student_weight [V_S, d_S], bias [V_S]; the teacher's likewise."""
    _floating("student", student, (None, None, None))
    _floating("teacher", teacher, (*student.shape[:2], None), student)
    if not student.shape[0]:
        raise InputError("student: expected the states of at least 1 layer, got 0")
    for side, states, weight, bias in (
        ("student", student, student_weight, student_bias),
        ("teacher", teacher, teacher_weight, teacher_bias),
    ):
        check_head(side, states[0], weight, bias, student, vocabulary)
    if not tau > 0:
        raise InputError(f"tau: expected a temperature > 0, got {tau}")
    _heads(student_head, teacher_head)
    _dtype("matmul_dtype", matmul_dtype)
    _dtype("teacher_matmul_dtype", teacher_matmul_dtype)


def entropy_weights(logits: Tensor) -> None:
    """logits [..., V >= 2]."""
    if logits is None:
        raise InputError("logits: expected a tensor, got None")
    if logits.dtype not in FLOATS or logits.ndim == 0 or logits.layout != torch.strided:
        raise InputError(f"logits: expected a dense floating tensor [..., V], got {_described(logits)}")
    if logits.shape[-1] < 2:
        raise InputError(f"logits: expected a vocabulary of at least 2, got {logits.shape[-1]}")
    _sizes("logits", logits)


def gram_from(student_dim: int, teacher_dim: int) -> int:
    """The cost model: from how many spans in a row on the centred Gram form has fewer products, forward and backward.

    Pairwise 2 N^2 (2 d_S + d_T); Gram 2 N (2 d_S^2 + 2 d_S d_T + d_T^2). From N = 1,977 on for 768/1600.
    """
    gram = 2 * student_dim**2 + 2 * student_dim * teacher_dim + teacher_dim**2
    return gram // (2 * student_dim + teacher_dim) + 1


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        token_importance,
        span_weights,
        pool_spans,
        pool_spans_gradient,
        span_pairs,
        span_pairs_gradient,
        hidden_alignment,
        hidden_alignment_gradient,
        linear_divergence,
        linear_divergence_gradient,
        trajectory_divergence,
    )
}


# --- tensors -----------------------------------------------------------------------------------------------------


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _floating(name: str, tensor: Tensor, shape: tuple[int | None, ...], beside: Tensor | None = None) -> None:
    """A dense floating tensor of this shape (None: any size), on the device of ``beside``."""
    if tensor.dtype not in FLOATS or tensor.layout is not torch.strided:
        raise InputError(
            f"{name}: expected a dense tensor of float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    _shape(name, tensor, shape)
    if beside is not None and tensor.device != beside.device:
        raise InputError(f"{name}: expected on {beside.device}, got {tensor.device}")


def _index(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """An int32 tensor of this shape on ``device``."""
    if tensor.shape == shape and tensor.dtype is torch.int32 and tensor.layout is torch.strided:
        if tensor.device == device and max(shape) <= MOST:  # a shape without None
            return
    if tensor.dtype is not torch.int32 or tensor.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor of int32, got {tensor.dtype}; use .int()")
    _shape(name, tensor, shape)
    if tensor.device != device:
        raise InputError(f"{name}: expected on {device}, got {tensor.device}")


def _host_table(name: str, host: Tensor, rows: int | None) -> None:
    """[rows, 2] int32, or [rows, 3] with capacities."""
    width = 3 if host.ndim == 2 and host.shape[1] == 3 else 2
    _index(name, host, (rows, width), host.device)


def _shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:
        for n, m in zip(shape, got, strict=True):  # no generator: every tensor of every op comes by here
            if n is not None and n != m:
                fits = False
    if not fits:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{name}: expected shape [{expected}], got {list(got)}")
    _sizes(name, tensor)


def _sizes(name: str, tensor: Tensor) -> None:
    shape = tensor.shape
    if shape and max(shape) > MOST:
        raise InputError(f"{name}: expected sizes below 2^31, got {list(shape)}")


def _same_size(name: str, tensor: Tensor, size: int, what: str) -> None:
    if tensor.shape[0] != size:
        raise InputError(f"{name}: expected {size} {what}, got {tensor.shape[0]}")


def _dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise InputError(f"{name}: expected a floating dtype, got {dtype}")


def count(name: str, value: int) -> None:
    """A number of tokens."""
    if not 0 <= value <= MOST:
        raise InputError(f"{name}: expected a number from 0 to 2^31 - 1, got {value}")


# --- values, where they lie on the CPU ---------------------------------------------------------------------------


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _values(tensor: Tensor) -> npt.NDArray[np.int64]:
    return tensor.numpy().astype(np.int64)


def _within(name: str, tensor: Tensor, bound: int) -> None:
    """Every value is in [0, bound)."""
    if not _readable(tensor) or not tensor.numel():
        return
    low, high = map(int, torch.aminmax(tensor))
    if low < 0 or high >= bound:
        raise InputError(f"{name}: expected indices from 0 to {bound - 1}, got {low if low < 0 else high}")


def _without_rest(spans: Spans) -> Spans:
    """The spans of a batch on the CPU without what fills them up to their capacities."""
    n, c = spans.span_splits[-1:].tolist(), spans.covered_splits[-1:].tolist()
    if not n or not c or not 0 <= n[0] <= len(spans.ranges) or not 0 <= c[0] <= len(spans.covered):
        raise InputError(f"spans: expected splits within their capacities, got {n} spans and {c} covered tokens")
    incidences = int(spans.cover_splits[c[0]])
    return spans._replace(
        ranges=spans.ranges[: n[0]],
        span_rows=spans.span_rows[: n[0]],
        covered=spans.covered[: c[0]],
        covered_rows=spans.covered_rows[: c[0]],
        cover_splits=spans.cover_splits[: c[0] + 1],
        cover_spans=spans.cover_spans[: max(0, incidences)],
    )


def _splits(name: str, tensor: Tensor, total: int, bounded: bool = False) -> None:
    """Splits [n + 1]: 0 first, never decreasing, ``total`` last; ``bounded``: at most ``total``."""
    if not tensor.shape[0]:
        raise InputError(f"{name}: expected at least 1 value, got none")
    if not _readable(tensor):
        return
    values = _values(tensor)
    wrong = values[-1] > total if bounded else values[-1] != total
    if values[0] != 0 or wrong or (np.diff(values) < 0).any():
        least = "at most " if bounded else ""
        raise InputError(f"{name}: expected 0 first, no decrease and {least}{total} last, got {_some(values)}")


def _some(values: npt.NDArray[Any]) -> str:
    return str(values.tolist()) if values.size <= 8 else f"{values[:4].tolist()} ... {values[-4:].tolist()}"


def _tokens(tokens: Tensor, bound: int, device: torch.device) -> None:
    """Distinct int32 or int64 indices [C] below ``bound``."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"tokens: expected int32 or int64, got {tokens.dtype}")
    _shape("tokens", tokens, (None,))
    if tokens.device != device:
        raise InputError(f"tokens: expected on {device}, got {tokens.device}")
    _within("tokens", tokens, bound)
    if _readable(tokens):
        values = _values(tokens)
        if (np.diff(values) <= 0).any() and len(np.unique(values)) < len(values):
            raise InputError("tokens: expected distinct indices, got one twice")


def _rows(rows: Tensor, rows_host: Tensor, hidden: Tensor) -> None:
    """rows [B, 2] (start, length) and the same on the CPU: ascending, apart, within the tokens."""
    _host_table("rows_host", rows_host, None)
    _index("rows", rows, (rows_host.shape[0], 2), hidden.device)
    if not _readable(rows_host):
        return
    values = _values(rows_host[:, :2])
    start, length = values[values[:, 1] != 0].T
    if (start < np.append(0, (start + length)[:-1])[: len(start)]).any() or (values < 0).any():
        raise InputError(f"rows_host: expected (start, length) that ascend and don't overlap, got {_some(values)}")
    if (values.sum(1) > hidden.shape[0]).any():
        raise InputError(f"rows_host: expected rows within the {hidden.shape[0]} tokens, got {_some(values)}")
    if has_capacities(rows_host) and len(values):
        most = _values(rows_host[:, 2])
        if (most != most[0]).any() or (values[:, 1] > most).any():
            raise InputError(f"rows_host: expected rows of at most {_some(most)} tokens, got {_some(values[:, 1])}")
    if _readable(rows) and not torch.equal(rows, rows_host[:, :2]):
        raise InputError(f"rows: expected what rows_host holds, {_some(values)}, got {_some(_values(rows))}")


def _padded_rows(rows_host: Tensor, seq_len: int, tokens: int) -> None:
    """Each row within its own ``seq_len`` positions."""
    if not _readable(rows_host):
        return
    first = np.arange(len(rows_host), dtype=np.int64) * seq_len
    start, length = _values(rows_host[:, :2]).T
    wrong = (start < first) | (start + length > first + seq_len) | (first + seq_len > tokens)
    if wrong.any():
        b = int(wrong.argmax())
        raise InputError(
            f"rows_host, seq_len: expected row {b} within its {seq_len} positions of {tokens}, got "
            f"{int(length[b])} tokens from {int(start[b])}"
        )


def _splits_of_host(span_splits: Tensor, host: Tensor, size: int, prefix: str = "") -> None:
    _host_table(f"{prefix}host", host, span_splits.shape[0])
    bounded = has_capacities(host)
    _splits(f"{prefix}span_splits", span_splits, size, bounded)
    if _readable(host):
        _splits(f"{prefix}host", host[:, 0], size, bounded)
        if bounded and len(host) > 1:
            most, counts = _values(host[:, 2]), np.diff(_values(host[:, 0]))
            if (most != most[1] * np.arange(len(most))).any() or (counts > most[1]).any():
                raise InputError(
                    f"{prefix}host: expected at most as many spans a row in its third column as in its first, got "
                    f"{_some(most)} and {_some(_values(host[:, 0]))}"
                )
        if _readable(span_splits) and not torch.equal(host[:, 0], span_splits):
            raise InputError(
                f"{prefix}host: expected span_splits in its first column, got {_some(_values(host[:, 0]))}"
            )


def _spans(spans: Spans, tokens: Tensor) -> None:
    """The index tensors of spans over ``tokens`` [T, ...]."""
    device, size = tokens.device, tokens.shape[0]
    _index("spans.ranges", spans.ranges, (None, 2), device)
    _index("spans.span_splits", spans.span_splits, (None,), device)
    _index("spans.covered", spans.covered, (None,), device)
    _index("spans.cover_spans", spans.cover_spans, (None,), device)
    n, rows, covered = spans.ranges.shape[0], spans.span_splits.shape[0], spans.covered.shape[0]
    _index("spans.span_rows", spans.span_rows, (n,), device)
    _index("spans.covered_rows", spans.covered_rows, (covered,), device)
    _index("spans.covered_splits", spans.covered_splits, (rows,), device)
    _index("spans.cover_splits", spans.cover_splits, (covered + 1,), device)
    _index("spans.token_splits", spans.token_splits, (size + 1,), device)
    _splits_of_host(spans.span_splits, spans.host, n, "spans.")
    if not _readable(spans.ranges):
        return
    if has_capacities(spans.host):  # what lies beyond the last row's is never read
        spans = _without_rest(spans)
        n, covered = spans.ranges.shape[0], spans.covered.shape[0]
    start, end = _values(spans.ranges).T
    _within("spans.ranges", spans.ranges, size + 1)
    if (start > end).any():
        u = int((start > end).argmax())
        raise InputError(f"spans.ranges: expected start <= end, got ({start[u]}, {end[u]}) in row {u}")
    _within("spans.span_rows", spans.span_rows, rows - 1)
    _within("spans.covered", spans.covered, size)
    if (np.diff(_values(spans.covered)) <= 0).any():
        raise InputError(f"spans.covered: expected ascending indices, got {_some(_values(spans.covered))}")
    _within("spans.covered_rows", spans.covered_rows, rows - 1)
    _splits("spans.covered_splits", spans.covered_splits, covered)
    incidences = len(spans.cover_spans)
    _splits("spans.cover_splits", spans.cover_splits, incidences)
    _splits("spans.token_splits", spans.token_splits, incidences)
    _within("spans.cover_spans", spans.cover_spans, n)
    totals = np.append(0, np.cumsum(end - start))[_values(spans.span_splits)]
    if _readable(spans.host) and (_values(spans.host)[:, 1] != totals).any():
        raise InputError(
            f"spans.host: expected the running number of tokens in the ranges, {_some(totals)}, in its second column, "
            f"got {_some(_values(spans.host)[:, 1])}"
        )
