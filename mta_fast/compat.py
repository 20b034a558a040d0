"""The public MTA scripts' calls on top of mta_fast: swap the import, keep the script.

    from mta_fast.compat import compute_overall_span_loss, get_spans_offsets                    # first family
    from mta_fast.compat import compute_overall_span_loss
    from mta_fast.compat import get_phrases_spans_offsets as get_spans_offsets                  # second family

The results are the scripts' to rounding, where the scripts give a number. Beyond that: a row or a batch without spans
adds 0, a row of one token is finite, and an empty split is fine. A real token with offsets (0, 0) (a special token)
belongs to no span here, while the scripts put it into every span that starts at character 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mta_fast.config import MTAConfig, default_granularity
from mta_fast.errors import InputError
from mta_fast.loss import MTALoss
from mta_fast.ops.entropy import entropy_weights
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.rules import drop_nested

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.matcher import Matcher

SpanLists = list[list[tuple[int, int]]]

_LEADING = ("projectors", "attention_mask")
_STATES = ("s_hidden_states", "t_hidden_states", "offsets_mapping")
_TRAILING = ("spans_offsets", "words_offsets", "args")
_FIRST_FAMILY = (*_LEADING, "s_logits", "t_logits", *_STATES, *_TRAILING)
_SECOND_FAMILY = (*_LEADING, *_STATES, "phrases_offsets", *_TRAILING)


def compute_overall_span_loss(*positional: Any, **named: Any) -> Tensor:
    """(1 / L) sum over layer pairs of DSA + 0.1 Hid, before the scripts' factor 2 or 3.

    Both call families are accepted, by position or by name::

        (projectors, attention_mask, s_logits, t_logits, s_hidden_states, t_hidden_states, offsets_mapping,
         spans_offsets, words_offsets, args)
        (projectors, attention_mask, s_hidden_states, t_hidden_states, offsets_mapping,
         phrases_offsets, spans_offsets, words_offsets, args)

    Args:
        projectors: one nn.Linear a layer pair.
        attention_mask: [B, S], any dtype; left or right padding. On a GPU it costs one synchronisation, and so
            do the offsets; SpanCollator and MTALoss avoid both.
        t_logits: [B, S, V], read with ``args.entropy_weight`` only; s_logits is not read.
        s_hidden_states, t_hidden_states: the models' ``hidden_states``.
        offsets_mapping: [B, >= S, 2] character offsets.
        spans_offsets, words_offsets: per row, (start, end) characters; phrases_offsets is not read.
        args: student_layer_mapping, teacher_layer_mapping, split_layer_mapping (a0, a1, a2, _): pairs a0 to a1
            use words, a1 to a2 spans; and, if present, entropy_weight.

    Raises:
        InputError: arguments of neither family, layers out of range, a mask with holes, wrong widths.
    """
    call = _bind(positional, named)
    args, mask = call["args"], call["attention_mask"]
    first, middle, last, pairs = _layer_pairs(args)
    example = _any_state(call["s_hidden_states"])
    if not pairs:
        return example.reshape(-1)[:0].sum()  # 0 with a graph
    entropy = bool(getattr(args, "entropy_weight", False))
    if entropy and call.get("t_logits") is None:
        raise InputError("args.entropy_weight: expected t_logits with it, got none; the second family has no logits")
    config = MTAConfig.public(
        layer_pairs=pairs,
        granularity=default_granularity(last - first, middle - first),
        weight=1.0,
        weighting="entropy" if entropy else "importance",
    )
    offsets = torch.as_tensor(call["offsets_mapping"])[:, : mask.shape[1]].cpu()
    rows = (mask != 0).cpu()
    spans = {
        kind: SpanBatch.from_char_spans(call[name], offsets, rows, drop_truncated=False).to(example.device)
        for kind, name in (("word", "words_offsets"), ("phrase", "spans_offsets"))
    }
    projectors = _projectors(call["projectors"], first, last)
    teacher_dims, student_dims = zip(*(tuple(linear.weight.shape) for linear in projectors), strict=True)
    with torch.device("meta"):  # the projections are the caller's: allocate none, draw no random numbers
        loss = MTALoss(config, student_dims, teacher_dims)
    loss.projections = nn.ModuleList(map(_BorrowedProjection, projectors))
    weights = entropy_weights(call["t_logits"]) if entropy else None
    return loss(call["s_hidden_states"], call["t_hidden_states"], spans, entropy_weights=weights).loss


def get_spans_offsets(texts: Sequence[str], nlp: Language, matcher: Matcher) -> tuple[SpanLists, SpanLists]:
    """(spans, words) of the first family: per text, character spans of phrases and of the words inside them.

    Args:
        texts: the texts; nlp: a spaCy pipeline with parser and tagger; matcher: the verb-phrase pattern.
    """
    found = [_phrases_and_words(doc, matcher) for doc in nlp.pipe(texts)]
    return [phrases for phrases, _ in found], [words for _, words in found]


def get_phrases_spans_offsets(
    texts: Sequence[str], nlp: Language, matcher: Matcher
) -> tuple[SpanLists, SpanLists, SpanLists]:
    """(phrases, spans, words) of the second family; its loss does not read the first list, here equal to spans."""
    spans, words = get_spans_offsets(texts, nlp, matcher)
    return [list(row) for row in spans], spans, words


class _BorrowedProjection(nn.Module):
    """The caller's nn.Linear behind the call of ``projections.Projection``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor, backend: str) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        return hidden_alignment_numerator(student, teacher, tokens, weights, weight, bias, backend=backend)


