"""DistiLLM: a skewed divergence on batches that are chosen each step: the data's, the student's own, or replayed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from mta_fast.config import nearest
from mta_fast.distill.methods import BaseMethod, Batch, ModelOutput, skewed_method
from mta_fast.errors import InputError

Source = Literal["data", "student", "replay"]
Row = dict[str, Any]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}


class DistiLLM(BaseMethod):
    """SRKL or SKL with adaptive off-policy training (DistiLLM, arXiv 2402.03898).

    Called alone it is the loss. In training each batch comes from one of three sources, with threshold f, progress t
    and U uniform: if U < f s(t), or U < f while the replay buffer is not full, the student generates responses to the
    batch's prompts, which enter the buffer; else if U < f a batch of the buffer is replayed; else it is the data's.
    f grows where the validation loss has: see ``observe_validation``.

    Args:
        loss, alpha, detach_mixture: the divergence, as in ``losses``.
        schedule: s(t): "decreasing" 1 - t, "constant" 0.5, "increasing" t.
        threshold: f at the start.
        increase: what f grows by; 0 keeps it, and needs no validation.
        tolerance: growth of the validation loss that lets f grow.
        capacity: rows of the replay buffer; the oldest leave it first.
        generation: fields of GenerationSettings for the student's responses.
        seed: of the choices.

    Raises:
        InputError: an unknown schedule, or a number outside its range.
    """

    def __init__(
        self,
        loss: str = "srkl",
        *,
        alpha: float = 0.1,
        detach_mixture: bool = False,
        schedule: str = "decreasing",
        threshold: float = 0.0,
        increase: float = 0.1,
        tolerance: float = 0.1,
        capacity: int = 1000,
        generation: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self._token = skewed_method(loss, alpha, detach_mixture)
        if schedule not in SCHEDULES:
            raise InputError(
                f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}"
            )
        for name, value in (("threshold", threshold), ("increase", increase)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {value}")
        if capacity < 1:
            raise InputError(f"capacity: expected at least 1 row, got {capacity}")
        self.threshold, self.increase, self.tolerance = threshold, increase, tolerance
        self.kept_loss: float | None = None
        self.replay: deque[Row] = deque(maxlen=capacity)
        self.generation = dict(generation or {})
        self._share = SCHEDULES[schedule]
        self._random = random.Random(seed)

    def counts(self, batch: Batch) -> Tensor:
        """[1] counted positions."""
        return self._token.counts(batch)

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[1] the divergence, summed over the counted positions."""
        return self._token.sums(student, teacher, batch)

    def next_source(self) -> Source:
        """Where the next batch comes from; draws U."""
        uniform = self._random.random()
        full = len(self.replay) == self.replay.maxlen
        if uniform < self.threshold * self._share(self.progress) or (uniform < self.threshold and not full):
            return "student"
        return "replay" if uniform < self.threshold else "data"

    def replayed(self, count: int) -> list[Row]:
        """``count`` rows of the buffer, drawn uniformly, without repeats where there are enough."""
        rows = list(self.replay)
        if count <= len(rows):
            return self._random.sample(rows, count)
        return self._random.choices(rows, k=count)

    def observe_validation(self, loss: float) -> None:
        """The validation loss before training, then that of each evaluation.

        Where it is at least ``tolerance`` above the kept one, f grows by ``increase``, to 1 at most, and it is kept.
        """
        if self.kept_loss is None:
            self.kept_loss = loss
        elif loss >= self.kept_loss + self.tolerance:
            self.threshold = min(1.0, self.threshold + self.increase)
            self.kept_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Threshold, kept loss, replay buffer and random numbers."""
        version, numbers, gauss = self._random.getstate()
        return {
            "threshold": self.threshold,
            "kept_loss": self.kept_loss,
            "replay": list(self.replay),
            "random": [version, list(numbers), gauss],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        self.threshold, self.kept_loss = state["threshold"], state["kept_loss"]
        self.replay.clear()
        self.replay.extend(state["replay"])
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
