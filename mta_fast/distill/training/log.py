"""What a run logs: sums of the terms since the last log, times, and the losses of an evaluation set."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mta_fast.config import MTAConfig
from mta_fast.distill.training.arguments import MTATrainingArguments
from mta_fast.distill.training.module import DistillationOutput
from mta_fast.distill.training.stopwatch import Stopwatch
from mta_fast.loss import LayerPairTerms

Reduce = Callable[[Tensor], Tensor]
TERMS = ("base", "dsa", "hid")


class TrainingLog:
    """Sums of the terms, and times, since the last log.

    Attributes:
        finished_seconds: wall-clock time of all finished steps, data included; evaluation and saving are not.
    """

    def __init__(self, device: torch.device) -> None:
        self.mta, self.step = Stopwatch(device), Stopwatch(device)
        self.norms: dict[str, float] = {}
        self.steps = 0
        self.finished_seconds = 0.0
        self._sums: Tensor | None = None
        self._began: float | None = None

    def begin_step(self) -> None:
        """A step begins, its data included."""
        self._began = time.perf_counter()
        self.step.start()

    def end_step(self) -> None:
        """The parameters are updated."""
        self.step.stop()
        self.mta.close()
        self.steps += 1
        self.finished_seconds = self.total_seconds
        self._began = None

    @property
    def total_seconds(self) -> float:
        """Of the finished steps and of the one that runs."""
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self.finished_seconds + running

    def add(self, output: DistillationOutput) -> None:
        """The terms of a micro-batch."""
        terms = torch.stack([output.base.detach(), output.dsa.detach(), output.hid.detach()]).double()
        self._sums = terms if self._sums is None else self._sums + terms

    def wants_norms(self, state: Any, args: MTATrainingArguments) -> bool:
        """The first micro-batch of a step that is logged."""
        step = state.global_step + 1
        logged = step == 1 and args.logging_first_step
        if args.logging_strategy == "steps":
            logged = logged or step % max(1, int(state.logging_steps)) == 0
        return logged and not self.norms

    def drain(self, reduce: Reduce) -> dict[str, float]:
        """What to log, and start anew; ``reduce`` sums over the ranks."""
        assert self._sums is not None
        sums = reduce(self._sums)
        logs = {name: value / self.steps for name, value in zip(TERMS, sums.tolist(), strict=True)}
        step, mta = self.step.seconds(), self.mta.seconds()
        logs |= {"mta_share_of_step": mta / step if step else 0.0, **self.norms}
        self.norms, self.steps, self._sums = {}, 0, None
        return logs


class StepEnd(TrainerCallback):
    """Stops the step's clock before evaluation and saving begin, and the training once its time is up.

    ``seconds`` gives the time of training so far, the same on every rank.
    """

    def __init__(self, log: TrainingLog, seconds: Callable[[], float]) -> None:
        self._log, self._seconds = log, seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        self._log.end_step()
        if args.max_seconds is not None and self._seconds() >= args.max_seconds:
            control.should_training_stop = True


class EvaluationSums:
    """Numerators and denominators over an evaluation set."""

    def __init__(self) -> None:
        self._base: list[Tensor] = []
        self._mta: list[Tensor] = []
        self._validation: list[Tensor] = []

    def add(self, output: DistillationOutput, *, counts: bool = True) -> None:
        """A batch; one that does not count is there because the other ranks have one."""
        for sums, terms in (
            (self._base, output.base_terms),
            (self._mta, output.per_layer),
            (self._validation, output.validation),
        ):
            if terms is not None:
                sums.append(terms.double() if counts else torch.zeros_like(terms, dtype=torch.float64))

    def terms(self, config: MTAConfig | None, reduce: Reduce) -> dict[str, float]:
        """loss, base, dsa, hid and what the base method follows in place of its own loss, of the whole set."""
        terms = {"base": self._mean(self._base, reduce)}
        if self._validation:
            terms["validation"] = self._mean(self._validation, reduce)
        if config is not None and self._mta:
            dsa, hid = (float(term) for term in LayerPairTerms(*self._sum(self._mta, reduce)).means())
            return {"loss": terms["base"] + config.weighted(dsa, hid), **terms, "dsa": dsa, "hid": hid}
        return {"loss": terms["base"], **terms}

    def _mean(self, parts: list[Tensor], reduce: Reduce) -> float:
        sums, counts = self._sum(parts, reduce)
        return float((sums / counts.clamp(min=1)).sum())

    @staticmethod
    def _sum(parts: list[Tensor], reduce: Reduce) -> Tensor:
        return reduce(torch.stack(parts).sum(0))
