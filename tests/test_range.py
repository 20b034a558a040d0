"""Weights and states of any size: where float32 can't hold a square or a sum, results are still those of float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from batches import make_batch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mta_fast import (
    MTAConfig,
    MTALoss,
    _extension,
    hidden_alignment_loss,
    pool_spans,
    reference,
    span_pair_loss,
    token_importance,
)
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.ops.pooling import normalize_weights, pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms

TOKENS = 8
SPANS = [*((j, j + 2) for j in range(TOKENS - 1)), (0, 1), (2, 7)]
BATCH = make_batch("packed", [(TOKENS, SPANS)])
# squares vanish from 1e-22 and overflow from 1.8e19; the ends are those the pages promise
SCALES = [1e-30, 1e-22, 1e19, 1e30]


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and (reason := _extension.why_missing()):
        pytest.skip(reason)
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton backend needs the package triton")
    return str(request.param)


def _some_scaled(rows: int, width: int, scale: float) -> Tensor:
    """Rows of three sizes beside each other: 1, the scale, its root."""
    states = torch.randn(rows, width).double() + 0.3
    states[::3] *= scale
    states[1::6] *= scale**0.5
    return states


def _results(
    inputs: dict[str, Tensor], dtype: torch.dtype, backend: str, oracle: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Values and gradients of every op, of inputs rounded to ``dtype``; ``oracle``: the same inputs in float64."""
    given = {name: x.to(dtype) for name, x in inputs.items()}
    if oracle:
        given = {name: x.double() for name, x in given.items()}
    hidden, projection = (given[name].requires_grad_() for name in ("hidden", "projection"))
    yield "importance", token_importance(hidden[None], backend=backend)[0]
    pooled = pooled_spans(hidden, given["weights"], BATCH.spans, backend=backend)
    yield "pooled", pooled.states.detach()
    yield "norm", pooled.norm
    yield "gradient of pooling", torch.autograd.grad(pooled.states.sum(), hidden)[0]
    spans = given["student"].requires_grad_(), given["teacher"], given["span_weights"]
    for method in ("pairwise", "gram"):
        value, _ = span_pair_terms(*spans, BATCH.spans, reduction="none", method=method, backend=backend)
        yield method, value.detach()
        yield f"gradient of {method}", torch.autograd.grad(value, spans[0])[0]
    tokens = torch.arange(TOKENS, dtype=torch.int32)
    bias = given["bias"].requires_grad_()
    alignment = hidden, given["teacher_hidden"], tokens, given["weights"], projection
    for leaves in ((hidden, projection), (hidden, projection, bias)):
        value = hidden_alignment_numerator(*alignment, *leaves[2:], *[None] * (3 - len(leaves)), backend=backend)
        op = "alignment" if len(leaves) == 2 else "alignment with a bias"
        yield op, value.detach()
        for name, gradient in zip(("student", "weight", "bias"), torch.autograd.grad(value, leaves), strict=False):
            yield f"gradient of {op} to the {name}", gradient


def _inputs(scale: float) -> dict[str, Tensor]:
    return {
        "hidden": _some_scaled(TOKENS, 24, scale),
        "teacher_hidden": _some_scaled(TOKENS, 40, scale),
        "student": _some_scaled(len(SPANS), 24, scale),
        "teacher": _some_scaled(len(SPANS), 40, scale),
        "projection": torch.randn(40, 24).double() * 0.2,
        "bias": torch.randn(40).double(),
        "weights": torch.rand(TOKENS).double(),
        "span_weights": torch.rand(len(SPANS)).double(),
    }


