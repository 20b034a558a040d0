"""Batches that are in use before their spans are there: a collator's, with spans that a ParserPool still makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mta_fast.errors import InputError
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.parser_pool import ParserPool, PendingSpans


class LazySpans:
    """The {"word": SpanBatch, ...} of a batch that is already in use while its texts are parsed.

    No mapping: what moves a batch to a device must not ask for the spans.

    Attributes:
        pending: the character spans of the batch's texts.
    """

    def __init__(
        self, pending: PendingSpans, aligned: Callable[[], Mapping[str, Mapping[str, SpanBatch]]], side: str
    ) -> None:
        self.pending = pending
        self._aligned, self._side = aligned, side
        self._place: dict[str, Any] = {}
        self._spans: dict[str, SpanBatch] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LazySpans:
        """Remember the device that ``result`` moves the spans to; returns this object."""
        self._place, self._spans = {"device": device, "non_blocking": non_blocking}, None
        return self

    def result(self) -> dict[str, SpanBatch]:
        """The spans, aligned and moved to the device; waits until their texts are parsed.

        Raises:
            What ``PendingSpans.result`` and ``SpanCollator.align`` raise.
        """
        if self._spans is None:
            made = self._aligned()[self._side]
            self._spans = {kind: spans.to(**self._place) if self._place else spans for kind, spans in made.items()}
        return self._spans


def pending_batch(pool: ParserPool, collator: SpanCollator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The collator's batch of these rows at once, while the pool parses their texts.

    Args:
        rows: "prompt" and "output" (or "text"); columns of spans are not read.

    Returns:
        What ``collator(rows)`` gives, with LazySpans as "spans" and, with a teacher tokenizer, as "teacher_spans".

    Raises:
        InputError: rows without texts, or a pool that does not extract the collator's granularity.
    """
    extracted = pool.extractor.granularity
    if not set(collator.granularity) <= set(extracted):
        raise InputError(
            f"pool: expected an extractor of the collator's granularity {', '.join(collator.granularity)}, "
            f"got one of {', '.join(extracted)}; give SpanExtractor(granularity=...) the same"
        )
    tokenized = collator.tokenize(rows)
    pending = pool.submit(tokenized.texts)
    aligned = functools.cache(lambda: collator.align(tokenized, pending.result()))  # one alignment makes both sides
    sides = ("spans", "teacher_spans")[: len(tokenized.sides)]
    return tokenized.batch | {side: LazySpans(pending, aligned, side) for side in sides}
