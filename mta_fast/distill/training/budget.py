"""Batches by a budget of tokens: rows of like length, as many as fit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from mta_fast.distill.methods.base import BaseMethod, StepBatches
from mta_fast.errors import InputError
from mta_fast.spans.collate import SpanCollator


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of row numbers whose tokens stay at or below a budget; every row once an epoch.

    Rows are sorted by length, those of one length in random order, and cut into batches, which come in random order;
    both orders follow from seed and epoch alone. Every epoch has equally many batches.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch.
        padded: S of a batch whose longest row has so many tokens; None: rows are packed.
        ranks: the number of batches is made a multiple of it, by halving large ones, where there are rows enough.
        seed: of the orders.

    Attributes:
        batch_size: None: batches differ in their rows. drop_last: False. Both are for accelerate.
        epoch: set by the Trainer.

    Raises:
        InputError: a row that alone is above the budget.
    """

    batch_size, drop_last = None, False

    def __init__(
        self, lengths: Sequence[int], budget: int, padded: Callable[[int], int] | None, *, ranks: int, seed: int
    ) -> None:
        self._lengths, self._seed, self.epoch = lengths, seed, 0
        ordered = sorted(lengths)
        least = ordered[-1] if padded is None else padded(ordered[-1])
        if least > budget:
            raise InputError(
                f"max_tokens_per_batch: expected at least {least}, which the longest row takes, got {budget}; raise "
                f"it, or lower max_length"
            )
        starts, tokens = [0], 0
        for i, length in enumerate(ordered):
            tokens = tokens + length if padded is None else (i + 1 - starts[-1]) * padded(length)
            if tokens > budget:
                starts.append(i)
                tokens = length
        self._bounds = list(zip(starts, [*starts[1:], len(ordered)], strict=True))
        while len(self._bounds) % ranks and len(self._bounds) < len(ordered):
            start, end = max(self._bounds, key=lambda each: each[1] - each[0])
            i, middle = self._bounds.index((start, end)), (start + end) // 2
            self._bounds[i : i + 1] = [(start, middle), (middle, end)]

    def set_epoch(self, epoch: int) -> None:
        """Take the orders of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[list[int]]:
        drawn = random.Random(f"{self._seed}, {self.epoch}")
        order = list(range(len(self._lengths)))
        drawn.shuffle(order)
        order.sort(key=self._lengths.__getitem__)
        batches = [order[start:end] for start, end in self._bounds]
        drawn.shuffle(batches)
        yield from batches


def check_budget(method: BaseMethod, batches: StepBatches, collator: Any, *, streamed: bool) -> None:
    """Refuse what the tokens of a batch can't be counted of before it is made.

    Args:
        batches: where a step's batches come from. collator: what makes them of rows.
        streamed: whether the rows are a stream.

    Raises:
        InputError: names it.
    """
    what = None
    if streamed:
        what = "rows of a known number, got a stream"
    elif len(method.responses) > 1:
        what = f"rows of one response, those of {method.name} have {len(method.responses)}"
    elif type(batches) is not StepBatches:
        what = f"batches of the data's rows, {method.name} makes some of its own"
    elif not isinstance(collator, SpanCollator):
        what = f"batches of a SpanCollator, got {type(collator).__name__}"
    if what is not None:
        raise InputError(f"max_tokens_per_batch: expected {what}; give per_device_train_batch_size in its place")