def _error(ours: Tensor, exact: Tensor) -> float:
    """Largest error of a row relative to the row: rows differ by sixty orders of magnitude."""
    ours, exact = ours.double(), exact.double()
    size = exact.abs().amax(-1, keepdim=True)
    return float(((ours - exact) / torch.where(size == 0, 1.0, size)).abs().max())


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's, of branches not taken
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_every_op_at_every_scale(scale: float, dtype: torch.dtype, backend: str) -> None:
    inputs = _inputs(scale)
    exact = dict(_results(inputs, dtype, "reference", oracle=True))
    for name, ours in _results(inputs, dtype, backend):
        # gradients of bfloat16 inputs are bfloat16; some backends round dp too
        allowed = 3e-2 if dtype == torch.bfloat16 else 2e-5
        assert _error(ours, exact[name]) < allowed, name


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64(scale: float, backend: str) -> None:
    spans = torch.randn(len(SPANS), 24).double(), torch.randn(len(SPANS), 40).double(), torch.rand(len(SPANS)).double()
    made = []
    for factor in (1.0, scale):
        student = (spans[0] * factor).requires_grad_()
        terms = student, spans[1] * factor, spans[2]
        value, _ = span_pair_terms(*terms, BATCH.spans, reduction="none", method="pairwise", backend=backend)
        norm = pooled_spans(student[:TOKENS], spans[2][:TOKENS], BATCH.spans, backend=backend).norm
        made.append((value.detach(), torch.autograd.grad(value, student)[0] * factor, norm / factor))
    for plain, scaled in zip(*made, strict=True):
        assert _error(scaled, plain) < 1e-11


@pytest.mark.parametrize(
    "weights",
    [[1e-40, 3e-40, 1e-45, 2.8e-45, 1e-39, 0, 0, 0], [1e38, 3e38, 3e38, 2e38, 1e38, 1e-45, 3e38, 0]],
    ids=["subnormal", "sums beyond float32"],
)
def test_scale_of_weights_does_not_matter(weights: list[float], backend: str) -> None:
    w = torch.tensor(weights)
    hidden = torch.randn(TOKENS, 5, requires_grad=True)
    pooled, _ = pool_spans(hidden, w, BATCH.spans, backend=backend)
    (gradient,) = torch.autograd.grad(pooled.square().sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    exact, _ = pool_spans(double, w.double() * 2.0**200, BATCH.spans, backend="reference")
    (expected,) = torch.autograd.grad(exact.square().sum(), double)
    torch.testing.assert_close(pooled.double(), exact, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-6, atol=1e-6)
    zero = [u for u, (first, last) in enumerate(SPANS) if not any(weights[first:last])]
    assert pooled[zero].abs().sum() == 0


def test_values_whose_sum_is_subnormal(backend: str) -> None:
    values = torch.tensor([1e-40, 3e-40, 1e-45, 0, 1e-44, 0, 0, 0])
    ours = normalize_weights(values, BATCH.spans, backend=backend)
    exact = normalize_weights(values.double(), BATCH.spans, backend="reference")
    torch.testing.assert_close(ours.token.double(), exact.token, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.span.double(), exact.span, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", [60, 86, 90, 100, 110, 1e6])
def test_softmax_terms_that_vanish(gap: float, backend: str) -> None:
    """One key is far below the other for two of three queries: exp(-gap) of importance where float32 has it, else 0."""
    width = 64
    hidden = torch.ones(3, width)
    hidden[:, 1::2] = -1
    # h . h = d (1 + c^2) for features +-1 + c, whose deviation c does not change; so s = sqrt(d) (1 + c^2) / std^2
    square = float((hidden[0].double().std() + 1e-5) ** 2)
    hidden += (gap / 2 * square / width**0.5 - 1) ** 0.5
    hidden[2] *= -1
    exact = token_importance(hidden.double()[None], backend="reference")[0]
    ours = token_importance(hidden[None], backend=backend)[0]
    assert exact[2] < 1e-20
    torch.testing.assert_close(ours[:2].double(), exact[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-4, atol=1.5e-45)
    assert gap < 105 or ours[2] == 0


@pytest.mark.parametrize("width", [3, 64, 100, 1600])
def test_importance_of_tokens_of_one_value(width: int, backend: str) -> None:
    """Their deviation is 0: a mean that is off by one rounding would be as large as the 1e-5 beside it."""
    for size in (1.0, 300.0, 1e4):
        hidden = (size * torch.randn(6, 1)).expand(6, width).contiguous()
        found = token_importance(hidden[None], backend=backend)
        expected = token_importance(hidden[None].double(), backend="reference")
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "importance"])
def test_tokens_of_importance_zero_pool_to_the_zero_vector(weighting: str, backend: str) -> None:
    """Features that are all alike have no deviation: scores of 1e10, and a softmax of ones and zeros."""
    config = MTAConfig(
        layer_pairs=[(0, 0)], granularity=["word"], student_pooling="own", weighting=weighting, backend=backend
    )
    level = torch.tensor([0.5, 1.0, 0.25, -0.5, -1.0, 0.75, 0.125, 2.0])
    student, teacher = level[:, None].expand(-1, 6), torch.randn(TOKENS, 6)
    torch.manual_seed(0)
    loss = MTALoss(config, 6, 6)
    ours = loss({0: student}, {0: teacher}, {"word": BATCH.spans}).dsa
    exact_loss = MTALoss(MTAConfig(**{**config.__dict__, "backend": "reference"}), 6, 6).double()
    exact = exact_loss({0: student.double()}, {0: teacher.double()}, {"word": BATCH.spans}).dsa
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7)