def _bind(positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, of whichever family they fit."""
    for family in (_FIRST_FAMILY, _SECOND_FAMILY):
        given = dict(zip(family, positional, strict=False))
        if len(positional) + len(named) == len(family) and set(given) | set(named) == set(family):
            return given | named
    raise InputError(
        f"compute_overall_span_loss: expected ({', '.join(_FIRST_FAMILY)}) or ({', '.join(_SECOND_FAMILY)}), "
        f"got {len(positional)} by position and {sorted(named)} by name"
    )


def _layer_pairs(args: Any) -> tuple[int, int, int, list[tuple[int, int]]]:
    """a0, a1, a2 of the split, and the layer pairs a0 to a2."""
    names = ("student_layer_mapping", "teacher_layer_mapping", "split_layer_mapping")
    missing = [name for name in names if not hasattr(args, name)]
    if missing:
        raise InputError(f"args: expected {', '.join(names)}, got none of {', '.join(missing)}")
    student, teacher, split = (list(getattr(args, name)) for name in names)
    bounds = [0, *split[:3], len(student)]
    if len(student) != len(teacher) or len(split) < 3 or bounds != sorted(bounds):
        raise InputError(
            f"args: expected as many teacher as student layers and 0 <= a0 <= a1 <= a2 <= that number in "
            f"split_layer_mapping, got {student}, {teacher} and {split}"
        )
    first, middle, last = (int(bound) for bound in split[:3])
    return first, middle, last, list(zip(student, teacher, strict=True))[first:last]


def _projectors(projectors: Any, first: int, last: int) -> list[nn.Linear]:
    made = list(projectors)[first:last]
    if len(made) != last - first or not all(isinstance(p, nn.Linear) for p in made):
        kinds = [type(p).__name__ for p in made]
        raise InputError(f"projectors: expected {last} nn.Linear, one for each layer pair, got {first} + {kinds}")
    return made


def _any_state(hidden_states: Any) -> Tensor:
    """Some hidden state of a tuple (with None where it was not kept) or a dict."""
    states = hidden_states.values() if isinstance(hidden_states, Mapping) else hidden_states
    found = next((state for state in states if state is not None), None)
    if found is None:
        raise InputError("s_hidden_states: expected hidden states, got none; call the model with output_hidden_states")
    return found


def _phrases_and_words(doc: Any, matcher: Matcher) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    candidates = [(chunk.start, chunk.end) for chunk in doc.noun_chunks]
    candidates += [(first, last) for _, first, last in matcher(doc)]
    phrases, words = [], []
    for first, last in drop_nested(candidates):
        starts = [token.idx for token in doc[first:last]]
        end = starts[-1] + len(doc[last - 1])
        phrases.append((starts[0], end))
        words += list(zip(starts, [*starts[1:], end], strict=True))
    return phrases, words
