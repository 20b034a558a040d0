"""How long the MTA part of a step takes, forward and backward, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Moment = float | torch.cuda.Event


class Stopwatch:
    """Adds up stretches of device time: wall-clock time on a CPU, events on a GPU.

    A stretch of the forward pass lies between ``start`` and ``stop``. A stretch of the backward pass begins where
    the gradient of a tensor from ``begins_backward`` arrives, and ends where that of the last tensor from
    ``ends_backward`` has passed. autograd runs later nodes first: what was computed last is one stretch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stretches: list[tuple[Moment, Moment]] = []
        self._start: Moment | None = None
        self._paused = False
        self._backward: tuple[Moment, Moment | None] | None = None

    def now(self) -> Moment:
        """This moment on the device's own clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a stretch."""
        self._start = self.now()

    def stop(self) -> None:
        """End the stretch that ``start`` began."""
        if self._start is not None:
            self._stretches.append((self._start, self.now()))
        self._start = None

    def begins_backward(self, tensor: Tensor) -> Tensor:
        """The same tensor, whose gradient begins a stretch unless one has begun."""
        return _Mark.apply(tensor, self._begin) if tensor.requires_grad else tensor

    def ends_backward(self, tensor: Tensor) -> Tensor:
        """The same tensor, whose gradient ends the stretch; the last one counts."""
        return _Mark.apply(tensor, self._end) if tensor.requires_grad else tensor

    def seconds(self) -> float:
        """The sum of all stretches since the last call; waits for a GPU."""
        self.close()
        total = sum(seconds_between(begin, end) for begin, end in self._stretches)
        self._stretches.clear()
        return total

    def pause(self) -> None:
        """Count no backward pass until ``resume``."""
        self._paused = True

    def resume(self) -> None:
        """Undo ``pause``."""
        self._paused = False

    def _begin(self) -> None:
        if self._paused:
            return
        if self._backward is None or self._backward[1] is not None:  # the first mark of a backward pass
            self.close()
            self._backward = (self.now(), None)

    def _end(self) -> None:
        if self._backward is not None and not self._paused:
            self._backward = (self._backward[0], self.now())

    def close(self) -> None:
        """End the stretch of a backward pass that is over."""
        if self._backward is not None and self._backward[1] is not None:
            self._stretches.append((self._backward[0], self._backward[1]))
        self._backward = None


def seconds_between(begin: Moment, end: Moment) -> float:
    """Seconds from one moment to another; waits until a GPU has reached the second."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class _Mark(torch.autograd.Function):
    """The identity; calls a function when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, notice: Callable[[], None]) -> Tensor:
        ctx.notice = notice
        return tensor.view_as(tensor) if tensor.ndim else tensor.clone()  # FSDP2 warns of scalars that are views

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.notice()
        return gradients[0], None
