"""Which variants of the kernels there are to compile: every op is called on tensors without data, launches recorded.

Each distinct launch (kernel, dtypes, constants, divisibility, launch parameters) is a variant, specialised by Triton's
own JIT code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.gpu_model.targets import gpu
from mta_fast.contract import DIVERGENCES
from mta_fast.layout import Head, Spans, compute_dtype

if TYPE_CHECKING:
    from mta_fast.kernels._launch import Launch

VOCABULARY = 49152
LENGTHS = (256, 4096)  # tokens of a row that takes one pass, and of one that takes two
SPANS = (1000, 5000)  # of a row in pairwise form, and of one in Gram form
LONG_ROW = (20_000, 1)  # of a row that is done in strips where the pairwise form is asked for
WIDTHS, ODD_WIDTHS = (768, 1600), (577, 1601)  # student and teacher; the odd ones allow no 16-byte loads
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


@dataclass(frozen=True)
class Variant:
    """A kernel as the JIT compiles it for one launch. Plain values only: it goes to another process."""

    target: str  # key of TARGETS
    kernel: str  # entry in kernels/_table.py
    place: str  # where in that file the entry stands
    called: tuple[tuple[str, str], ...]  # (dtype, float32 matmul precision) of the ops' calls; student/teacher
    options: str  # what else makes it another variant
    blocks: dict[str, int]  # these three: the entry
    num_warps: int
    num_stages: int
    source: tuple[str, str, dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    digest: str = ""  # of all that the compiler gets: code of the kernel and what it calls, types, constants, options


def variants(target: str) -> list[Variant]:
    """Every distinct variant that the calls of ``_calls`` launch on a target."""
    from mta_fast.kernels._launch import observe

    found: dict[str, Variant] = {}
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, precision, call in _calls():
            torch.set_float32_matmul_precision(precision)
            launches: list[Launch] = []
            with observe(launches.append, execute=False, architecture=target), torch.no_grad():
                call()
            for launch in launches:
                made = _variant(launch, target)
                key = str((made.source, made.settings))
                called = (*found.get(key, made).called, (dtype, precision))
                found[key] = replace(made, called=tuple(dict.fromkeys(called)))
    finally:
        torch.set_float32_matmul_precision(before)
    kernels = list(dict.fromkeys(variant.kernel for variant in found.values()))
    return sorted(found.values(), key=lambda variant: kernels.index(variant.kernel))


def _variant(launch: Launch, target: str) -> Variant:
    """A launch specialised as ``JITFunction.run`` would: divisors of 16, ones, 64-bit numbers, do_not_specialize."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(gpu(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, launch.options
    )
    odd = any(name.endswith("width") and not attributes.get((i,)) for i, name in enumerate(signature))
    given = (kernel.cache_key, target, signature, constants, attributes, sorted(launch.options.items()))
    words = {"CAUSAL": "causal", "COUNT_PADDING": "count_padding", "WITH_GRADIENT": "gradient"}
    words |= {"S_SOFTCAP": "softcap", "IN_STRIPS": "strip"}
    options = [word for name, word in words.items() if launch.arguments.get(name)]
    if launch.arguments.get("PARTS", 1) > 1:  # by the matmul precision
        options.append(f"{launch.arguments['PARTS']} parts")
    if "DIVERGENCE" in launch.arguments:
        options.insert(0, DIVERGENCES[launch.arguments["DIVERGENCE"]])
    return Variant(
        target,
        launch.name,
        launch.place,
        called=(),
        options=", ".join([*options, *(["odd width"] if odd else [])]),
        blocks={name: launch.arguments[name] for name in launch.row.blocks if name in launch.arguments},
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        source=(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes),
        settings=launch.options,
        digest=hashlib.sha256(repr(given).encode()).hexdigest()[:32],
    )


