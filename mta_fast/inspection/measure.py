"""inspect_text: what MTA measures on one text, collected for the views (terminal, page, picture)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mta_fast.config import MTAConfig
from mta_fast.distill.students.vocabulary import teacher_ids
from mta_fast.errors import InputError
from mta_fast.inspection.side import Side, Token
from mta_fast.layers import num_layers
from mta_fast.loss import MTALoss
from mta_fast.ops.entropy import entropy_weights
from mta_fast.ops.span_pairs import span_distances
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.extract import SpanExtractor

CharSpan = tuple[int, int]
Floats = npt.NDArray[np.float64]
MAX_LENGTH = 256  # tokens; the paper's
WORST_PAIRS = 10


@dataclass(frozen=True)
class Span:
    """A word or phrase: its characters [start, end) and the tokens [first, last) it got on either side."""

    text: str
    start: int
    end: int
    teacher_tokens: tuple[int, int]
    student_tokens: tuple[int, int]


@dataclass(frozen=True)
class SpanPair:
    """Two spans (positions in ``LayerPair.spans``), their distances, and their share of the DSA numerator."""

    first: int
    second: int
    teacher: float
    student: float
    share: float


@dataclass(frozen=True, eq=False)
class LayerPair:
    """What MTA measures at one layer pair.

    Attributes:
        student_layer, teacher_layer: hidden-state indices.
        granularity: "word" or "phrase".
        importance: [n] a_j of the teacher's tokens.
        spans: the N spans that are compared.
        salience: [N] W_u, what DSA weights the spans with (1 with ``weighting="uniform"``).
        teacher_distances, student_distances: [N, N] 1 - cosine of the pooled spans.
        dsa: L_DSA of this layer pair; hid: L_Hid, or None without projections.
        worst: the span pairs with the largest share of DSA, largest first.
    """

    student_layer: int
    teacher_layer: int
    granularity: str
    importance: Floats
    spans: tuple[Span, ...]
    salience: Floats
    teacher_distances: Floats
    student_distances: Floats
    dsa: float
    hid: float | None
    worst: tuple[SpanPair, ...]

    @property
    def relative_importance(self) -> Floats:
        """Importance over that of an average token, 1 / n: 1 is average, 2 is attended twice as much."""
        return self.importance * len(self.importance)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What MTA measures on one text.

    Attributes:
        text: the text.
        tokens: the teacher's tokens; student_tokens: the student's, the same object with one tokenizer.
        spans: {"word": ..., "phrase": ...} as far as the extractor gives them.
        dropped: how many spans of each kind truncation cut or no token belongs to.
        truncated: whether the text was longer than ``max_length`` tokens.
        layer_pairs: in the order of the config.
        teacher, student: names of the models; teacher_depth, student_depth: their numbers of layers.
    """

    text: str
    tokens: tuple[Token, ...]
    student_tokens: tuple[Token, ...]
    spans: Mapping[str, tuple[Span, ...]]
    dropped: Mapping[str, int]
    truncated: bool
    layer_pairs: tuple[LayerPair, ...]
    teacher: str
    student: str
    teacher_depth: int
    student_depth: int

    @property
    def two_tokenizers(self) -> bool:
        """Whether the models read different tokens."""
        return self.student_tokens is not self.tokens


