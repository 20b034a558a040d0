"""Stopwatch: what it counts of a forward and a backward pass, on a clock of the tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mta_fast.distill.training import stopwatch
from mta_fast.distill.training.stopwatch import Stopwatch


class _Clock:
    """Stands still, except where a test lets seconds pass. Powers of two: their sums say which have passed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    """The stopwatch's time."""
    made = _Clock()
    monkeypatch.setattr(stopwatch, "time", made)
    return made


class _Slow(torch.autograd.Function):
    """The identity; its backward takes the given seconds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: _Clock, seconds: float) -> torch.Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.clock.seconds += ctx.seconds
        return gradients[0], None, None


def _step(watch: Stopwatch, clock: _Clock) -> None:
    """A slow base part, then two slow parts of the watched loss, as DistillationModel computes them."""
    leaf = torch.ones(3, requires_grad=True)
    state = _Slow.apply(leaf, clock, 1)  # the student below the captured state: not counted
    base = _Slow.apply(state, clock, 2).sum()  # the base loss, computed first: not counted
    watch.start()
    clock.seconds += 4
    marked = watch.ends_backward(state)
    one, two = (watch.begins_backward(_Slow.apply(marked, clock, seconds).sum()) for seconds in (8, 16))
    watch.stop()
    clock.seconds += 32  # between the passes: not counted
    (base + one + two).backward()
    torch.testing.assert_close(leaf.grad, torch.full((3,), 3.0))


def test_forward_and_backward_of_the_marked_part(clock: _Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    _step(watch, clock)
    assert watch.seconds() == 4 + 8 + 16
    assert watch.seconds() == 0


def test_several_passes_add_up(clock: _Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        _step(watch, clock)
    assert watch.seconds() == 2 * (4 + 8 + 16)


def test_a_paused_watch_counts_no_backward(clock: _Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.pause()
    _step(watch, clock)
    watch.resume()
    assert watch.seconds() == 4


def test_tensors_without_a_graph_are_left_alone() -> None:
    watch, tensor = Stopwatch(torch.device("cpu")), torch.ones(3)
    assert watch.begins_backward(tensor) is tensor
    assert watch.ends_backward(tensor) is tensor
