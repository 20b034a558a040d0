"""The public scripts' part of a training step: decode, parse, tokenise again, and a loss that squares the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.harness import seconds
from bench.public_algorithm import layer_loss
from mta_fast import MTALoss, MTAOutput, SpanBatch
from mta_fast.compat import get_spans_offsets
from mta_fast.loss import LayerPairTerms
from mta_fast.spans.extract import DEFAULT_MODEL, load_pipeline


class PublicWay(MTALoss):
    """Stands where MTALoss stands in the trainer, and computes its terms as the public scripts do, text included.

    The scripts start four spaCy processes in each step; here one parses in this process, which takes less time.

    Attributes:
        tokenizer: set before the first step; input_ids: [B, S] of the batch, set before each step.
        parts: seconds that the last call spent on text.
        spans: what it found in the last batch, as MTALoss takes it.
    """

    tokenizer: Any
    input_ids: Tensor
    parts: dict[str, float]
    spans: dict[str, SpanBatch]

    def prepare(self, tokenizer: Any) -> None:
        """Load the parser."""
        from spacy.matcher import Matcher

        self.tokenizer, self._pipeline = tokenizer, load_pipeline(DEFAULT_MODEL)
        self._matcher = Matcher(self._pipeline.vocab)
        tail = [{"POS": "VERB", "OP": "+"}, {"POS": "ADV", "OP": "*"}]
        self._matcher.add("verb phrase", [[{"POS": "AUX", "OP": "*"}, {"POS": "ADV", "OP": "*"}, *tail]])

    def forward(  # type: ignore[override]  # what the spans are is found here
        self, student_hidden: Mapping[int, Tensor], teacher_hidden: Mapping[int, Tensor], spans: Any, **_: Any
    ) -> MTAOutput:
        """The terms of one batch, each of the scripts' numbers over 1."""
        length, found = self.input_ids.shape[1], {}

        def tokenise() -> None:
            found["texts"] = self.tokenizer.batch_decode(self.input_ids, skip_special_tokens=True)
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            encoded = self.tokenizer(found["texts"], return_offsets_mapping=True, return_tensors="pt", **options)
            found["offsets"], found["mask"] = encoded["offset_mapping"], encoded["attention_mask"]

        def parse() -> None:
            found["phrase"], found["word"] = get_spans_offsets(found["texts"], self._pipeline, self._matcher)

        self.parts = {"decode and tokenise again": seconds(tokenise), "parse": seconds(parse)}
        self._found = found
        terms = [
            layer_loss(
                self.projections[i], found["mask"], student_hidden[student], teacher_hidden[teacher],
                found["offsets"], found[kind],
            )
            for i, ((student, teacher), kind) in enumerate(
                zip(self.config.layer_pairs, self.config.granularity, strict=True)
            )
        ]  # fmt: skip
        dsa, hid = (torch.stack(column) for column in zip(*terms, strict=True))
        per_layer = LayerPairTerms(dsa, torch.ones_like(dsa).detach(), hid, torch.ones_like(hid).detach())
        return MTAOutput(self.config.weighted(dsa.mean(), hid.mean()), dsa.mean(), hid.mean(), per_layer)

    def found_spans(self) -> dict[str, SpanBatch]:
        """The last batch's spans as MTALoss takes them, to compare the numbers."""
        offsets, mask = self._found["offsets"], self._found["mask"]
        return {
            kind: SpanBatch.from_char_spans(self._found[kind], offsets, mask, drop_truncated=False)
            for kind in ("word", "phrase")
        }