def test_attention_sink_of_a_wide_teacher(backend: str) -> None:
    """A first token unlike all others, at width 8,192: its importance is subnormal, its one-token span its state."""
    width = 8192
    hidden = torch.randn(1, width) + 0.01 * torch.randn(TOKENS, width)
    hidden[0] = torch.randn(width) - 0.1 * hidden[1]
    importance = token_importance(hidden[None], backend="reference")[0]
    importance[0] = 3e-41
    weights = normalize_weights(importance, BATCH.spans, backend=backend).token
    pooled, _ = pool_spans(hidden, weights, BATCH.spans, backend=backend)
    torch.testing.assert_close(pooled[SPANS.index((0, 1))], hidden[0], rtol=1e-5, atol=1e-6)
    assert pooled.isfinite().all()


def test_a_gram_numerator_is_not_negative(backend: str) -> None:
    spans = torch.randn(1, 48).expand(len(SPANS), -1) + 1e-4 * torch.randn(len(SPANS), 48)
    for _ in range(8):  # equal sides: rounding alone decides the sign
        weights = torch.rand(len(SPANS))
        value, _ = span_pair_terms(
            spans, spans.flip(1), weights, BATCH.spans, reduction="none", method="gram", backend=backend
        )
        assert (value >= 0).all()


def test_a_norm_beyond_float32_is_no_zero_vector() -> None:
    norm = torch.tensor([0.0, 1e-40, 1e-37, 2.0, torch.inf, torch.nan])
    made = reference.inverse_norms(norm)
    assert made[:2].tolist() == [0, 0]
    torch.testing.assert_close(made[2:4], 1 / norm[2:4])
    assert made[4:].isnan().all()


@pytest.mark.parametrize("factor", [1e-44, 1e-25, 1e20, 1e37])
def test_the_scale_of_weights_cancels_in_the_losses(factor: float, backend: str) -> None:
    student, teacher, weights = torch.randn(len(SPANS), 5), torch.randn(len(SPANS), 7), torch.rand(len(SPANS)) + 0.5
    for method in ("pairwise", "gram"):
        for reduction in ("mean", "sample"):
            options = {"reduction": reduction, "method": method, "backend": backend}
            found = span_pair_loss(student, teacher, weights * factor, BATCH.spans, **options)
            scaled = (weights * factor).double()
            expected = span_pair_loss(student.double(), teacher.double(), scaled, BATCH.spans, **options)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    hidden, target, tokens = torch.randn(1, TOKENS, 5), torch.randn(1, TOKENS, 7), torch.rand(1, TOKENS) * factor
    projection = torch.randn(7, 5)
    found = hidden_alignment_loss(hidden, target, tokens, projection, backend=backend)
    expected = hidden_alignment_loss(*(x.double() for x in (hidden, target, tokens, projection)), backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_no_features_and_no_values() -> None:
    """A width of 0, and tensors whose values can't be looked at."""
    assert reference.row_norms(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    with FakeTensorMode():
        assert reference.row_norms(torch.empty(3, 4)).shape == (3,)
