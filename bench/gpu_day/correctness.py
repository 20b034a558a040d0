"""Every op in every dtype, forward and backward, against float64: error / (2 x eager's error + rounding)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import error_and_bound
from bench.gpu_day.day import Day, Made, attempt
from bench.report import entry
from mta_fast import MTAConfig, MTALoss, SpanBatch, token_importance
from mta_fast.contract import DIVERGENCES
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.ops.linear_divergence import linear_divergence_loss
from mta_fast.ops.pooling import normalize_weights, pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms

TEXT = (
    "Largest error / (2 x eager's error + rounding) over the results and gradients named, all against the reference in "
    "float64 of the same values; eager: the reference (Hid: plain PyTorch) in the same dtype. At most 1 is right. Rows "
    "of 0, 1 and 2 tokens, of padding alone, without spans, around a tile and long; NaN in the padding."
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("right", "left", "packed")
LENGTHS = (7, 1, 0, 5, 33, 2, 256, 257, 700)
QUICK_LENGTHS = (9, 1, 0, 5, 2)
WIDTHS, QUICK_WIDTHS = (768, 1600), (16, 24)
HEAD, QUICK_HEAD = (300, 5000), (6, 37)  # positions and ids
NO_SPANS = 5  # a row of so many tokens has none
Results = Sequence[Tensor]
Ratio = tuple[float, str]  # and the place
Ways = Sequence[tuple[str, Callable[[Tensor], Tensor]]]  # ours, eager, exact: backend, and how its inputs are cast


@dataclass(frozen=True)
class Batch:
    """Rows of ``lengths`` tokens in one layout; spans end to end of one, two, ... tokens, and one over the row."""

    layout: str
    lengths: Sequence[int]
    mask: Tensor | None
    cu_seqlens: Tensor | None
    spans: SpanBatch
    device: str

    def lay(self, width: int, dtype: torch.dtype, padding: float = torch.nan, seed: int = 0) -> Tensor:
        """Random states of this layout; the same rows whatever the layout."""
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(n, width, generator=generator) for n in self.lengths]
        return _laid(rows, self.layout, padding).to(self.device, dtype)

    def fill(self, states: Tensor) -> Tensor:
        """The same with random states in the padding; a constant one's scores would hang on a deviation of 0."""
        return torch.where(states.isnan(), torch.randn_like(states), states)


def _laid(rows: Sequence[Tensor], layout: str, padding: float) -> Tensor:
    if layout == "packed":
        return torch.cat(list(rows))
    longest = max(map(len, rows)) + 2  # every row has padding
    out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), padding)
    for place, row in zip(out, rows, strict=True):
        start = longest - len(row) if layout == "left" else 0
        place[start : start + len(row)] = row
    return out


def batch(layout: str, lengths: Sequence[int], device: str, words: bool = False) -> Batch:
    """A batch of these rows; token j has the characters [3j, 3j + 1).

    Args:
        words: one-token spans alone.
    """
    char_spans = []
    for length in lengths:
        ranges, start = list[tuple[int, int]](), 0
        while start < length and length != NO_SPANS:
            end = min(start + (1 if words else 1 + len(ranges) % 3), length)
            ranges.append((3 * start, 3 * end - 2))
            start = end
        char_spans.append(ranges + ([(0, 3 * length - 2)] if ranges and not words else []))
    offsets = [torch.stack([3 * torch.arange(n), 3 * torch.arange(n) + 1], 1) for n in lengths]
    mask = cu_seqlens = None
    if layout == "packed":
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        spans = SpanBatch.from_char_spans(char_spans, torch.cat(offsets), cu_seqlens=cu_seqlens)
    else:
        mask = _laid([torch.ones(n) for n in lengths], layout, 0).long()
        spans = SpanBatch.from_char_spans(char_spans, _laid(offsets, layout, 0), mask)
    return Batch(layout, lengths, mask, cu_seqlens, spans.to(device), device)