def _calls() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(dtype, float32 matmul precision, call) of every op in every dtype.

    Only in bfloat16: options of the importance, odd widths of everything but span pairs. Span pairs see float32
    whatever the hidden states are, unless somebody pools in half precision: their odd widths are float32. Products of
    two halves don't depend on the matmul precision; the gradient of span pairs multiplies float32 in any case.
    """
    half, single = torch.bfloat16, torch.float32
    for name, dtype in DTYPES.items():
        for precision in ("highest", "high") if dtype == single else ("highest",):
            yield name, precision, partial(_importance, dtype)
            yield name, precision, partial(_pooling, dtype)
            yield name, precision, partial(_pairs, dtype, dtype, False)
            yield name, precision, partial(_alignment, dtype, dtype)
            yield name, precision, partial(_divergence, dtype, "srkl")
        for precision in ("highest",) if dtype == torch.float64 else ("highest", "high"):
            yield name, precision, partial(_pairs, dtype, dtype, True)
    for causal, count_padding in ((True, False), (False, True), (True, True)):
        yield "bfloat16", "highest", partial(_importance, half, causal=causal, count_padding=count_padding)
    yield "bfloat16", "highest", partial(_importance, half, width=ODD_WIDTHS[1])
    yield "bfloat16", "highest", partial(_pooling, half, width=ODD_WIDTHS[0])
    yield "bfloat16", "highest", partial(_alignment, half, half, widths=ODD_WIDTHS)
    yield "bfloat16", "highest", partial(_divergence, half, "srkl", capped=True)
    for kind in DIVERGENCES:
        yield "bfloat16", "highest", partial(_divergence, half, kind, VOCABULARY + 1)
    yield "bfloat16/float32", "highest", partial(_alignment, half, single)
    for with_gradient in (False, True):
        yield "float32", "highest", partial(_pairs, single, single, with_gradient, ODD_WIDTHS)
        yield "float32", "highest", partial(_pairs, single, single, with_gradient, spans=LONG_ROW)
        yield "bfloat16/float32", "highest", partial(_pairs, half, single, with_gradient)


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _spans(counts: tuple[int, int] = SPANS) -> Spans:
    """Spans of two rows: one in pairwise form, one in Gram form."""
    count, covered = sum(counts), 3000
    host = torch.tensor([[0, 0], [counts[0], counts[0]], [count, count]], dtype=torch.int32)
    return Spans(
        ranges=_empty(count, 2), span_rows=_empty(count), span_splits=_empty(3), covered=_empty(covered),
        covered_rows=_empty(covered), covered_splits=_empty(3), cover_splits=_empty(covered + 1),
        cover_spans=_empty(count), token_splits=_empty(sum(LENGTHS) + 1), host=host,
    )  # fmt: skip


def _importance(dtype: torch.dtype, width: int = WIDTHS[1], causal: bool = False, count_padding: bool = False) -> None:
    from mta_fast.kernels import token_importance

    for length in LENGTHS:
        rows = torch.tensor([[0, length]], dtype=torch.int32)
        token_importance(_empty(length, width, dtype=dtype), rows.to("meta"), rows, length, causal, count_padding)


def _pooling(dtype: torch.dtype, width: int = WIDTHS[0]) -> None:
    from mta_fast.kernels import pool_spans, pool_spans_gradient, span_weights

    spans, tokens = _spans(), sum(LENGTHS)
    rows = torch.tensor([[0, LENGTHS[0]], LENGTHS], dtype=torch.int32)
    weights, _, _ = span_weights(_empty(tokens, dtype=dtype), spans)
    pooled, span_weight, _ = pool_spans(_empty(tokens, width, dtype=dtype), weights, spans, rows.to("meta"), rows)
    pool_spans_gradient(pooled, span_weight, weights, spans, dtype)


def _pairs(
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    gradient: bool,
    widths: tuple[int, int] = WIDTHS,
    spans: tuple[int, int] = SPANS,
) -> None:
    from mta_fast.kernels import span_pairs

    made, count = _spans(spans), sum(spans)
    student, teacher = _empty(count, widths[0], dtype=student_dtype), _empty(count, widths[1], dtype=teacher_dtype)
    weights = _empty(count, dtype=compute_dtype(student, teacher))
    # the Gram form turns halves to float32 beforehand
    method = "pairwise" if student.element_size() == 2 or spans == LONG_ROW else "auto"
    span_pairs(student, teacher, weights, weights, weights, made.span_splits, made.host, method, gradient)


def _alignment(student_dtype: torch.dtype, teacher_dtype: torch.dtype, widths: tuple[int, int] = WIDTHS) -> None:
    from mta_fast.kernels import hidden_alignment

    spans, tokens = _spans(), sum(LENGTHS)
    student, teacher = _empty(tokens, widths[0], dtype=student_dtype), _empty(tokens, widths[1], dtype=teacher_dtype)
    weights = _empty(spans.covered.shape[0], dtype=compute_dtype(student, teacher))
    matrix, bias = _empty(widths[1], widths[0], dtype=student_dtype), _empty(widths[1], dtype=student_dtype)
    for gradient in (False, True):
        hidden_alignment(student, teacher, spans.covered, weights, matrix, bias, student_dtype, gradient)


def _divergence(dtype: torch.dtype, kind: str, vocabulary: int = VOCABULARY, capped: bool = False) -> None:
    from mta_fast.kernels import linear_divergence

    size, student, teacher = 512, WIDTHS[0], WIDTHS[1]
    row = _empty(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    read = kind != "cross_entropy"
    own, weight = (_empty(n, student, dtype=dtype) for n in (size, vocabulary))
    others = [_empty(n, teacher, dtype=dtype) if read else None for n in (size, vocabulary)]
    head = Head(softcap=30.0) if capped else Head()
    labels = None if read else _empty(size, dtype=torch.int64)
    for gradient in (False, True):
        linear_divergence(
            own, weight, None, others[0], others[1], None, labels, row, row, kind, 0.5, False, head, head, vocabulary,
            dtype, dtype, gradient,
        )  # fmt: skip
