"""DSA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batches import LAYOUTS, make_batch
from torch import Tensor

from mta_fast import reference, span_pair_loss
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.ops.span_pairs import _span_pairs

pytestmark = pytest.mark.usefixtures("cpu_backend")

METHODS = ("pairwise", "gram")
# spans per row: none, one (no pair), two, several, and one huge row among tiny ones
COUNTS = [0, 1, 2, 5, 40, 0]
ROWS = [(n, [(j, j + 1) for j in range(n)]) for n in COUNTS]
N = sum(COUNTS)


def _inputs(student_dim: int = 6, teacher_dim: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return (
        torch.randn(N, student_dim, dtype=dtype),
        torch.randn(N, teacher_dim, dtype=dtype),
        torch.rand(N, dtype=dtype),
    )


def test_two_spans_by_hand() -> None:
    spans = make_batch("packed", [(2, [(0, 1), (1, 2)])]).spans
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosine 0.6
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # cosine 0
    weights = torch.tensor([0.25, 0.75])
    for method in METHODS:
        loss = span_pair_loss(student, teacher, weights, spans, method=method)
        assert loss.item() == pytest.approx(0.36)
        numerator, denominator = span_pair_loss(student, teacher, weights, spans, reduction="none", method=method)
        assert denominator.item() == pytest.approx(2 * 0.25 * 0.75)
        assert numerator.item() == pytest.approx(2 * 0.25 * 0.75 * 0.36)


def test_reductions_by_hand() -> None:
    # two rows of two spans with quotients 0.36 and 1, and denominators 2 * 0.25 * 0.75 and 2 * 0.5 * 0.5
    spans = make_batch("packed", [(2, [(0, 1), (1, 2)]), (2, [(0, 1), (1, 2)]), (1, [(0, 1)])]).spans
    student = torch.tensor([[1.0, 0], [3, 4], [1, 0], [1, 0], [1, 1]])
    teacher = torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 1], [1, 0]])
    weights = torch.tensor([0.25, 0.75, 0.5, 0.5, 1.0])
    loss = span_pair_loss(student, teacher, weights, spans)
    assert loss.item() == pytest.approx((0.375 * 0.36 + 0.5 * 1) / 0.875)
    assert span_pair_loss(student, teacher, weights, spans, reduction="sample").item() == pytest.approx(1.36 / 2)


def test_pairs_never_cross_rows() -> None:
    student, teacher, weights = _inputs()
    together = span_pair_loss(student, teacher, weights, make_batch("packed", ROWS).spans, reduction="none")
    alone, first = [], 0
    for n, row in zip(COUNTS, ROWS, strict=True):
        part = slice(first, first + n)
        spans = make_batch("packed", [row]).spans
        alone.append(torch.stack(span_pair_loss(student[part], teacher[part], weights[part], spans, reduction="none")))
        first += n
    torch.testing.assert_close(torch.stack(together), torch.stack(alone).sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str) -> None:
    inputs = _inputs()
    expected = span_pair_loss(*inputs, make_batch("packed", ROWS).spans)
    assert torch.equal(span_pair_loss(*inputs, make_batch(layout, ROWS).spans), expected)


@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str, reduction: str) -> None:
    rows = [(n, [(j, j + 1) for j in range(n)]) for n in (3, 1, 0, 4)]
    spans = make_batch("packed", rows).spans
    student, teacher, weights = torch.randn(8, 3).double(), torch.randn(8, 5).double(), torch.rand(8).double()

    def numerator(s: Tensor) -> Tensor:
        made = span_pair_loss(s, teacher, weights, spans, reduction=reduction, method=method)
        return made[0] if isinstance(made, tuple) else made

    assert torch.autograd.gradcheck(numerator, student.requires_grad_())


@pytest.mark.parametrize("method", METHODS)
def test_explicit_gradient_equals_autograd_of_the_reference(method: str) -> None:
    student, teacher, weights = _inputs()
    spans = make_batch("packed", ROWS).spans
    student.requires_grad_()
    norms = student.norm(dim=1), teacher.norm(dim=1)
    numerators, _, _ = reference.span_pairs(student, teacher, weights, *norms, spans.span_splits, spans.host, method)
    (expected,) = torch.autograd.grad(numerators.sum(), student)
    with torch.no_grad():
        index = (spans.span_splits, spans.host, method, True)
        _, _, explicit = reference.span_pairs(student, teacher, weights, *norms, *index)
    torch.testing.assert_close(explicit, expected)


def _geometry(name: str, n: int = 300) -> tuple[Tensor, Tensor]:
    """Student and teacher spans whose cosines are spread, or all near 0.99 with DSA near 1e-5."""
    student_dim, teacher_dim = 48, 64
    if name == "dissimilar":
        return torch.randn(n, student_dim).double(), torch.randn(n, teacher_dim).double()
    # a common direction and a small part of norm r: cosine = (1 + r^2 c) / (1 + r^2) around 1 / (1 + r^2)
    r = 0.1
    own_s, own_t = (F.normalize(torch.randn(n, dim).double(), dim=1) for dim in (student_dim - 1, teacher_dim - 1))
    one = torch.ones(n, 1).double()
    return torch.cat([one, r * own_s], 1), torch.cat([one, r * own_t], 1)


def test_geometry_near_one_is_what_it_says() -> None:
    student, teacher = (F.normalize(x, dim=1) for x in _geometry("near one"))
    spans = make_batch("packed", [(300, [(j, j + 1) for j in range(300)])]).spans
    assert (student @ student.T).mean().item() == pytest.approx(0.99, abs=0.001)
    loss = span_pair_loss(student, teacher, torch.ones(300).double(), spans)
    assert 2e-6 < loss.item() < 5e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("geometry", "value_error", "gradient_error"), [("dissimilar", 2e-6, 1e-5), ("near one", 4e-4, 4e-3)]
)
def test_float32_error_against_float64(geometry: str, value_error: float, gradient_error: float, method: str) -> None:
    # the bounds are about ten times the errors of the table in the documentation of the centred Gram form
    student, teacher = _geometry(geometry)
    weights = torch.rand(len(student)).double()
    spans = make_batch("packed", [(len(student), [(j, j + 1) for j in range(len(student))])]).spans
    results = []
    for dtype, how in ((torch.float64, "pairwise"), (torch.float32, method)):
        s = student.to(dtype).requires_grad_()
        loss = span_pair_loss(s, teacher.to(dtype), weights.to(dtype), spans, method=how)
        results.append((loss.double(), torch.autograd.grad(loss, s)[0].double()))
    (value, gradient), (value32, gradient32) = results
    assert ((value32 - value) / value).abs() < value_error
    assert (gradient32 - gradient).norm() / gradient.norm() < gradient_error


@pytest.mark.parametrize("method", METHODS)
def test_zero_vectors_have_cosine_zero(method: str) -> None:
    student, teacher, weights = _inputs()
    student[5], teacher[5], teacher[7] = 0, 0, 0
    spans = make_batch("packed", ROWS).spans
    unit_s, unit_t = (F.normalize(x, dim=1) for x in (student, teacher))
    row = spans.span_rows
    pairs = (row[:, None] == row) & ~torch.eye(N, dtype=torch.bool)
    expected = (weights[:, None] * weights * pairs * (unit_s @ unit_s.T - unit_t @ unit_t.T) ** 2).sum()
    student.requires_grad_()
    numerator, _ = span_pair_loss(student, teacher, weights, spans, reduction="none", method=method)
    torch.testing.assert_close(numerator, expected)
    (gradient,) = torch.autograd.grad(numerator, student)
    assert gradient.isfinite().all()
    assert gradient[5].abs().max() == 0


def test_auto_takes_the_cheaper_method_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    for name in ("_pairwise", "_gram"):
        original = getattr(reference, name)

        def spy(u: Tensor, *rest: object, name: str = name, original: object = original) -> object:
            taken.append((name, len(u)))
            return original(u, *rest)  # type: ignore[operator]

        monkeypatch.setattr(reference, name, spy)
    spans = make_batch("packed", ROWS).spans
    span_pair_loss(*_inputs(2, 3), spans, backend="reference")  # even at (2 * 4 + 2 * 6 + 9) / (2 * 2 + 3) = 4.1 spans
    assert taken == [("_gram" if n > 4.1 else "_pairwise", n) for n in COUNTS]


def test_cost_model_counts_products() -> None:
    assert reference.gram_from(768, 1600) == 1977


@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    inputs, spans = _inputs(), make_batch("packed", ROWS).spans
    whole = span_pair_loss(*inputs, spans, method="pairwise", backend="reference")
    monkeypatch.setattr(reference, "SPAN_BLOCK", block)
    torch.testing.assert_close(span_pair_loss(*inputs, spans, method="pairwise", backend="reference"), whole)


def test_nothing_to_compare_is_zero_with_a_graph() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    spans = make_batch("packed", [(1, [(0, 1)]), (1, [(0, 1)])]).spans
    for reduction in ("mean", "sample"):
        loss = span_pair_loss(student, torch.randn(2, 4), torch.ones(2), spans, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert gradient.abs().max() == 0


def test_not_a_number_is_not_hidden() -> None:
    student, teacher, weights = _inputs()
    student[10, 0] = torch.nan
    spans = make_batch("packed", ROWS).spans
    for method in METHODS:
        for reduction in ("mean", "sample"):
            assert span_pair_loss(student, teacher, weights, spans, method=method, reduction=reduction).isnan()


def test_half_precision_student_gets_its_gradient_in_its_dtype() -> None:
    student, teacher, weights = _inputs()
    spans = make_batch("packed", ROWS).spans
    half = student.bfloat16().requires_grad_()
    loss = span_pair_loss(half, teacher.half(), weights.float(), spans)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == torch.bfloat16


def test_double_backward_raises() -> None:
    student, teacher, weights = _inputs()
    loss = span_pair_loss(student.requires_grad_(), teacher, weights, make_batch("packed", ROWS).spans)
    with pytest.raises(DoubleBackwardError, match="span_pair_loss"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_errors_name_expected_and_received() -> None:
    student, teacher, weights = _inputs()
    spans = make_batch("packed", ROWS).spans
    with pytest.raises(InputError, match="teacher_spans: expected 48 spans"):
        span_pair_loss(student, teacher[1:], weights, spans)
    with pytest.raises(InputError, match=r"span_weights: expected shape \(48,\)"):
        span_pair_loss(student, teacher, weights[1:], spans)
    with pytest.raises(InputError, match="method: expected one of auto, pairwise, gram, got 'fast'"):
        span_pair_loss(student, teacher, weights, spans, method="fast")
    with pytest.raises(InputError, match="reduction: expected one of mean, sample, none, got 'sum'"):
        span_pair_loss(student, teacher, weights, spans, reduction="sum")
    with pytest.raises(InputError, match="teacher_spans: expected on cpu, got meta"):
        span_pair_loss(student, teacher.to("meta"), weights, spans)


def test_opcheck() -> None:
    student, teacher, weights = _inputs()
    spans = make_batch("packed", ROWS).spans
    norms, index = [student.norm(dim=1), teacher.norm(dim=1)], [spans.span_rows, spans.span_splits, spans.host]
    torch.library.opcheck(_span_pairs, (student, teacher, weights, norms, index, "auto", False, "reference"))
    student.requires_grad_()
    torch.library.opcheck(_span_pairs, (student, teacher, weights, norms, index, "gram", True, "reference"))