def measure(day: Day) -> Iterator[Made]:
    """Op by op, dtype by dtype."""
    lengths, widths = (QUICK_LENGTHS, QUICK_WIDTHS) if day.quick else (LENGTHS, WIDTHS)
    ways: Ways = ((day.backend, Tensor.clone), ("reference", Tensor.clone), ("reference", Tensor.double))
    batches = [batch(layout, lengths, day.device) for layout in LAYOUTS]
    words = batch("packed", lengths, day.device, words=True)
    for dtype in DTYPES:
        cases: dict[str, Callable[[], Iterator[Ratio]]] = {
            "importance": partial(_importance, ways, batches, widths[1], dtype),
            "pooling": partial(_pooling, ways, batches, widths[0], dtype),
            "span pairs": partial(_span_pairs, ways, words, widths, dtype),
            "hidden alignment": partial(_hidden_alignment, ways, batches[0], widths, dtype),
            "linear divergence": partial(_linear_divergence, ways, day, widths, dtype),
            "MTALoss": partial(_loss, ways, batches, widths, dtype),
        }
        for op, ratios in cases.items():
            what = f"{op}, {str(dtype).removeprefix('torch.')}"
            yield from attempt(what, partial(_row, what, ratios))


def _row(what: str, ratios: Callable[[], Iterator[Ratio]]) -> Iterator[Made]:
    found = list(ratios())
    largest, place = max(found)
    yield entry(f"{what}: largest of {len(found)} ({place})", [largest], target="<= 1")


def ratios(made: Sequence[Results], place: str, terms: float = 0.0, width: int = 0) -> Iterator[Ratio]:
    """Of every result: error / bound and where it is; NaN counts as infinite."""
    for k, (ours, eager, exact) in enumerate(zip(*made, strict=True)):
        error, bound = error_and_bound(ours, eager, exact, terms, width)
        ratio = 0.0 if error == 0 else error / bound if bound > 0 and error == error else float("inf")
        yield ratio, f"{place}, tensor {k}"


def _importance(ways: Ways, batches: Sequence[Batch], width: int, dtype: torch.dtype) -> Iterator[Ratio]:
    for each in batches:
        states = each.lay(width, dtype)
        for causal in (False, True):
            options: dict[str, Any] = {"cu_seqlens": each.cu_seqlens, "causal": causal}
            made = [[token_importance(cast(states), each.mask, backend=b, **options)] for b, cast in ways]
            yield from ratios(made, each.layout + (", causal" if causal else ""), width=width)


def _pooling(ways: Ways, batches: Sequence[Batch], width: int, dtype: torch.dtype) -> Iterator[Ratio]:
    for each in batches:
        states = each.lay(width, dtype)
        values = each.lay(1, dtype, padding=0.0, seed=1)[..., 0].abs()
        weights = values.float().reshape(-1)
        arriving = torch.randn(each.spans.num_spans, width, dtype=torch.float64, device=each.device)
        made = [list(normalize_weights(cast(values), each.spans, backend=b)) for b, cast in ways]
        yield from ratios(made, f"{each.layout}, weights")
        made = []
        for backend, cast in ways:
            leaf = cast(states).requires_grad_()
            pooled = pooled_spans(leaf.reshape(-1, width), weights, each.spans, backend=backend)
            (gradient,) = torch.autograd.grad(pooled.states, leaf, arriving.to(pooled.states.dtype))
            made.append([*(x.detach() for x in pooled), gradient])
        yield from ratios(made, each.layout)


def _span_pairs(ways: Ways, each: Batch, widths: Sequence[int], dtype: torch.dtype) -> Iterator[Ratio]:
    count = each.spans.num_spans
    common = torch.randn(count, 1, device=each.device)  # a shared direction, as the spans of real models have
    student, teacher = ((torch.randn(count, d, device=each.device) + common).to(dtype) for d in widths)
    weights = torch.rand(count, device=each.device)
    for method in ("pairwise", "gram"):
        made = []
        for backend, cast in ways:
            leaf = cast(student).requires_grad_()
            of_exact = cast is Tensor.double
            options: dict[str, Any] = {"method": "pairwise" if of_exact else method, "backend": backend}
            given = (leaf, cast(teacher), weights.double() if of_exact else weights)
            numerator, denominator = span_pair_terms(*given, each.spans, reduction="none", **options)
            made.append([numerator.detach(), denominator, *torch.autograd.grad(numerator, leaf)])
        yield from ratios(made, method, width=widths[1])


