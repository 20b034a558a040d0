"""The ops of all layer pairs do what those of one do, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import EDGE_ROWS, make_batch
from torch import Tensor

from mta_fast import MTAConfig, MTALoss, SpanBatch
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.ops.layer_pairs import _index, _layer_pairs, _layer_pairs_gradient, _layer_weights

PAIRS = ((0, 1), (2, 1), (1, 0))  # one of the teacher's layers twice
KINDS = ("word", "phrase", "word")
STUDENT, TEACHER = (6, 6, 4), (5, 7)  # widths of the layers


def _spans(layout: str = "packed") -> dict[str, SpanBatch]:
    words = [(length, [(i, i + 1) for i in range(length)]) for length, _ in EDGE_ROWS]
    return {"word": make_batch(layout, words).spans, "phrase": make_batch(layout).spans}


def _states(shape: tuple[int, ...]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    student, teacher = (
        {i: torch.randn(*shape, d, dtype=torch.float64) for i, d in enumerate(side)} for side in (STUDENT, TEACHER)
    )
    return {i: x.requires_grad_() for i, x in student.items()}, teacher


@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "sample", "dsa_method": "gram"},
        {"student_pooling": "own", "causal": True},
        {"lambda_hid": 0.0},
        {"weighting": "uniform"},
    ],
    ids=["plain", "sample", "own", "dsa", "uniform"],
)
def test_joined_is_pair_by_pair(changes: dict[str, Any], layout: str) -> None:
    spans = _spans(layout)
    student, teacher = _states(spans["word"].shape)
    widths = [STUDENT[s] for s, _ in PAIRS], [TEACHER[t] for _, t in PAIRS]
    loss = MTALoss(MTAConfig(layer_pairs=PAIRS, granularity=KINDS, backend="reference", **changes), *widths).double()
    leaves = [*student.values(), *loss.parameters()]
    joined, single = loss(student, teacher, spans), loss(student, teacher, spans, explain=True).output
    torch.testing.assert_close(tuple(joined.per_layer), tuple(single.per_layer), rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(output.loss, leaves) for output in (joined, single))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def _arguments() -> dict[str, Any]:
    """Of ``_layer_pairs`` but the last three."""
    spans = list(_spans().values())
    index, kind_of = _index([spans[0], spans[1], spans[0]])
    tokens, sizes = spans[0].shape[0], [spans[i].num_spans for i in kind_of]
    return {
        "students": [torch.randn(tokens, d, requires_grad=d != 6) for d in (4, 6, 4)],
        "teachers": [torch.randn(tokens, 5) for _ in sizes],
        "student_weights": [torch.rand(tokens) for _ in sizes],
        "teacher_weights": [torch.rand(tokens) for _ in sizes],
        "span_weights": [torch.rand(n) for n in sizes],
        "kinds": index,
        "kind_of": kind_of,
    }


def test_opcheck() -> None:
    given = _arguments()
    torch.library.opcheck(_layer_pairs, (*given.values(), "auto", True, "reference"))
    torch.library.opcheck(
        _layer_weights, (given["teachers"], [0, 1, 2], given["kinds"], given["kind_of"], 0, False, False, "reference")
    )
    _, _, *left = _layer_pairs(*given.values(), "auto", True, "reference")
    parts = [x.detach() for x in left[:3]], [x.detach() for x in left[3:]], given["student_weights"]
    grad = torch.rand(3, len(EDGE_ROWS))
    inputs = (*parts, grad, given["kinds"], given["kind_of"], torch.bfloat16, "reference")
    torch.library.opcheck(_layer_pairs_gradient, inputs)


def test_only_the_first_result_has_a_gradient_and_that_once() -> None:
    given = _arguments()
    numerators, denominators, *left = _layer_pairs(*given.values(), "auto", True, "reference")
    assert numerators.requires_grad
    assert not any(x.requires_grad for x in (denominators, *left))
    wanted = [x for x in given["students"] if x.requires_grad]
    first = torch.autograd.grad(numerators.sum(), wanted, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(numerators.sum(), wanted, retain_graph=True), rtol=0, atol=0)
    with pytest.raises(DoubleBackwardError, match="MTALoss: expected a first derivative"):
        torch.autograd.grad(numerators.sum(), wanted, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind_of": [0, 2, 0]}, "kinds, kind_of: expected 12 tensors a kind"),
        ({"kinds": []}, "kinds, kind_of: expected 12 tensors a kind"),
        ({"teachers": [torch.rand(2, 5)] * 2}, "teachers: expected 3 tensors, one a layer pair, got 2"),
        ({"span_weights": [torch.rand(3)] * 3}, r"span_weights: expected shape \["),
        ({"students": [torch.rand(9, 4)] * 3}, r"spans.token_splits: expected shape \[10\]"),
    ],
)
def test_wrong_lists_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _layer_pairs(*(_arguments() | changes).values(), "auto", True, "reference")
