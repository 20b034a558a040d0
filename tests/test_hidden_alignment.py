"""Hid."""

from __future__ import annotations

import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, make_batch, random_rows
from torch import Tensor

from mta_fast import hidden_alignment_loss, reference
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.ops.hidden_alignment import _hidden_alignment

pytestmark = pytest.mark.usefixtures("cpu_backend")

LENGTHS = [length for length, _ in EDGE_ROWS]
T = sum(LENGTHS)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Student [T, 4], teacher [T, 6], weights with zeros [T], projection [6, 4] and bias [6]."""
    weights = torch.rand(T, dtype=dtype) * (torch.arange(T) % 3 != 0)
    return torch.randn(T, 4, dtype=dtype), torch.randn(T, 6, dtype=dtype), weights, *_projection(dtype)


def _projection(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4, dtype=dtype), torch.randn(6, dtype=dtype)


def _projection_of(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return _projection()


def test_by_hand() -> None:
    student, teacher = torch.tensor([[[2.0], [0.0], [1.0]]]), torch.tensor([[[1.0, 0.0], [5.0, 5.0], [3.0, 4.0]]])
    weights = torch.tensor([[1.0, 0.0, 3.0]])  # the middle token does not count
    projection = torch.tensor([[1.0], [0.0]])  # p = (h, 0): cosines 1 and 0.6
    loss = hidden_alignment_loss(student, teacher, weights, projection)
    assert loss.item() == pytest.approx(3 * 0.4 / 4)
    numerator, denominator = hidden_alignment_loss(student, teacher, weights, projection, reduction="none")
    assert (numerator.item(), denominator.item()) == pytest.approx((1.2, 4))
    bias = torch.tensor([0.0, 1.0])  # p = (2, 1) and (1, 1)
    loss = hidden_alignment_loss(student, teacher, weights, projection, bias)
    assert loss.item() == pytest.approx(((1 - 2 / 5**0.5) + 3 * (1 - 7 / (5 * 2**0.5))) / 4)


def test_sample_is_the_mean_of_the_rows() -> None:
    student, teacher = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 6).double()
    weights, projection = torch.rand(3, 5).double(), _projection()
    weights[1] = 0  # a row without weight does not count
    rows = [
        hidden_alignment_loss(student[b : b + 1], teacher[b : b + 1], weights[b : b + 1], *projection) for b in (0, 2)
    ]
    loss = hidden_alignment_loss(student, teacher, weights, *projection, reduction="sample")
    torch.testing.assert_close(loss, torch.stack(rows).mean())


@pytest.mark.parametrize("reduction", ["mean", "sample"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_packing_change_nothing(layout: str, reduction: str) -> None:
    batch, packed = make_batch(layout), make_batch("packed")
    student, teacher = random_rows(LENGTHS, 4), random_rows(LENGTHS, 6)
    counts = (
        torch.zeros(T).double().index_copy(0, packed.spans.covered.long(), packed.spans.cover_splits.diff().double())
    )
    weights = list((counts * torch.rand(T)).split(LENGTHS))
    projection = [p.requires_grad_() for p in _projection()]
    results = []
    for made in (batch, packed):
        hidden = made.lay(student).requires_grad_()
        loss = hidden_alignment_loss(
            hidden, made.lay(teacher), made.lay(weights, padding=0), *projection, spans=made.spans, reduction=reduction
        )
        grads = torch.autograd.grad(loss, [hidden, *projection])
        assert all(grad.isfinite().all() for grad in grads)
        results.append((loss, made.unlay(grads[0]), *grads[1:]))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_spans_only_say_which_tokens_to_read(reduction: str) -> None:
    batch = make_batch("right")
    counts = torch.zeros(len(LENGTHS) * batch.seq_len).double()
    counts = counts.index_copy(0, batch.spans.covered.long(), batch.spans.cover_splits.diff().double())
    weights = (counts * torch.rand(len(counts))).reshape(len(LENGTHS), -1)
    hidden = [batch.lay(random_rows(LENGTHS, dim), padding=0) for dim in (4, 6)]
    with_spans, without = (
        hidden_alignment_loss(*hidden, weights, *_projection_of(0), spans=spans, reduction=reduction)
        for spans in (batch.spans, None)
    )
    torch.testing.assert_close(with_spans, without)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
def test_gradcheck(reduction: str, with_bias: bool) -> None:
    student, teacher, weights = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 6).double(), torch.rand(2, 3).double()
    weights[0, 1] = 0
    weight, bias = _projection()
    learnt = [student, weight, *([bias] if with_bias else [])]

    def numerator(s: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        made = hidden_alignment_loss(s, teacher, weights, w, b, reduction=reduction)
        return made[0] if isinstance(made, tuple) else made

    assert torch.autograd.gradcheck(numerator, [x.requires_grad_() for x in learnt])


@pytest.mark.parametrize("chunk", [1, 5, 48, 1024])
def test_explicit_gradient_equals_autograd_of_the_reference(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reference, "TOKEN_CHUNK", chunk)
    student, teacher, weights, weight, bias = _inputs()
    tokens = weights.nonzero().flatten()
    learnt = [x.requires_grad_() for x in (student, weight, bias)]
    inputs = (student, teacher, tokens, weights[tokens], weight, bias, weight.dtype)
    numerator, nothing = reference.hidden_alignment(*inputs)
    expected = torch.autograd.grad(numerator, learnt)
    with torch.no_grad():
        value, explicit = reference.hidden_alignment(*inputs, True)
    assert nothing is None
    assert explicit is not None
    torch.testing.assert_close(value, numerator)
    torch.testing.assert_close(explicit.student, expected[0][tokens])
    torch.testing.assert_close(explicit.weight, expected[1])
    torch.testing.assert_close(explicit.bias, expected[2])


def test_tokens_of_weight_zero_are_not_read() -> None:
    student, teacher, weights, weight, bias = _inputs()
    expected = hidden_alignment_loss(student, teacher, weights, weight, bias)
    student[weights == 0] = torch.nan
    teacher[weights == 0] = torch.nan
    assert torch.equal(hidden_alignment_loss(student, teacher, weights, weight, bias), expected)


def test_zero_vectors_have_cosine_zero_and_no_gradient() -> None:
    student, teacher = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    student[0, 0], teacher[0, 1] = 0, 0
    weight = torch.randn(6, 4)
    student.requires_grad_()
    loss = hidden_alignment_loss(student, teacher, torch.ones(1, 2), weight)
    assert loss.item() == 1
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16", "float32"), ("float32", "bfloat16", "bfloat16")])
def test_mixed_precision(dtypes: tuple[str, str, str]) -> None:
    kinds = [getattr(torch, name) for name in dtypes]
    student, teacher, weights, weight, bias = _inputs()
    learnt = [x.to(kind).requires_grad_() for x, kind in ((student, kinds[0]), (weight, kinds[2]), (bias, kinds[2]))]
    teacher = teacher.to(kinds[1])
    loss = hidden_alignment_loss(learnt[0], teacher, weights.float(), *learnt[1:])
    exact = [x.detach().double().requires_grad_() for x in learnt]
    reference_loss = hidden_alignment_loss(exact[0], teacher.double(), weights, *exact[1:])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference_loss, rtol=1e-6, atol=1e-6)
    for got, expected, leaf in zip(
        torch.autograd.grad(loss, learnt), torch.autograd.grad(reference_loss, exact), learnt, strict=True
    ):
        assert got.dtype == leaf.dtype
        eager = expected.to(leaf.dtype).double()  # what rounding to the leaf's dtype alone costs
        assert (got.double() - expected).norm() <= 2 * (eager - expected).norm() + 1e-6 * expected.norm()


def test_autocast_rounds_the_factors_of_the_projection_only() -> None:
    student, teacher, weights, weight, bias = (x.float() for x in _inputs())
    with torch.autocast("cpu", torch.bfloat16):
        cast = hidden_alignment_loss(student, teacher, weights, weight.requires_grad_(), bias)
    rounded = weight.detach().bfloat16().float().requires_grad_()
    plain = hidden_alignment_loss(student.bfloat16().float(), teacher, weights, rounded, bias)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert torch.equal(torch.autograd.grad(plain, rounded)[0], torch.autograd.grad(cast, weight)[0])


def test_autocast_leaves_float64_alone() -> None:
    inputs = _inputs()
    plain = hidden_alignment_loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hidden_alignment_loss(*inputs), plain)


def test_no_gradient_is_computed_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    original = reference.hidden_alignment
    monkeypatch.setattr(reference, "hidden_alignment", lambda *args: (wanted.append(args[-1]), original(*args))[1])
    student, teacher, weights, weight, bias = _inputs()
    hidden_alignment_loss(student, teacher, weights, weight, bias, backend="reference")
    weight.requires_grad_()
    with torch.no_grad():
        hidden_alignment_loss(student, teacher, weights, weight, bias, backend="reference")
    hidden_alignment_loss(student, teacher, weights, weight, bias, backend="reference")
    assert wanted == [False, False, True]


def test_double_backward_raises() -> None:
    student, teacher, weights, weight, bias = _inputs()
    loss = hidden_alignment_loss(student, teacher, weights, weight.requires_grad_(), bias)
    with pytest.raises(DoubleBackwardError, match="hidden_alignment_loss"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_errors_name_expected_and_received() -> None:
    student, teacher, weights, weight, bias = _inputs()
    with pytest.raises(InputError, match=r"proj_weight: expected shape \(6, 4\) \(\[d_T, d_S\]\), got \(4, 6\)"):
        hidden_alignment_loss(student, teacher, weights, weight.T, bias)
    with pytest.raises(InputError, match=r"proj_bias: expected shape \(6,\)"):
        hidden_alignment_loss(student, teacher, weights, weight, bias[1:])
    with pytest.raises(InputError, match="teacher_hidden: expected shape"):
        hidden_alignment_loss(student, teacher[1:], weights, weight, bias)
    with pytest.raises(InputError, match="expected spans= with packed tokens"):
        hidden_alignment_loss(student, teacher, weights, weight, bias, reduction="sample")
    with pytest.raises(InputError, match="proj_weight: expected on cpu, got meta"):
        hidden_alignment_loss(student, teacher, weights, weight.to("meta"), bias)


def test_opcheck() -> None:
    student, teacher, weights, weight, bias = _inputs()
    tokens = weights.nonzero().flatten()
    learnt = [x.requires_grad_() for x in (weight, bias)]
    for bias_or_none in (learnt[1], None):
        inputs = (
            student.requires_grad_(),
            teacher,
            tokens,
            weights[tokens],
            learnt[0],
            bias_or_none,
            weight.dtype,
            True,
            "reference",
        )
        torch.library.opcheck(_hidden_alignment, inputs)
