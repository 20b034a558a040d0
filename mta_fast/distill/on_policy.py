"""What the student writes during training: batches of its own responses, replayed ones, and their spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mta_fast.distill.distillm import DistiLLM, Row
from mta_fast.distill.generation import GenerationSettings, encode_prompts, generate_texts
from mta_fast.errors import InputError
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.extract import SpanExtractor
from mta_fast.spans.lazy import LazySpans, pending_batch
from mta_fast.spans.parser_pool import ParserPool, PendingSpans

Batch = dict[str, Any]


@dataclass(eq=False)
class Rows:
    """The rows of a batch; in an object, so that nothing on the way looks for tensors in them."""

    rows: list[Row]


class RowCollator:
    """A collator whose batch also holds its rows, under "rows"."""

    def __init__(self, collator: SpanCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch."""
        return self.collator(rows) | {"rows": Rows([dict(row) for row in rows])}


class OnPolicyBatches:
    """Takes DistiLLM's choice of each batch's source, and makes the batches that are not the data's.

    A context manager: within it, parsers wait for text in processes of their own. They work while the student writes
    the next micro-batch and while the teacher runs.

    Args:
        method: whose choice it is; its replay buffer is filled.
        collator: makes a batch of rows.
        extractor: parses what the student writes; None without MTA.
    """

    def __init__(self, method: DistiLLM, collator: SpanCollator, extractor: SpanExtractor | None) -> None:
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

    def check(self, student: nn.Module, kinds: Sequence[str], train_dataset: Any, eval_dataset: Any) -> None:
        """Refuse a run that would stop at its first generated batch, maybe hours later, or its first evaluation.

        Raises:
            InputError: MTA without an extractor of its granularity, an adaptive threshold without a validation set, or
                a prompt that is empty or leaves no room for a response.
        """
        if isinstance(train_dataset, Sized):
            prompts = [row.get("prompt") for row in train_dataset]  # type: ignore[attr-defined]  # rows are mappings
            for i, prompt in enumerate(prompts):
                if not isinstance(prompt, str) or not prompt:
                    raise InputError(f"row {i}: expected a prompt that the student can answer, got {prompt!r}")
            encode_prompts(student, self.collator.tokenizer, prompts, self.settings)
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
        if self.method.increase > 0 and (eval_dataset is None or isinstance(eval_dataset, dict)):
            raise InputError(
                f"eval_dataset: expected one, as the threshold of distillm follows the validation loss, got "
                f"{'none' if eval_dataset is None else 'several'}; give one, or a fixed threshold with "
                f"{{increase: 0, threshold: 0.5}}"
            )

    @property
    def wants_first_validation(self) -> bool:
        """Whether the validation loss before training is still to be measured."""
        return self.method.increase > 0 and self.method.kept_loss is None

    def __enter__(self) -> OnPolicyBatches:
        if self._extractor is not None:
            self._pool = ParserPool(self._extractor, self._extractor.n_process)
            self._pool.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            if kind is None:
                self._settle()
            self._pool.close()
            self._pool = None

    def batch(self, student: nn.Module, batch: Batch, seed: int, device: torch.device) -> Batch:
        """The batch to train on in place of the data's ``batch``, which it may be itself.

        Args:
            student: writes the responses.
            batch: from RowCollator.
            seed: of what is written.
            device: where the batch goes. Its spans are there once ``with_spans`` has waited for them.
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

    def _written(self, student: nn.Module, rows: Sequence[Row], seed: int) -> Batch:
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

    def drain(self) -> dict[str, float]:
        """What to log: threshold, shares of the batches since the last log, empty responses, waiting for spans."""
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


def with_spans(batch: Mapping[str, Any]) -> Batch:
    """The batch with the spans that it was waiting for."""
    return {name: value.result() if isinstance(value, LazySpans) else value for name, value in batch.items()}
