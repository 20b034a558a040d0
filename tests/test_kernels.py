"""The Triton kernels against the float64 reference, in Triton's interpreter or, where there is one, on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check
from batches import EDGE_ROWS, LAYOUTS, RaggedBatch, TokenSpans, make_batch, random_rows
from torch import Tensor

from mta_fast import MTAConfig, MTALoss, reference, token_importance
from mta_fast.contract import DIVERGENCES
from mta_fast.layout import Head
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.ops.linear_divergence import linear_divergence_loss
from mta_fast.ops.pooling import normalize_weights, pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms

triton = pytest.importorskip("triton", reason="the triton backend needs the package triton")
tl = triton.language
from mta_fast import kernels  # noqa: E402
from mta_fast.kernels import _launch, _rows  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that run inside."""
    names: list[str] = []
    with _launch.observe(lambda made: names.append(made.name)):
        yield names


def words(length: int) -> tuple[int, TokenSpans]:
    """A row of one-token spans."""
    return length, [(j, j + 1) for j in range(length)]


# --- importance --------------------------------------------------------------------------------------------------

# 0, 1 and 2 tokens; around a strip of queries (32 or 64); around the longest row of one pass (256); two super-tiles
LENGTHS = [0, 1, 2, 5, 31, 32, 33, 65, 256, 257, 300]
OPTIONS = [{}, {"causal": True}, {"count_padding": True}, {"causal": True, "count_padding": True}]


def _importance_case(lengths: list[int], width: int, dtype: torch.dtype, layout: str = "right") -> RaggedBatch:
    batch = make_batch(layout, [(n, []) for n in lengths])
    batch.hidden = batch.lay([row.to(dtype) for row in random_rows(lengths, width)], padding=0.5).to(DEVICE)
    if DEVICE == "cuda" and batch.mask is not None:
        # the scores of a constant state are its products over a standard deviation of 0 + 1e-5 or so: what tensor cores
        # drop of a sum decides there which key is seen
        padding = ~batch.mask.bool()
        batch.hidden[padding.to(DEVICE)] = torch.randn(int(padding.sum()), width).to(batch.hidden)
    return batch


# float32 in every option; the others, which differ in loads and blocks, in the plain and the fullest one
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(dtype, options) for dtype in DTYPES for options in (OPTIONS if dtype == torch.float32 else OPTIONS[::3])],
    ids=str,
)
def test_importance(dtype: torch.dtype, options: dict[str, bool]) -> None:
    # float64 has small tiles: fewer tokens reach the same branches
    lengths = [1, 33, 2, 0, 270] if dtype == torch.float64 or "count_padding" in options else LENGTHS
    batch = _importance_case(lengths, 40, dtype)
    with launched() as names:
        ours = token_importance(batch.hidden, batch.mask, backend="triton", **options)
    assert ("strips" in names) == ("count_padding" not in options)
    assert names[-4:] == ["statistics", "merge_statistics", "sums", "merge_sums"]
    exact, eager = (
        token_importance(hidden, batch.mask, backend="reference", **options)
        for hidden in (batch.hidden.double(), batch.hidden)
    )
    check(ours, eager, exact)


@pytest.mark.parametrize("width", [2, 3, 64, 577, 1600, 8192])
def test_importance_of_any_width(width: int) -> None:
    # 2: the least; 577: no multiple of anything; 1,600: several blocks of the standard deviation; 8,192: the widest,
    # where the 258 tokens of two passes are dear
    lengths = [5, 40, 258] if width < 1600 else [3, 258 if width < 8192 else 40]
    for name in ("bfloat16", "float32"):
        batch = _importance_case(lengths, width, getattr(torch, name))
        check(*(token_importance(h, batch.mask, backend=b) for h, b in _sides(batch.hidden)), width=width)


def _sides(hidden: Tensor) -> Iterator[tuple[Tensor, str]]:
    yield hidden, "triton"
    yield hidden, "reference"
    yield hidden.double(), "reference"


def test_importance_of_large_means() -> None:
    # the standard deviation is 1e-3 of the mean: a difference of squares would lose it
    batch = _importance_case([5, 40], 700, torch.float32)
    hidden = batch.hidden * 1e-3 + 1
    check(*(token_importance(h, batch.mask, backend=b) for h, b in _sides(hidden)))


