"""Stopwatch: what it counts of a forward and a backward pass."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from mta_fast.distill.stopwatch import Stopwatch

PAUSE = 0.1


class _Slow(torch.autograd.Function):
    """The identity; its backward takes PAUSE."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return gradients[0]


def _step(watch: Stopwatch) -> None:
    """A slow base part, then two slow parts of the watched loss, as DistillationModel computes them."""
    leaf = torch.ones(3, requires_grad=True)
    state = _Slow.apply(leaf)  # the student below the captured state: not counted
    base = _Slow.apply(state).sum()  # the base loss, computed first: not counted
    watch.start()
    time.sleep(PAUSE)
    marked = watch.ends_backward(state)
    one, two = (watch.begins_backward(_Slow.apply(marked).sum()) for _ in range(2))
    watch.stop()
    (base + one + two).backward()
    torch.testing.assert_close(leaf.grad, torch.full((3,), 3.0))


def test_forward_and_backward_of_the_marked_part() -> None:
    watch = Stopwatch(torch.device("cpu"))
    _step(watch)
    assert watch.seconds() == pytest.approx(3 * PAUSE, rel=0.2)  # one forward, two backward, of six pauses
    assert watch.seconds() == 0


def test_several_passes_add_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        _step(watch)
    assert watch.seconds() == pytest.approx(6 * PAUSE, rel=0.2)


def test_a_paused_watch_counts_no_backward() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.pause()
    _step(watch)
    watch.resume()
    assert watch.seconds() == pytest.approx(PAUSE, rel=0.2)


def test_tensors_without_a_graph_are_left_alone() -> None:
    watch, tensor = Stopwatch(torch.device("cpu")), torch.ones(3)
    assert watch.begins_backward(tensor) is tensor
    assert watch.ends_backward(tensor) is tensor
