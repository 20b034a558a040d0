"""The standard workload of every benchmark: three layer pairs, GPT-2 120M <- 1.5B widths.

Pair 1 aligns one-token spans on the first 80% of each row's tokens, pairs 2 and 3 two-token spans on the same
tokens (real Dolly text has 1.2 tokens a word and 2.3 a phrase). No padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mta_fast import MTAConfig, MTALoss, SpanBatch

STUDENT_DIM, TEACHER_DIM = 768, 1600
COVERED_SHARE = 0.8


@dataclass(frozen=True)
class Workload:
    """Inputs of one loss call; ``config`` is the public scripts' variant, so that both sides compute the same."""

    config: MTAConfig
    loss: MTALoss
    student_hidden: dict[int, Tensor]
    teacher_hidden: dict[int, Tensor]
    attention_mask: Tensor
    offset_mapping: Tensor  # one character a token
    char_spans: dict[str, list[list[tuple[int, int]]]]
    spans: dict[str, SpanBatch]

    def learnt(self) -> list[Tensor]:
        """The tensors that receive a gradient."""
        return [*self.student_hidden.values(), *self.loss.parameters()]


def standard_workload(
    batch: int, seq_len: int, dims: tuple[int, int] = (STUDENT_DIM, TEACHER_DIM), seed: int = 0
) -> Workload:
    """Make the inputs: random hidden states, float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    config = MTAConfig.public(
        layer_pairs=[(0, 0), (1, 1), (2, 2)], granularity=["word", "phrase", "phrase"], weight=1.0
    )
    loss = MTALoss(config, *dims)
    student, teacher = (
        {layer: torch.randn(batch, seq_len, dim, generator=generator) for layer in range(3)} for dim in dims
    )
    for hidden in student.values():
        hidden.requires_grad_()
    covered = int(COVERED_SHARE * seq_len)
    words = [(j, j + 1) for j in range(covered)]
    phrases = [(j, j + 2) for j in range(0, covered - 1, 2)]
    # one character a token, with a gap after each so that the forgiven leading character adds no token
    offsets = torch.stack([torch.arange(seq_len) * 3, torch.arange(seq_len) * 3 + 1], -1).expand(batch, -1, -1)
    char_spans = {
        kind: [[(3 * start, 3 * end - 2) for start, end in rows]] * batch
        for kind, rows in (("word", words), ("phrase", phrases))
    }
    mask = torch.ones(batch, seq_len, dtype=torch.long)
    spans = {kind: SpanBatch.from_char_spans(rows, offsets, mask) for kind, rows in char_spans.items()}
    return Workload(config, loss, student, teacher, mask, offsets, char_spans, spans)
