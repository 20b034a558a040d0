"""torch.compile: one graph, and no new one for new lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import make_batch

from mta_fast import MTAConfig, MTALoss, entropy_weights

PAIRS, KINDS, STUDENT_DIM, TEACHER_DIM, VOCABULARY = ((1, 2), (3, 4)), ("word", "phrase"), 6, 10, 11


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _inputs(lengths: list[int], layout: str) -> tuple[dict[int, Any], dict[int, Any], dict[str, Any]]:
    words = make_batch(layout, [(n, [(j, j + 1) for j in range(n)]) for n in lengths])
    phrases = make_batch(layout, [(n, [(0, 2), (1, n)]) for n in lengths])
    student = {s: words.lay([torch.randn(n, STUDENT_DIM) for n in lengths]).requires_grad_() for s, _ in PAIRS}
    teacher = {t: words.lay([torch.randn(n, TEACHER_DIM) for n in lengths]) for _, t in PAIRS}
    return student, teacher, {"word": words.spans, "phrase": phrases.spans}


@pytest.mark.parametrize("changes", [{}, {"student_pooling": "own", "normalization": "sample"}], ids=str)
@pytest.mark.parametrize("layout", ["right", "packed"])
def test_one_graph_for_all_lengths(layout: str, changes: dict[str, Any]) -> None:
    loss = MTALoss(MTAConfig(PAIRS, KINDS, **changes), STUDENT_DIM, TEACHER_DIM)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    sizes = [[5, 3], [7, 4, 3], [9, 2, 6, 5], [4, 12]]
    for i, lengths in enumerate(sizes):
        student, teacher, spans = _inputs(lengths, layout)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            output = compiled(student, teacher, spans)
            grads = torch.autograd.grad(output.loss, [*student.values(), *loss.parameters()])
        expected = loss(student, teacher, spans)
        torch.testing.assert_close(output, expected)
        plain = torch.autograd.grad(expected.loss, [*student.values(), *loss.parameters()])
        torch.testing.assert_close(grads, plain)


def test_batches_of_nothing_and_of_one() -> None:
    loss = MTALoss(MTAConfig(PAIRS, KINDS), STUDENT_DIM, TEACHER_DIM)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=16):  # torch makes a graph for each size of 0 or 1
        for lengths, phrases in (([5, 3], []), ([4], [(0, 2)]), ([1], [(0, 1)]), ([6, 7], [(1, 2)])):
            words = make_batch("right", [(n, [(j, j + 1) for j in range(n)]) for n in lengths])
            spans = {"word": words.spans, "phrase": make_batch("right", [(n, phrases) for n in lengths]).spans}
            student = {s: words.lay([torch.randn(n, STUDENT_DIM) for n in lengths]).requires_grad_() for s, _ in PAIRS}
            teacher = {t: words.lay([torch.randn(n, TEACHER_DIM) for n in lengths]) for _, t in PAIRS}
            torch.testing.assert_close(compiled(student, teacher, spans), loss(student, teacher, spans))


def test_entropy_weights_compile() -> None:
    logits = torch.randn(2, 5, VOCABULARY)
    compiled = torch.compile(entropy_weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), entropy_weights(logits))


def test_inductor() -> None:
    loss = MTALoss(MTAConfig(PAIRS, KINDS), STUDENT_DIM, TEACHER_DIM)
    student, teacher, spans = _inputs([5, 3], "right")
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, spans), loss(student, teacher, spans))


def test_double_backward_raises_under_compile() -> None:
    loss = MTALoss(MTAConfig(PAIRS, KINDS), STUDENT_DIM, TEACHER_DIM)
    student, teacher, spans = _inputs([5, 3], "right")
    output = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher, spans)
    with pytest.raises(RuntimeError, match="double backward|second one|does not require grad"):
        torch.autograd.grad(output.loss, student[1], create_graph=True)[0].square().sum().backward()