def _hidden_alignment(ways: Ways, each: Batch, widths: Sequence[int], dtype: torch.dtype) -> Iterator[Ratio]:
    student, teacher = (each.lay(d, dtype, seed=k).flatten(0, 1) for k, d in enumerate(widths))
    tokens = each.spans.covered
    weights = torch.rand(len(tokens), device=each.device)
    matrix = (torch.randn(widths[1], widths[0], device=each.device) / widths[0] ** 0.5).to(dtype)
    bias = torch.randn(widths[1], device=each.device).to(dtype)
    ours = partial(hidden_alignment_numerator, backend=ways[0][0])
    functions: Sequence[Callable[..., Tensor]] = (ours, eager_numerator, eager_numerator)
    made = []
    for function, (_, cast) in zip(functions, ways, strict=True):
        learnt = [cast(x).requires_grad_() for x in (student, matrix, bias)]
        value = function(learnt[0], cast(teacher), tokens, weights, *learnt[1:])
        made.append([value.detach(), *torch.autograd.grad(value, learnt)])
    yield from ratios(made, each.layout, width=widths[1])


def eager_numerator(
    student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor
) -> Tensor:
    """Hid's numerator in plain PyTorch, as a script without this package computes it in these dtypes."""
    p = F.linear(student[tokens.long()], matrix, bias)
    compute = torch.promote_types(p.dtype, torch.float32)
    cosine = F.cosine_similarity(p.to(compute), teacher[tokens.long()].to(compute), dim=-1, eps=1e-30)
    return (weights.to(compute) * (1 - cosine)).sum()


def _linear_divergence(ways: Ways, day: Day, widths: Sequence[int], dtype: torch.dtype) -> Iterator[Ratio]:
    positions, ids = QUICK_HEAD if day.quick else HEAD
    scale = 3 / widths[0] ** 0.5
    hidden, head, other, other_head, bias = (
        (factor * torch.randn(shape, device=day.device)).to(dtype)
        for factor, shape in (
            (1.0, (positions, widths[0])), (scale, (ids, widths[0])), (1.0, (positions, widths[1])),
            (scale, (ids, widths[1])), (1.0, (ids,)),
        )
    )  # fmt: skip
    options: dict[str, Any] = {"labels": torch.arange(positions, device=day.device) % ids, "temperature": 2.0}
    capped = {"student_scale": 0.5, "student_softcap": 2.0, "teacher_softcap": 3.0}
    for name in DIVERGENCES:
        for more in ({}, capped):
            made = []
            for backend, cast in ways:
                learnt = [cast(x).requires_grad_() for x in (hidden, head, bias)]
                given = (*learnt[:2], cast(other), cast(other_head))
                settings: dict[str, Any] = {"divergence": name, "student_bias": learnt[2], **options, **more}
                value = linear_divergence_loss(*given, **settings, backend=backend)
                made.append([value.detach(), *torch.autograd.grad(value, learnt)])
            # a position's loss is a difference of log-probabilities, whose size is about log V
            yield from ratios(made, name + (", capped" if more else ""), terms=math.log(ids), width=widths[1])


def _loss(ways: Ways, batches: Sequence[Batch], widths: Sequence[int], dtype: torch.dtype) -> Iterator[Ratio]:
    public = {"student_pooling": "own", "count_padding": True}
    for each in batches:
        for changes in ({},) if each.layout == "packed" else ({}, public):
            sides = [{i: each.lay(d, dtype, seed=2 * i + k) for i in range(2)} for k, d in enumerate(widths)]
            if changes:  # which read the padding
                sides = [{i: each.fill(states) for i, states in side.items()} for side in sides]
            spans = dict.fromkeys(("word", "phrase"), each.spans)
            settings: dict[str, Any] = {"layer_pairs": [(0, 0), (1, 1)], "granularity": ["word", "phrase"], **changes}
            start = MTALoss(MTAConfig(**settings), *widths).to(each.device)
            made = []
            for backend, cast in ways:
                loss = MTALoss(MTAConfig(**settings, backend=backend), *widths).to(each.device)
                loss.load_state_dict(start.state_dict())
                loss = loss.double() if cast is Tensor.double else loss
                student, teacher = ({i: cast(h) for i, h in side.items()} for side in sides)
                learnt = [*(h.requires_grad_() for h in student.values()), *loss.parameters()]
                output = loss(student, teacher, spans)
                made.append([output.dsa.detach(), output.hid.detach(), *torch.autograd.grad(output.loss, learnt)])
            yield from ratios(made, each.layout + (", public" if changes else ""), width=widths[1])
