"""What product and oracle share, so that no comparison of the two can find a fault in it: against NumPy.

The formulas are written again here, from the paper, with loops and Python's sums.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mta_fast import SpanBatch, hidden_alignment_loss, reference, span_pair_loss

F64 = torch.float64
Array = np.ndarray[Any, Any]
COUNTS = (4, 0, 1, 3)  # spans of each row: two rows without a pair
TOKENS = 5  # of each row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quotient(dtype: torch.dtype) -> None:
    above, below = [3.0, -1.0, 0.0, 2.0, 1.0, math.nan], [4.0, 8.0, 5.0, 0.0, -2.0, 0.0]
    made = reference.quotient(torch.tensor(above, dtype=dtype), torch.tensor(below, dtype=dtype))
    assert made.dtype == dtype
    np.testing.assert_array_equal(made.numpy(), [0.75, -0.125, 0.0, 2.0, -0.5, math.nan])
    numerator = torch.zeros((), dtype=dtype, requires_grad=True)
    reference.quotient(numerator, torch.zeros((), dtype=dtype)).backward()
    assert numerator.grad == 1  # the graph stays where nothing counts


@pytest.mark.parametrize("reduction", ["mean", "none", "sample"])
def test_row_sums(reduction: str) -> None:
    numerators, denominators = np.array([1.0, 6.0, 0.0, 5.0, 3.0]), np.array([4.0, 8.0, 0.0, 0.5, 0.0])
    expected = (15.0, 12.5) if reduction != "sample" else (0.25 + 0.75 + 10.0, 3)
    made = reference.reduce_rows(torch.from_numpy(numerators), torch.from_numpy(denominators), reduction)
    assert tuple(value.item() for value in made) == expected
    numerators[2] = math.nan  # of a row that does not count
    made = reference.reduce_rows(torch.from_numpy(numerators), torch.from_numpy(denominators), reduction)
    assert made[0].isnan()
    assert made[1].item() == expected[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lengths(dtype: torch.dtype) -> None:
    v = np.random.default_rng(0).normal(size=(6, 7)) * np.array([1, 1e-30, 1e30, 0, 1e-3, 7])[:, None]
    exact = [math.hypot(*row) for row in torch.from_numpy(v).to(dtype).double().tolist()]
    norms = reference.row_norms(torch.from_numpy(v).to(dtype))
    tolerance = 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(norms.double().numpy(), exact, rtol=tolerance)
    inverse = reference.inverse_norms(norms).double().numpy()
    np.testing.assert_allclose(inverse, [0 if x == 0 else 1 / x for x in exact], rtol=tolerance)


def _spans() -> SpanBatch:
    offsets = torch.tensor([[[j, j + 1] for j in range(TOKENS)]] * len(COUNTS))
    return SpanBatch.from_char_spans([[(j, j + 2) for j in range(count)] for count in COUNTS], offsets)


def _cosine(a: Array, b: Array) -> float:
    return float(sum(a * b) / (math.hypot(*a) * math.hypot(*b)))


def _reduced(rows: list[tuple[float, float]], reduction: str) -> float | tuple[float, float]:
    """The paper's loss of (numerator, denominator) of each row; a mean of rows for "sample"."""
    if reduction == "sample":
        counted = [above / below for above, below in rows if below > 0]
        return sum(counted) / len(counted)
    above, below = (sum(values) for values in zip(*rows, strict=True))
    return (above, below) if reduction == "none" else above / below


def _check(made: Any, expected: float | tuple[float, float]) -> None:
    found = [value.item() for value in made] if isinstance(made, tuple) else made.item()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none", "sample"])
def test_span_pairs(reduction: str) -> None:
    rng, total = np.random.default_rng(0), sum(COUNTS)
    student, teacher, weights = rng.normal(size=(total, 3)), rng.normal(size=(total, 4)), rng.random(total)
    rows, first = [], 0
    for count in COUNTS:
        above = below = 0.0
        for u in range(first, first + count):
            for v in range(first, first + count):
                if u != v:
                    error = _cosine(student[u], student[v]) - _cosine(teacher[u], teacher[v])
                    above += weights[u] * weights[v] * error**2
                    below += weights[u] * weights[v]
        rows.append((above, below))
        first += count
    sides = [torch.from_numpy(array) for array in (student, teacher, weights)]
    made = span_pair_loss(*sides, _spans(), reduction=reduction, backend="reference")
    _check(made, _reduced(rows, reduction))


@pytest.mark.parametrize("with_spans", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none", "sample"])
def test_hidden_alignment(reduction: str, with_spans: bool) -> None:
    rng, shape = np.random.default_rng(0), (len(COUNTS), TOKENS)
    student, teacher, matrix = rng.normal(size=(*shape, 3)), rng.normal(size=(*shape, 4)), rng.normal(size=(4, 3))
    weights = rng.random(shape)
    for b, count in enumerate(COUNTS):
        weights[b, count + 1 if count else 0 :] = 0  # the tokens that no span covers
    rows = []
    for b in range(len(COUNTS)):
        distance = [1 - _cosine(matrix @ student[b, j], teacher[b, j]) for j in range(TOKENS)]
        rows.append((float(sum(weights[b] * distance)), float(sum(weights[b]))))
    inputs = [torch.from_numpy(array) for array in (student, teacher, weights, matrix)]
    spans = _spans() if with_spans else None
    made = hidden_alignment_loss(*inputs, spans=spans, reduction=reduction, backend="reference")
    _check(made, _reduced(rows, reduction))