@pytest.mark.slow
@pytest.mark.parametrize("length", [4100, 8200])
def test_importance_of_long_rows(length: int) -> None:
    # super-tiles of 256 and 512 tokens, more columns of them than a patch has
    batch = _importance_case([3, length, 40], 16, torch.float32)
    check(*(token_importance(h, batch.mask, backend=b) for h, b in _sides(batch.hidden)))


def test_importance_with_large_super_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # rows of 530 tokens in super-tiles of 256, as rows of 4,100 have
    if DEVICE == "cpu":  # the interpreter looks the function up as it runs
        for name in ("super_side", "super_sides"):
            monkeypatch.setattr(_rows, name, lambda queries: queries * 0 + 256)
    batch = _importance_case([3, 530, 40], 16, torch.float32)
    for options in ({}, {"causal": True}):
        check(*(token_importance(h, batch.mask, backend=b, **options) for h, b in _sides(batch.hidden)))


def test_importance_layouts_and_neighbours_change_no_bit() -> None:
    lengths = [7, 1, 0, 40, 300]
    rows = random_rows(lengths, 24, dtype=torch.float32)
    alone = torch.cat([token_importance(row[None].to(DEVICE), backend="triton")[0] for row in rows])
    for layout in LAYOUTS:
        batch = make_batch(layout, [(n, []) for n in lengths])
        hidden = batch.lay(rows).to(DEVICE)
        made = token_importance(hidden, batch.mask, cu_seqlens=batch.cu_seqlens, backend="triton")
        assert torch.equal(batch.unlay(made.cpu()), alone.cpu())


def test_importance_stays_in_its_row() -> None:
    hidden = torch.randn(2, 40, 16, device=DEVICE)
    hidden[1, 2, 0] = torch.inf
    made = token_importance(hidden, backend="triton")
    assert made[0].isfinite().all()
    assert made[1].isnan().any()


def test_more_rows_than_are_counted_at_a_time() -> None:
    lengths = [3, *[0] * 126, 1, 5, 4, 0]  # 131 rows, 128 at a time
    batch = _importance_case(lengths, 8, torch.float32)
    check(*(token_importance(h, batch.mask, backend=b) for h, b in _sides(batch.hidden)))


# --- pooling -----------------------------------------------------------------------------------------------------