def inspect_text(
    text: str,
    teacher_model: nn.Module,
    student_model: nn.Module,
    tokenizer: Any,
    config: MTAConfig,
    extractor: SpanExtractor,
    *,
    teacher_tokenizer: Any = None,
    projections: nn.ModuleList | None = None,
    max_length: int = MAX_LENGTH,
) -> Inspection:
    """Run both models once on a text and collect what MTA compares; no gradients.

    The text is tokenised as the tokenizer does by itself: no end token is added as SpanCollator does.

    Args:
        text: what to look at; prompt and response as one string.
        teacher_model, student_model: causal language models of transformers, on any device; their modes are kept.
        tokenizer: a fast tokenizer, the student's.
        config: layer pairs, granularity and the options of the terms.
        extractor: finds the words and phrases.
        teacher_tokenizer: the teacher's, where it differs; it may have more tokens (``distill.students.vocabulary``).
        projections: ``projections`` of a trained MTALoss for Hid; without them Hid is left out, since random
            projections would measure nothing.
        max_length: tokens that are kept.

    Raises:
        InputError: an empty text, a layer beyond a model's depth, token ids or lengths that a model doesn't take,
            hidden states that aren't finite, projections of other widths.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"text: expected some characters, got {text!r:.40}; give a sentence")
    SpanCollator(tokenizer, teacher_tokenizer, max_length=max_length)  # checks the tokenizers
    numbers = None if teacher_tokenizer is None else teacher_ids(tokenizer, teacher_tokenizer)
    teacher_tokenizer = teacher_tokenizer if numbers is None else None  # both read the same tokens
    found = _extract(text, config, extractor)
    student = Side.make("student", text, student_model, tokenizer, config.student_layers, max_length)
    other = tokenizer if teacher_tokenizer is None else teacher_tokenizer
    teacher = Side.make("teacher", text, teacher_model, other, config.teacher_layers, max_length, numbers)
    if teacher_tokenizer is None:
        teacher = replace(teacher, tokens=student.tokens)
    batches = {kind: _align(text, spans, student, teacher, teacher_tokenizer is not None) for kind, spans in found}
    measured = _measure(student, teacher, batches, config, teacher_tokenizer is not None, projections)
    return Inspection(
        text=text,
        tokens=teacher.tokens,
        student_tokens=student.tokens,
        spans={kind: batch.named for kind, batch in batches.items()},
        dropped={kind: len(spans) - len(batches[kind].named) for kind, spans in found},
        truncated=student.truncated or teacher.truncated,
        layer_pairs=measured,
        teacher=_name(teacher_model),
        student=_name(student_model),
        teacher_depth=num_layers(teacher_model),
        student_depth=num_layers(student_model),
    )


def _extract(text: str, config: MTAConfig, extractor: SpanExtractor) -> list[tuple[str, list[CharSpan]]]:
    """(kind, character spans) of every kind the extractor finds."""
    missing = set(config.granularity) - set(extractor.granularity)
    if missing:
        raise InputError(
            f"extractor: expected one for {', '.join(sorted(set(config.granularity)))}, got one for "
            f"{', '.join(extractor.granularity)}; SpanExtractor() finds both"
        )
    columns = extractor([text])
    return [(kind, [(s, e) for s, e in columns[f"{kind}_spans"][0]]) for kind in extractor.granularity]


def _name(model: nn.Module) -> str:
    path = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or type(model).__name__


# --- spans -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spans:
    """The kept spans of one kind, as a SpanBatch for each side and by name."""

    student: SpanBatch
    teacher: SpanBatch
    named: tuple[Span, ...]


def _align(text: str, spans: list[CharSpan], student: Side, teacher: Side, two_tokenizers: bool) -> _Spans:
    if spans:  # each in a row of its own: the rows that keep theirs are the spans that the batch keeps
        alone, _ = _batches([[span] for span in spans], text, student, teacher, two_tokenizers)
        spans = [spans[row] for row in alone.span_rows.tolist()]
    own, other = _batches([spans], text, student, teacher, two_tokenizers)
    ranges = zip(spans, own.ranges.tolist(), other.ranges.tolist(), strict=True)
    named = tuple(Span(text[s:e], s, e, (t[0], t[1]), (o[0], o[1])) for (s, e), o, t in ranges)
    return _Spans(own, other, named)


def _batches(
    rows: list[list[CharSpan]], text: str, student: Side, teacher: Side, two_tokenizers: bool
) -> tuple[SpanBatch, SpanBatch]:
    texts, count = [text] * len(rows), len(rows)
    own, other = (
        (side.offsets.expand(count, -1, -1), None, side.special.expand(count, -1)) for side in (student, teacher)
    )
    if two_tokenizers:
        return SpanBatch.pair(rows, own, other, texts=texts)
    made = SpanBatch.from_char_spans(rows, own[0], special_tokens_mask=own[2], texts=texts)
    return made, made


# --- numbers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(
    student: Side,
    teacher: Side,
    batches: Mapping[str, _Spans],
    config: MTAConfig,
    two_tokenizers: bool,
    projections: nn.ModuleList | None,
) -> tuple[LayerPair, ...]:
    """What MTALoss computes of every layer pair; both terms are measured even where the config leaves one out."""
    output, explained = _loss(student, teacher, config, projections)(
        student.hidden,
        teacher.hidden,
        {kind: spans.student for kind, spans in batches.items()},
        teacher_spans={kind: spans.teacher for kind, spans in batches.items()} if two_tokenizers else None,
        entropy_weights=entropy_weights(teacher.logits) if config.weighting == "entropy" else None,
        explain=True,
    )
    dsa, hid = (quotients.tolist() for quotients in output.per_layer.quotients())
    pairs = []
    for i, ((own, other), kind, made) in enumerate(zip(config.layer_pairs, config.granularity, explained, strict=True)):
        salience = made.span_weights.double().numpy()
        distances = [span_distances(side.states.double()).numpy() for side in (made.teacher_spans, made.student_spans)]
        pairs.append(
            LayerPair(
                student_layer=own,
                teacher_layer=other,
                granularity=kind,
                importance=made.importance[0].double().numpy(),
                spans=batches[kind].named,
                salience=salience,
                teacher_distances=distances[0],
                student_distances=distances[1],
                dsa=dsa[i],
                hid=None if projections is None else hid[i],
                worst=_worst_pairs(salience, *distances),
            )
        )
    return tuple(pairs)


def _loss(student: Side, teacher: Side, config: MTAConfig, projections: nn.ModuleList | None) -> MTALoss:
    """MTALoss of these widths with both terms; Hid through the projections given, left out without."""
    lambda_hid = 0.0 if projections is None else config.lambda_hid or 1.0
    config = replace(config, lambda_dsa=config.lambda_dsa or 1.0, lambda_hid=lambda_hid, backend="auto")
    widths = [(student.hidden[s].shape[-1], teacher.hidden[t].shape[-1]) for s, t in config.layer_pairs]
    loss = MTALoss(config, [s for s, _ in widths], [t for _, t in widths])
    if projections is not None:
        given = [(p.in_features, p.out_features) for p in projections if isinstance(p, nn.Linear)]
        if given != widths:
            raise InputError(f"projections: expected (student, teacher) widths {widths}, got {given}")
        loss.projections = copy.deepcopy(projections).cpu()
    return loss


def _worst_pairs(salience: Floats, teacher: Floats, student: Floats) -> tuple[SpanPair, ...]:
    error = np.triu(np.outer(salience, salience) * (student - teacher) ** 2, 1)
    total = error.sum()
    if not total > 0:
        return ()
    order = np.argsort(-error, axis=None, kind="stable")[:WORST_PAIRS]
    pairs = [(int(u), int(v)) for u, v in zip(*np.unravel_index(order, error.shape), strict=True) if error[u, v] > 0]
    return tuple(
        SpanPair(u, v, float(teacher[u, v]), float(student[u, v]), float(error[u, v] / total)) for u, v in pairs
    )
