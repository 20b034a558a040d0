"""DistiLLM: a skewed divergence on batches that are chosen each step: the data's, the student's own, or replayed.

The student's own are written during the step; their spans are parsed beside it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mta_fast.choices import check_choice
from mta_fast.distill.methods.base import BaseMethod, Batch, Collator, ModelOutput, StepBatches, TrainingPlan
from mta_fast.distill.methods.losses import SEQUENCE_LEVEL_LOSSES, TokenMethod, skewed_method
from mta_fast.distill.responses.generation import GenerationSettings, encode_prompts, generate_texts
from mta_fast.errors import InputError
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.extract import SpanExtractor
from mta_fast.spans.lazy import pending_batch
from mta_fast.spans.parser_pool import ParserPool, PendingSpans

Source = Literal["data", "student", "replay"]
Row = dict[str, Any]
VALIDATION_LOSSES = ("base", *sorted(SEQUENCE_LEVEL_LOSSES))
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
    f grows where the validation loss has: see ``observe_validation``. The authors' scripts follow the cross-entropy and
    count the step that runs.

    Args:
        loss, alpha, detach_mixture: the divergence, as in ``losses``.
        schedule: s(t): "decreasing" 1 - t, "constant" 0.5, "increasing" t.
        count_step: in step g of T, from 0, t is (g + 1) / T; else g / T.
        threshold: f at the start.
        increase: what f grows by; 0 keeps it, and needs no validation.
        tolerance: growth of the validation loss that lets f grow.
        validation_loss: "base": the divergence on the evaluation set; "cross_entropy": that of its responses.
        capacity: rows of the replay buffer; the oldest leave it first.
        generation: fields of GenerationSettings for the student's responses.
        seed: of the choices.

    Raises:
        InputError: an unknown schedule or validation loss, or a number outside its range.
    """

    follows_evaluation = True

    reads_heads = True

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
        validation_loss: str = VALIDATION_LOSSES[0],
        count_step: bool = False,
    ) -> None:
        super().__init__()
        self._token = skewed_method(loss, alpha, detach_mixture)
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("validation_loss", validation_loss, VALIDATION_LOSSES)
        if not isinstance(count_step, bool):
            raise InputError(f"count_step: expected true or false, got {count_step!r}")
        for name, value in (("threshold", threshold), ("increase", increase)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {value}")
        if capacity < 1:
            raise InputError(f"capacity: expected at least 1 row, got {capacity}")
        self.threshold, self.increase, self.tolerance = threshold, increase, tolerance
        self.validation_loss, self.counts_step = validation_loss, count_step
        self.validation = TokenMethod(validation_loss) if validation_loss in SEQUENCE_LEVEL_LOSSES else None
        self.kept_loss: float | None = None
        self.replay: deque[Row] = deque(maxlen=capacity)
        self.generation = dict(generation or {})
        self._share = SCHEDULES[schedule]
        self._random = random.Random(seed)

    def collator(self, collator: Collator) -> Collator:
        """A RowCollator: what the student answers, and what is replayed, are rows."""
        if isinstance(collator, SpanCollator):
            return RowCollator(collator)
        if isinstance(collator, RowCollator):
            return collator
        raise InputError(
            f"data_collator: expected a SpanCollator, as DistiLLM also makes batches of what the student writes, got "
            f"{type(collator).__name__}; give one, subclass it, or leave it out"
        )

    def batches(self, collator: Collator, extractor: SpanExtractor | None) -> OnPolicyBatches:
        """The data's, the student's own, or replayed ones."""
        assert isinstance(collator, RowCollator)
        return OnPolicyBatches(self, collator.collator, extractor)

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

    @property
    def wants_validation(self) -> bool:
        """Where the threshold follows it, and none is known yet."""
        return self.increase > 0 and self.kept_loss is None

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


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class KeptRows:
    """The rows of a batch; in an object, so that nothing on the way looks for tensors in them."""

    rows: list[Row]


class RowCollator:
    """A collator whose batch also holds its rows, under "rows"."""

    def __init__(self, collator: SpanCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self.collator(rows) | {"rows": KeptRows([dict(row) for row in rows])}


class OnPolicyBatches(StepBatches):
    """Takes DistiLLM's choice of each batch's source, and makes the batches that are not the data's.

    A context manager: within it, parsers wait for text in processes of their own. They work while the student writes
    the next micro-batch and while the teacher runs.

    Args:
        method: whose choice it is; its replay buffer is filled.
        collator: makes a batch of rows.
        extractor: parses what the student writes; None without MTA.
    """

    def __init__(self, method: DistiLLM, collator: SpanCollator, extractor: SpanExtractor | None) -> None:
        super().__init__(method)
        self.method, self.collator = method, collator
        options = {"max_new_tokens": max(1, collator.max_length // 2)} | method.generation
        try:
            self.settings = GenerationSettings(**options)
        except TypeError as error:
            raise InputError(f"generation: expected fields of GenerationSettings: {error}") from None
        self._extractor = extractor
        self._pool: ParserPool | None = None
        self._pending: list[tuple[PendingSpans, list[Row]]] = []
        self._counts: Counter[str] = Counter()

    def check(self, plan: TrainingPlan) -> None:
        """Refuse a run that would stop at its first generated batch, maybe hours later, or its first evaluation.

        Raises:
            InputError: MTA without an extractor of its granularity, an adaptive threshold without a validation set, a
                prompt that is empty or leaves no room for a response, or a student whose weights are sharded.
        """
        if isinstance(plan.train_dataset, Sized):
            prompts = [row.get("prompt") for row in plan.train_dataset]  # type: ignore[attr-defined]  # rows are mappings
            for i, prompt in enumerate(prompts):
                if not isinstance(prompt, str) or not prompt:
                    raise InputError(f"row {i}: expected a prompt that the student can answer, got {prompt!r}")
            encode_prompts(plan.student, self.collator.tokenizer, prompts, self.settings)
        kinds = plan.granularity
        if self._extractor is not None and not set(kinds) <= set(self._extractor.granularity):
            raise InputError(
                f"span_extractor: expected the granularity {', '.join(kinds)}, got "
                f"{', '.join(self._extractor.granularity)}"
            )
        if kinds and self._extractor is None:
            raise InputError(
                "span_extractor: expected one for the text that the student writes, got none; "
                "give MTATrainer(span_extractor=SpanExtractor())"
            )
        if self.method.increase > 0:
            self._check_validation(plan)
        if plan.sharded:
            raise InputError(
                "base_loss distillm: expected a student with whole weights to generate with, got sharded ones "
                "(FSDP or DeepSpeed); use DDP"
            )

    def _check_validation(self, plan: TrainingPlan) -> None:
        fixed = "a fixed threshold with {increase: 0, threshold: 0.5}"
        if plan.eval_dataset is None or isinstance(plan.eval_dataset, dict):
            raise InputError(
                f"eval_dataset: expected one, as the threshold of distillm follows the validation loss, got "
                f"{'none' if plan.eval_dataset is None else 'several'}; give one, or {fixed}"
            )
        if not plan.evaluates:
            raise InputError(
                f"eval_strategy: expected steps or epoch, as the threshold of distillm follows the validation loss, "
                f"got 'no'; set it, or {fixed}"
            )

    def __enter__(self) -> OnPolicyBatches:
        if self._extractor is not None:
            self._pool = ParserPool(self._extractor, self._extractor.n_process)
            self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            if kind is None:
                self._settle()
            self._pool.close()
            self._pool = None

    def batch(self, student: nn.Module, batch: dict[str, Any], seed: int, device: torch.device) -> dict[str, Any]:
        """The data's batch (of RowCollator), the student's or a replayed one.

        The spans of what the student writes are there once ``with_spans`` has waited for them.
        """
        from accelerate.utils import send_to_device

        rows = batch["rows"].rows
        source = self.method.next_source()
        self._counts[source] += 1
        if source == "data":
            return batch
        if source == "student":
            return send_to_device(self._written(student, rows, seed), device)
        self._settle()
        return send_to_device(self.collator(self.method.replayed(len(rows))), device)

    def _written(self, student: nn.Module, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """Responses of the student to the rows' prompts; where it writes nothing, the row's own response stays."""
        texts = generate_texts(
            student, self.collator.tokenizer, [row["prompt"] for row in rows], self.settings, seed=seed
        )
        written: list[Row] = []
        for row, text in zip(rows, texts, strict=True):
            self._counts["empty"] += not text.strip()
            written.append({"prompt": row["prompt"], "output": text if text.strip() else row["output"]})
        self.method.replay.extend(written)
        if self._pool is None:
            return self.collator(written)
        batch = pending_batch(self._pool, self.collator, written)
        self._pending.append((batch["spans"].pending, written))
        return batch

    def _settle(self) -> None:
        """Give every row of the buffer its spans."""
        for spans, rows in self._pending:
            for name, column in spans.result().items():
                for row, value in zip(rows, column, strict=True):
                    row[name] = value
        self._pending.clear()

    def logs(self) -> dict[str, float]:
        """Threshold, shares of the batches since the last log, empty responses, waiting for spans."""
        self._settle()
        total = max(1, sum(self._counts[source] for source in ("data", "student", "replay")))
        logs = {
            "threshold": self.method.threshold,
            "student_share": self._counts["student"] / total,
            "replay_share": self._counts["replay"] / total,
            "empty_responses": float(self._counts["empty"]),
        }
        if self._pool is not None:
            logs["span_stall_seconds"] = self._pool.stall_seconds
            self._pool.stall_seconds = 0.0
        self._counts.clear()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """The method's state, the spans of its buffer included."""
        self._settle()
        return self.method.state_dict()