# one token, several, the whole row (more than a block of tokens), repeated, nested, unsorted; and a long span
POOL_ROWS = [*EDGE_ROWS, (150, [(0, 150), (149, 150), (3, 90), (3, 90)])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_weights(dtype: torch.dtype) -> None:
    batch = make_batch("left", POOL_ROWS)
    values = batch.lay([row.abs().to(dtype) for row in random_rows(batch.lengths)])
    values[4] = batch.lay([row * 0 for row in random_rows(batch.lengths)], padding=0)[4]  # a row of total 0
    spans, values = batch.spans.to(DEVICE), values.to(DEVICE)
    for ours, eager, exact in zip(*(normalize_weights(v, spans, backend=b) for v, b in _sides(values)), strict=True):
        check(ours, eager, exact)


@pytest.mark.parametrize("width", [16, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_spans(dtype: torch.dtype, width: int) -> None:
    batch = make_batch("right", POOL_ROWS)
    spans = batch.spans.to(DEVICE)
    hidden = batch.lay([row.to(dtype) for row in random_rows(batch.lengths, width)]).to(DEVICE)
    weights = batch.lay([row.abs().float() for row in random_rows(batch.lengths)], padding=0).to(DEVICE)
    weights[0, :2] = 0  # a span whose weights sum to 0
    grad = torch.randn(spans.num_spans, width, dtype=torch.float64, device=DEVICE)
    made = []
    for h, backend in _sides(hidden):
        leaf = h.detach().requires_grad_()
        pooled = pooled_spans(leaf.reshape(-1, width), weights.reshape(-1), spans, backend=backend)
        (gradient,) = torch.autograd.grad(pooled.states, leaf, grad.to(pooled.states.dtype))
        made.append((*(x.detach() for x in pooled), gradient))
    for ours, eager, exact in zip(*made, strict=True):
        check(ours, eager, exact)
    assert not made[0][3][2].any()  # a row of padding only has a gradient of 0


@pytest.mark.slow
def test_pool_a_span_of_thousands() -> None:
    batch = make_batch("packed", [(3000, [(0, 3000), (0, 1), (2999, 3000), (100, 2900)])])
    spans, hidden = batch.spans.to(DEVICE), torch.randn(3000, 40, device=DEVICE)
    weights = torch.rand(3000, device=DEVICE)
    made = []
    for h, backend in _sides(hidden):
        leaf = h.detach().requires_grad_()
        pooled = pooled_spans(leaf, weights, spans, backend=backend)
        made.append((pooled.states.detach(), *torch.autograd.grad(pooled.states.sum(), leaf)))
    for ours, eager, exact in zip(*made, strict=True):
        check(ours, eager, exact)


# --- span pairs --------------------------------------------------------------------------------------------------

# none, one (no pair), two, around a tile (32 or 64), more than a tile; 0 spans last
PAIR_COUNTS = [0, 1, 2, 31, 32, 33, 65, 0]
PAIRWISE = ["unit_parts", "pair_errors", "pair_gradients"]


def _pair_inputs(dtype: torch.dtype, d_s: int = 40, d_t: int = 70) -> tuple[Any, ...]:
    batch = make_batch("packed", [words(n) for n in PAIR_COUNTS])
    n = sum(PAIR_COUNTS)
    common = torch.randn(n, 1).double()  # a shared direction, as the spans of real models have
    student, teacher = (torch.randn(n, d).double() + common for d in (d_s, d_t))
    student[5] = 0  # a zero vector's cosine is 0
    student, teacher = (x.to(dtype).to(DEVICE) for x in (student, teacher))
    weights = torch.rand(n).to(torch.promote_types(dtype, torch.float32)).to(DEVICE)
    return student, teacher, weights, batch.spans.to(DEVICE)


def _pair_terms(student: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    leaf = student.detach().requires_grad_()
    numerator, denominator = span_pair_terms(leaf, *rest, reduction="none", **options)
    (gradient,) = torch.autograd.grad(numerator, leaf)
    return numerator.detach(), denominator, gradient


@pytest.mark.parametrize("method", ["pairwise", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_pairs(dtype: torch.dtype, method: str) -> None:
    student, teacher, weights, spans = _pair_inputs(dtype)
    with launched() as names:
        ours = _pair_terms(student, teacher, weights, spans, method=method, backend="triton")
    kernels = {"pairwise": PAIRWISE, "gram": ["gram_products", "gram_gradient"]}[method]
    assert names == [*kernels, "row_totals"]
    eager = _pair_terms(student, teacher, weights, spans, method=method, backend="reference")
    double = student.double(), teacher.double(), weights.double()
    exact = _pair_terms(*double, spans, method="pairwise", backend="reference")
    for x, y, z in zip(ours, eager, exact, strict=True):
        check(x, y, z)
    with torch.no_grad():  # without a gradient other tiles are visited
        value, _ = span_pair_terms(student, teacher, weights, spans, reduction="none", method=method, backend="triton")
    check(value, eager[0], exact[0])


@pytest.mark.parametrize("scratch", [150_000, 50_000, 1], ids=["groups", "groups and a strip", "strips"])
def test_span_pairs_with_little_scratch(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    student, teacher, weights, spans = _pair_inputs(torch.float32)
    weights[::4] *= -1  # weights of both signs: pairs count as their product does
    whole = _pair_terms(student, teacher, weights, spans, method="pairwise", backend="triton")
    monkeypatch.setattr(sys.modules["mta_fast.kernels.pairwise"], "SCRATCH_BYTES", scratch)
    with launched() as names:
        ours = _pair_terms(student, teacher, weights, spans, method="pairwise", backend="triton")
    assert names.count("pair_errors") > 1
    double = student.double(), teacher.double(), weights.double()
    exact = _pair_terms(*double, spans, method="pairwise", backend="reference")
    eager = _pair_terms(student, teacher, weights, spans, method="pairwise", backend="reference")
    assert exact[0] > 0  # else it is clamped to 0, whatever it is
    for x, y, z, w in zip(ours, eager, exact, whole, strict=True):
        check(x, y, z)
        check(w, y, z)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pairwise", "gram"])
def test_span_pairs_of_a_long_row(method: str) -> None:
    batch = make_batch("packed", [words(1500), words(3)])
    spans = batch.spans.to(DEVICE)
    student, teacher = (torch.randn(1503, d, device=DEVICE) + 1 for d in (24, 40))
    weights = torch.rand(1503, device=DEVICE)
    ours, eager = (
        _pair_terms(student, teacher, weights, spans, method=method, backend=b) for b in ("triton", "reference")
    )
    double = student.double(), teacher.double(), weights.double()
    for x, y, z in zip(ours, eager, _pair_terms(*double, spans, backend="reference"), strict=True):
        check(x, y, z)


def test_the_cost_model_picks_per_row() -> None:
    # widths 8 and 8: the Gram form from 14 spans on
    assert reference.gram_from(8, 8) == 14
    student, teacher, weights, spans = _pair_inputs(torch.float32, 8, 8)
    with launched() as names:
        ours = _pair_terms(student, teacher, weights, spans, backend="triton")
    assert names == [*PAIRWISE, "gram_products", "gram_gradient", "row_totals"]
    double = student.double(), teacher.double(), weights.double()
    exact = _pair_terms(*double, spans, backend="reference", method="pairwise")
    for x, y, z in zip(ours, _pair_terms(student, teacher, weights, spans, backend="reference"), exact, strict=True):
        check(x, y, z)


def test_span_pairs_of_two_dtypes() -> None:
    student, teacher, weights, spans = _pair_inputs(torch.float32)
    student, teacher = student.bfloat16(), teacher.half()
    for method in ("pairwise", "gram"):
        ours = _pair_terms(student, teacher, weights, spans, method=method, backend="triton")
        eager = _pair_terms(student, teacher, weights, spans, method=method, backend="reference")
        double = student.double(), teacher.double(), weights.double()
        for x, y, z in zip(ours, eager, _pair_terms(*double, spans, backend="reference"), strict=True):
            check(x, y, z)


# --- hidden alignment --------------------------------------------------------------------------------------------


def _eager_numerator(
    student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor | None
) -> Tensor:
    """Hid's numerator in plain PyTorch, as a script without this package computes it in these dtypes."""
    kind = torch.promote_types(student.dtype, matrix.dtype)
    p = F.linear(student[tokens.long()].to(kind), matrix.to(kind), None if bias is None else bias.to(kind))
    acc = torch.promote_types(kind, torch.float32)
    cosine = F.cosine_similarity(p.to(acc), teacher[tokens.long()].to(acc), dim=-1, eps=1e-30)
    return (weights.to(acc) * (1 - cosine)).sum()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float64", "float64", "float64"),
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("bfloat16", "float16", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
    ids=" ".join,
)
def test_hidden_alignment(monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str, str], bias: bool) -> None:
    monkeypatch.setattr(sys.modules["mta_fast.kernels.hidden_alignment"], "TOKEN_CHUNK", 16)  # 35 tokens: 16, 16, 3
    d_s, d_t, tokens = 24, 40, torch.arange(0, 70, 2, dtype=torch.int32, device=DEVICE)
    kinds = [getattr(torch, name) for name in dtypes]
    student, teacher = (torch.randn(70, d).to(kind).to(DEVICE) for d, kind in ((d_s, kinds[0]), (d_t, kinds[1])))
    teacher[4] = 0
    matrix = (torch.randn(d_t, d_s) / d_s**0.5).to(kinds[2]).to(DEVICE)
    vector = torch.randn(d_t).to(kinds[2]).to(DEVICE) if bias else None
    weights = torch.rand(len(tokens), device=DEVICE)
    made = []
    with launched() as names:
        for function, cast in (
            (_numerator, Tensor.clone),
            (_eager_numerator, Tensor.clone),
            (_eager_numerator, Tensor.double),
        ):
            learnt = [cast(x.detach()).requires_grad_() for x in (student, matrix, vector) if x is not None]
            value = function(learnt[0], cast(teacher), tokens, weights, learnt[1], learnt[2] if bias else None)
            made.append((value.detach(), *torch.autograd.grad(value, learnt)))
    assert names == ["align"] * 3
    for ours, eager, exact in zip(*made, strict=True):
        check(ours, eager, exact)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "bias, scale and softcap"])
def test_linear_divergence(monkeypatch: pytest.MonkeyPatch, capped: bool, name: str, dtype: str) -> None:
    module = sys.modules["mta_fast.kernels.linear_divergence"]
    monkeypatch.setattr(module, "CHUNK_LOGITS", 3 * 37)  # 8 positions: 3, 3, 2
    kind = getattr(torch, dtype)
    hidden, head, other, other_head, bias, alpha, weights = (
        torch.randn(*shape).to(kind).to(DEVICE) for shape in ((8, 24), (40, 24), (8, 19), (37, 19), (40,), (8,), (8,))
    )
    options: dict[str, Any] = {"vocabulary": 37, "divergence": name, "temperature": 2.0, "beta": 0.25}
    options |= {"alpha": alpha.float().sigmoid(), "weights": weights.float()}
    options |= {"labels": torch.arange(8, device=DEVICE) * 4, "detach_mixture": capped and name == "srkl"}
    if capped:
        options |= {"student_scale": 0.5, "student_softcap": 2.0, "teacher_softcap": 3.0}
    made = []
    with launched() as names:
        for backend, cast in (("triton", Tensor.clone), ("reference", Tensor.clone), ("reference", Tensor.double)):
            learnt = [cast(x.detach()).requires_grad_() for x in ((hidden, head, bias) if capped else (hidden, head))]
            sides = [*learnt[:2], cast(other), cast(other_head)]
            of_student = learnt[2] if capped else None
            value = linear_divergence_loss(*sides, student_bias=of_student, **options, backend=backend)
            made.append((value.detach(), *torch.autograd.grad(value, learnt)))
        frozen = [hidden.clone().requires_grad_(), head, other, other_head]
        of_student = bias if capped else None
        value = linear_divergence_loss(*frozen, student_bias=of_student, **options, backend="triton")
        assert torch.equal(torch.autograd.grad(value, frozen[0])[0], made[0][1])
    assert names == ["diverge"] * 6
    for ours, eager, exact in zip(*made, strict=True):
        check(ours, eager, exact, terms=1.0)


def test_a_label_that_is_none_reads_nothing_and_shows() -> None:
    """A label of -100 that was not left out: on a GPU nobody has looked at its value."""
    kernel = kernels.linear_divergence.__wrapped__  # type: ignore[attr-defined]  # without the check of CPU tensors
    hidden, head, row = (
        torch.randn(3, 24, device=DEVICE),
        torch.randn(37, 24, device=DEVICE),
        torch.ones(3, device=DEVICE),
    )
    labels = torch.tensor([4, -100, 37], device=DEVICE)
    values, _ = kernel(
        hidden, head, None, None, None, None, labels, row, row, "cross_entropy", 0.5, False, Head(), Head(), 37,
        torch.float32, torch.float32, True,
    )  # fmt: skip
    assert values.isnan().tolist() == [False, True, True]


def _numerator(*inputs: Any) -> Tensor:
    return hidden_alignment_numerator(*inputs, backend="triton")


def test_a_half_precision_projection_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 equal tokens in chunks of one: a bfloat16 sum would stop growing
    monkeypatch.setattr(sys.modules["mta_fast.kernels.hidden_alignment"], "TOKEN_CHUNK", 1)
    student, teacher = (torch.randn(d).bfloat16().expand(40, d).contiguous().to(DEVICE) for d in (8, 16))
    matrix = torch.randn(16, 8, device=DEVICE).bfloat16().requires_grad_()
    one, many = (
        torch.autograd.grad(
            _numerator(student, teacher, tokens, torch.ones(len(tokens), device=DEVICE), matrix, None), matrix
        )[0]
        for tokens in (torch.arange(1, device=DEVICE), torch.arange(40, device=DEVICE))
    )
    torch.testing.assert_close(many.float(), 40 * one.float(), rtol=2**-7, atol=0)


def test_small_weights_survive_float16() -> None:
    # weights as in a row of 100,000 tokens: their gradients are below float16's smallest number
    student, teacher = torch.randn(20, 8, device=DEVICE), torch.randn(20, 16, device=DEVICE)
    matrix, bias = torch.randn(16, 8, device=DEVICE), torch.randn(16, device=DEVICE)
    weights, made = torch.rand(20, device=DEVICE) * 1e-5, []
    weights[3] = 0
    for kind, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        learnt = [x.half().to(kind).requires_grad_() for x in (student, matrix, bias)]
        inputs = (teacher, torch.arange(20, device=DEVICE), weights, *learnt[1:])
        value = hidden_alignment_numerator(learnt[0], *inputs, backend=backend) * 2**16  # as a loss scaler does
        made.append(torch.autograd.grad(value, learnt))
    for ours, exact in zip(*made, strict=True):
        assert (ours.double() - exact).norm() < 3e-3 * exact.norm()


def test_autocast_chooses_the_dtype_of_the_products() -> None:
    student, teacher = torch.randn(20, 8, device=DEVICE), torch.randn(20, 16, device=DEVICE)
    matrix = torch.randn(16, 8, device=DEVICE).requires_grad_()
    inputs = (torch.arange(20, device=DEVICE), torch.ones(20, device=DEVICE), matrix, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        value = _numerator(student, teacher, *inputs)
    half = matrix.detach().bfloat16().requires_grad_()
    plain = _numerator(student.bfloat16(), teacher, *inputs[:2], half, None)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)
    (gradient,) = torch.autograd.grad(value, matrix)  # float32, where the half-precision weight's is rounded
    assert torch.equal(gradient.bfloat16(), torch.autograd.grad(plain, half)[0])


# --- the whole loss ----------------------------------------------------------------------------------------------

LOSS_ROWS = [*EDGE_ROWS, words(66)]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [(torch.float32, {}), (torch.bfloat16, {"student_pooling": "own", "count_padding": True})],
    ids=["paper, float32", "public, bfloat16"],
)
def test_loss(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    batch = make_batch("left", LOSS_ROWS)
    spans = {kind: batch.spans.to(DEVICE) for kind in ("word", "phrase")}
    padding = 0.5 if changes else torch.nan
    hidden = [
        {i: batch.lay([row.to(dtype) for row in random_rows(batch.lengths, d)], padding).to(DEVICE) for i in range(2)}
        for d in (24, 40)
    ]
    made = []
    for cast, backend in ((Tensor.clone, "triton"), (Tensor.clone, "reference"), (Tensor.double, "reference")):
        settings = {"layer_pairs": [(0, 0), (1, 1)], "granularity": ["word", "phrase"], "backend": backend}
        torch.manual_seed(1)
        loss = MTALoss(MTAConfig(**settings, **changes), 24, 40).to(DEVICE)
        loss = loss.double() if cast is Tensor.double else loss
        student, teacher = ({i: cast(h) for i, h in side.items()} for side in hidden)
        leaves = [*(h.requires_grad_() for h in student.values()), *loss.parameters()]
        output = loss(student, teacher, spans)
        made.append((output.dsa.detach(), output.hid.detach(), *torch.autograd.grad(output.loss, leaves)))
    for ours, eager, exact in zip(*made, strict=True):
        check(ours, eager, exact)


def test_launches_of_a_layer_pair() -> None:
    # one row for each path: one pass, two passes, pairwise and Gram form
    rows = [words(40), words(300), (8, [(0, 4), (4, 8)])]
    batch = make_batch("packed", rows)
    spans = batch.spans.to(DEVICE)
    student, teacher = (batch.lay(random_rows(batch.lengths, 8, dtype=torch.float32)).to(DEVICE) for _ in range(2))
    loss = MTALoss(MTAConfig(layer_pairs=[(0, 0)], backend="triton"), 8, 8).to(DEVICE)
    with launched() as names:
        loss({0: student.requires_grad_()}, {0: teacher}, {"phrase": spans}).loss.backward()
    assert names.count("align") == 1
    assert len(names) - 1 <= 16, names
    assert len(set(names)) == len(names) - 1, "only pooling runs twice, once a side"


# --- the layout of programs --------------------------------------------------------------------------------------


@triton.jit
def _list_super_tiles(out, queries, first, COUNT: tl.constexpr, TILE: tl.constexpr):  # noqa: N803
    o_pair = first + tl.arange(0, COUNT)
    row, column, _, _, _ = _rows.super_tile(queries, o_pair, TILE)
    tl.store(out + 2 * tl.arange(0, COUNT), row)
    tl.store(out + 2 * tl.arange(0, COUNT) + 1, column)


def _super_tiles(sides: int, first: int, count: int) -> list[tuple[int, int]]:
    out = torch.empty(count, 2, dtype=torch.int32, device=DEVICE)
    _list_super_tiles[(1,)](out, sides * 1024, first, COUNT=count, TILE=128)  # super-tiles of 1,024 tokens
    return [tuple(pair) for pair in out.tolist()]


def test_every_super_tile_has_one_program() -> None:
    # one column, a patch less one, a patch, a patch and one, several patches and a part of one
    for sides in (17, 23, 24, 25, 31):
        count = sides * (sides + 1) // 2
        found = _super_tiles(sides, 0, 1024)[:count]
        assert sorted(found) == [(i, j) for i in range(sides) for j in range(i, sides)]


def test_rounding_of_the_root_loses_no_super_tile() -> None:
    # a row of 8 million tokens: the root of 8 i + 1 is beyond float32's integers
    column = 12 * 650
    first = column * (column + 1) // 2
    before, after = _super_tiles(8192, first - 512, 1024)[:512], _super_tiles(8192, first, 1024)
    assert {j for _, j in before} <= set(range(column - 12, column))
    assert before[-1] == (column - 1, column - 1)
    assert len({*before, *after}) == 512 + 1024
    assert after[:13] == [(i, column + j) for i in range(2) for j in range(12)][:13]
