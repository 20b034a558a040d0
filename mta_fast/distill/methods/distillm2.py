"""DistiLLM-2: skewed divergences on pairs of responses, the teacher's (chosen) and the student's (rejected)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mta_fast.distill.data import PAIR
from mta_fast.distill.heads import HeadStates
from mta_fast.distill.methods.base import BaseMethod, Batch, Collator, ModelOutput, head_of
from mta_fast.distill.methods.losses import (
    LogProbabilities,
    check_share,
    counted_positions,
    counted_tokens,
    log_probabilities,
    through_heads,
    warn_where_nothing_counts,
)
from mta_fast.errors import InputError
from mta_fast.ops.linear_divergence import divergence
from mta_fast.spans.collate import SpanCollator

SMALLEST_ALPHA, LARGEST_ALPHA = 0.01, 0.1  # of the adaptive alpha
GAP_EPS = 1e-5


class DistiLLM2(BaseMethod):
    """mean over pairs of (2 - beta) SKL(chosen) + beta SRKL(rejected) (DistiLLM-2, arXiv 2503.07067).

    Each divergence is the mean over a response's tokens. A batch holds 2B rows: the chosen responses of B prompts, then
    the rejected ones in the same order, as PairCollator makes them.

    Args:
        alpha: skew of both divergences.
        beta: weight of the rejected responses, 0 to 2.
        growing_beta: beta = 1 + 0.5 min(1, 2 progress) instead.
        adaptive_alpha: a skew for each response instead, from how far the two models are apart on it:
            alpha = clip(1 - (1 - 0.1) m / (delta + 1e-5), 0.01, 0.1), detached, with delta = exp(mean log p) -
            exp(mean log q) on chosen responses and its negative on rejected ones, and m the mean of delta over the
            first ``anchor_steps`` micro-batches (until then ``alpha`` is used).
        anchor_steps: micro-batches of training that m is taken over.
        detach_mixture: no gradient through the student's part of the rejected mixture.

    Raises:
        InputError: an alpha outside 0 to 1, a beta outside 0 to 2.
    """

    responses = PAIR
    reads_heads = True
    reads_rows = True

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        growing_beta: bool = False,
        adaptive_alpha: bool = False,
        anchor_steps: int = 10,
        detach_mixture: bool = True,
    ) -> None:
        super().__init__()
        check_share("alpha", alpha)
        if not 0 <= beta <= 2:
            raise InputError(f"beta: expected a number from 0 to 2, got {beta}")
        if anchor_steps < 1:
            raise InputError(f"anchor_steps: expected an integer >= 1, got {anchor_steps}")
        self.alpha, self.detach_mixture = alpha, detach_mixture
        self._beta = None if growing_beta else beta
        self._anchor = _Anchor(anchor_steps) if adaptive_alpha else None

    @property
    def beta(self) -> float:
        """The weight of the rejected responses now."""
        return 1 + 0.5 * min(1.0, 2 * self.progress) if self._beta is None else self._beta

    def collator(self, collator: Collator) -> Collator:
        """A PairCollator around a SpanCollator or a subclass of it; others make batches of 2B rows themselves."""
        return PairCollator(collator) if isinstance(collator, SpanCollator) else collator

    def counts(self, batch: Batch) -> Tensor:
        """[1] pairs."""
        return batch["labels"].new_tensor([len(batch["labels"]) // 2])

    def sums(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """[1] the loss, summed over the pairs."""
        labels = batch["labels"]
        if len(labels) % 2:
            raise InputError(
                f"batch: expected as many rejected rows as chosen ones, got {len(labels)} rows in all; "
                f"PairCollator makes such batches of rows with prompt, chosen and rejected"
            )
        lengths, tokens, pairs = counted_positions(labels).sum(1), counted_tokens(labels), len(labels) // 2
        targets = labels.flatten()[tokens + 1]
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(lengths, output_size=len(targets))
        own, other = head_of(student), head_of(teacher)
        if own is not None and other is not None:
            warn_where_nothing_counts(targets)
            return self._through_heads(own, other, tokens, targets, rows, lengths)
        log = log_probabilities(student.logits, teacher.logits, labels)
        of_labels = (side.detach().gather(-1, targets[:, None])[:, 0] for side in log)
        alpha = self._alpha(of_labels, rows, lengths, torch.is_grad_enabled())
        split = int(lengths[:pairs].sum())  # positions lie row after row: those of the chosen responses come first
        sizes = [split, len(rows) - split]
        chosen, rejected = (
            LogProbabilities(*part) for part in zip(log.p.split(sizes), log.q.split(sizes), strict=True)
        )
        on_chosen = divergence(*chosen, "skl", alpha[:split])
        on_rejected = divergence(*rejected, "srkl", alpha[split:], detach=self.detach_mixture)
        weighted = torch.cat([(2 - self.beta) * on_chosen, self.beta * on_rejected])
        return _row_means(weighted, rows, lengths).sum()[None]

    def _through_heads(
        self, own: HeadStates, other: HeadStates, tokens: Tensor, targets: Tensor, rows: Tensor, lengths: Tensor
    ) -> Tensor:
        """``sums`` without logits; the adaptive alpha takes a pass over both heads of its own."""
        learns = torch.is_grad_enabled()
        with torch.no_grad():
            of_labels = (
                -through_heads(side, None, tokens, "cross_entropy", labels=targets, reduction="none")
                for side in (other, own)
            )
            alpha = self._alpha(of_labels, rows, lengths, learns)
        pairs = len(lengths) // 2
        split = int(lengths[:pairs].sum())  # tokens lie row after row: those of the chosen responses come first
        weights = torch.where(rows < pairs, 2 - self.beta, self.beta) / lengths[rows]
        on_chosen = through_heads(
            own, other, tokens[:split], "skl", alpha=alpha[:split], weights=weights[:split], reduction="sum"
        )
        on_rejected = through_heads(
            own, other, tokens[split:], "srkl", alpha=alpha[split:], weights=weights[split:],
            detach_mixture=self.detach_mixture, reduction="sum",
        )  # fmt: skip
        return (on_chosen + on_rejected)[None]

    def _alpha(self, of_labels: Iterable[Tensor], rows: Tensor, lengths: Tensor, learns: bool) -> Tensor:
        """[M] the skew at each counted position, from log p and log q of its label, which are made if they are read."""
        if self._anchor is None:
            return torch.full(rows.shape, self.alpha, device=rows.device)
        p, q = (_row_means(logs, rows, lengths).exp() for logs in of_labels)
        pairs = len(lengths) // 2
        gap = torch.cat([(p - q)[:pairs], (q - p)[pairs:]])
        if learns:
            self._anchor.observe(gap.reshape(2, pairs), (lengths > 0).reshape(2, pairs), self.reduce)
        if not self._anchor.known:
            return torch.full(rows.shape, self.alpha, device=rows.device)
        anchor = self._anchor.mean.to(gap).repeat_interleave(pairs)
        alpha = 1 - (1 - LARGEST_ALPHA) * anchor / (gap + GAP_EPS)
        return alpha.nan_to_num(LARGEST_ALPHA).clamp(SMALLEST_ALPHA, LARGEST_ALPHA)[rows]

    def state_dict(self) -> dict[str, Any]:
        """The running average of the adaptive alpha."""
        return {} if self._anchor is None else self._anchor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        if self._anchor is not None:
            self._anchor.load_state_dict(state)


class _Anchor:
    """m of the adaptive alpha: the mean gap of chosen and of rejected responses over the first batches."""

    def __init__(self, steps: int) -> None:
        self._steps, self._seen = steps, 0
        self._total = torch.zeros(2, 2, dtype=torch.float64)  # gaps of chosen, of rejected; how many of each

    @property
    def known(self) -> bool:
        return self._seen >= self._steps

    @property
    def mean(self) -> Tensor:
        """[2] of chosen, of rejected."""
        return self._total[0] / self._total[1].clamp(min=1)

    def observe(self, gap: Tensor, counted: Tensor, reduce: Any) -> None:
        """[2, pairs] of a batch; those without a counted token are left out."""
        if not self.known:
            own = torch.stack([(gap * counted).double().sum(1), counted.double().sum(1)])
            self._total += reduce(own).cpu()
            self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "total": self._total.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen, self._total = int(state["seen"]), torch.tensor(state["total"], dtype=torch.float64)


def _row_means(values: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """[R] means of values [M] over the rows they are of; 0 for a row without any."""
    return values.new_zeros(len(lengths)).index_add(0, rows, values) / lengths.clamp(min=1)


class PairCollator:
    """A batch of 2B rows from B pairs: the chosen responses, then the rejected ones.

    A pair has "prompt", "chosen" and "rejected", and their spans over prompt + response in "chosen_word_spans",
    "rejected_word_spans" and so on.

    Args:
        collator: makes the batch of the 2B rows.
    """

    def __init__(self, collator: SpanCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, as SpanCollator makes it.

        Raises:
            InputError: a row without its columns.
        """
        return self.collator([response_row(i, row, name) for name in PAIR for i, row in enumerate(rows)])


def response_row(i: int, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One response of a pair as a row of prompt and output; ``name`` is "chosen" or "rejected"."""
    for column in ("prompt", name):
        if not isinstance(row.get(column), str):
            raise InputError(
                f"row {i}: expected strings in the columns 'prompt', 'chosen' and 'rejected', got "
                f"{ ({key: type(value).__name__ for key, value in row.items()}) }; mta-fast generate makes such rows"
            )
    spans = {key.removeprefix(f"{name}_"): value for key, value in row.items() if key.startswith(f"{name}_")}
    return {"prompt": row["prompt"], "output": row[name], **spans}
