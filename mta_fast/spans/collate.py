"""SpanCollator: rows with spans to a padded or packed batch with labels and SpanBatches, in the loader's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast.choices import check_choice
from mta_fast.errors import InputError
from mta_fast.inputs import PACKED
from mta_fast.spans.batch import Capacities, SpanBatch
from mta_fast.tokens import Encoded, encode

IGNORED_LABEL = -100
PAD_TO = ("longest", "max_length")
_OF_A_PASS = ("attention_mask", "labels")


class TokenSide(NamedTuple):
    """What spans are aligned to: one tokenizer's tokens of a batch; [T] in place of [B, S] where rows are packed."""

    offsets: Tensor  # [B, S, 2]
    special: Tensor  # [B, S] bool
    mask: Tensor | None  # [B, S]; None of packed rows
    cu_seqlens: Tensor | None  # [B + 1] bounds of packed rows; None of padded ones


@dataclass(frozen=True, eq=False)
class TokenizedRows:
    """Rows as ``SpanCollator.tokenize`` leaves them: a batch without its spans, and what those are aligned to.

    Attributes:
        batch: what ``SpanCollator`` returns but for its spans.
        texts: prompt + output of each row, which the character spans count in.
        sides: the student's tokens, then a teacher's own.
    """

    batch: dict[str, Any]
    texts: Sequence[str]
    sides: tuple[TokenSide, ...]


@dataclass
class SpanCollator:
    """Tokenise, truncate, pad and mask a list of rows, and turn their character spans to token ranges.

    A row has "prompt" and "output" (or only "text"), and "word_spans" / "phrase_spans" over prompt + output as
    SpanExtractor makes them. Labels are -100 at the prompt and at padding. Padding side and pad token are the
    tokenizer's (its end token pads where it has no pad token). A special token that the tokenizer adds and the text
    holds already, as after a chat template, is there once; no span holds special tokens.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        teacher_tokenizer: the teacher's, where it differs; None: both models read the same tokens.
        teacher_ids: [V] the teacher's id of each of the tokenizer's, where it is the teacher's with fewer tokens.
        capacities: of each kind of spans, for steps that are captured in a CUDA graph (``SpanBatch.with_capacities``);
            S is then to be the same in all batches, as with ``pad_to="max_length"``.
        granularity: the span columns to read.
        max_length: tokens a row is truncated to; spans that this cuts are dropped on both sides.
        add_eos: end a row with the end token where it fits.
        pad_to: what S is: "longest" (of the batch's rows), or "max_length", as the public scripts have it, whose
            importance depends on S (``MTAConfig.count_padding``).
        pad_to_multiple_of: round S up to a multiple.
        backend: of the span alignment, as in ``SpanBatch.from_char_spans``.
        num_embeddings: tokens that the models of ``tokenizer`` know, where it has more; rows with others are refused.
        flatten: no padding: the rows lie one behind the other in [1, T]. Only for models and attention that keep such
            rows apart, as ``training.packing.check_packing`` finds out.

    Raises:
        InputError: a tokenizer without offsets, a row without its columns, or ``flatten`` beside padding.
    """

    tokenizer: Any
    teacher_tokenizer: Any = None
    granularity: Sequence[str] = ("word", "phrase")
    max_length: int = 256
    add_eos: bool = True
    pad_to: str = "longest"
    pad_to_multiple_of: int | None = None
    backend: str = "auto"
    num_embeddings: int | None = None
    flatten: bool = False
    teacher_ids: Tensor | None = field(default=None, repr=False, compare=False)
    capacities: Mapping[str, Capacities] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.granularity, str):
            self.granularity = (self.granularity,)
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise InputError(f"max_length: expected an integer >= 1, got {self.max_length!r}")
        check_choice("pad_to", self.pad_to, PAD_TO)
        if self.teacher_ids is not None and self.teacher_tokenizer is not None:
            raise InputError(
                "teacher_ids: expected none beside a teacher_tokenizer, which gives its own; leave one out"
            )
        if self.capacities is not None and sorted(self.capacities) != sorted(self.granularity):
            got = ", ".join(self.capacities) or "none"
            raise InputError(f"capacities: expected those of {', '.join(self.granularity)}, got {got}")
        for name, unset in (("pad_to", "longest"), ("pad_to_multiple_of", None)):
            if self.flatten and (value := getattr(self, name)) != unset:
                raise InputError(f"{name}: expected {unset!r} beside flatten, got {value!r}; flat rows have no padding")
        for tokenizer in filter(None, (self.tokenizer, self.teacher_tokenizer)):
            if getattr(tokenizer, "truncation_side", "right") != "right":
                raise InputError(
                    "tokenizer: expected truncation_side='right', got 'left', which cuts spans at their start; set "
                    "tokenizer.truncation_side = 'right'"
                )
            if not getattr(tokenizer, "is_fast", False):
                raise InputError(
                    f"tokenizer: expected a fast tokenizer (it gives character offsets), got "
                    f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(name, use_fast=True)"
                )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows: ``tokenize`` and ``align``.

        Returns:
            input_ids, attention_mask, labels [B, S] int64 and spans {"word": SpanBatch, ...}; with a teacher
            tokenizer also teacher_input_ids, teacher_attention_mask, teacher_labels and teacher_spans; with teacher_ids
            what ``for_teacher`` makes. Call models with ``inputs.model_inputs(model, batch)``, which adds positions
            where padding is on the left.

            With ``flatten``: input_ids, labels and position_ids [1, T], which count from 0 in each row, and what
            transformers documents for flash attention without padding, cu_seq_lens_q and cu_seq_lens_k [B + 1] int32
            and max_length_q and max_length_k; no mask. A row's first label is -100: the row before doesn't predict it.
        """
        tokenized = self.tokenize(rows)
        names = [f"{kind}_spans" for kind in self.granularity]
        columns = {name: [_spans_of(i, row, name) for i, row in enumerate(rows)] for name in names}
        return tokenized.batch | self.align(tokenized, columns)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> TokenizedRows:
        """The batch of these rows without its spans, whose columns are not read."""
        if not rows:
            raise InputError("rows: expected at least one row, got none")
        prompts, texts = zip(*(self._texts(i, row) for i, row in enumerate(rows)), strict=True)
        batch: dict[str, Any] = {}
        sides: tuple[TokenSide, ...] = ()
        for prefix, tokenizer in (("", self.tokenizer), ("teacher_", self.teacher_tokenizer)):
            if tokenizer is not None:
                made, side = self._tokenize(tokenizer, prompts, texts)
                batch |= {prefix + name: value for name, value in made.items()}
                sides += (side,)
        if self.teacher_ids is not None:
            batch |= for_teacher(batch, self.teacher_ids)
        return TokenizedRows(batch, texts, sides)

    def align(self, tokenized: TokenizedRows, columns: Mapping[str, Any]) -> dict[str, dict[str, SpanBatch]]:
        """The spans of a tokenised batch.

        Args:
            columns: {"word_spans": per row [[start, end], ...], ...} over ``tokenized.texts``, as SpanExtractor
                makes them; those of ``granularity`` are read.

        Returns:
            spans {"word": SpanBatch, ...}; with a teacher tokenizer also teacher_spans.
        """
        missing = [f"{kind}_spans" for kind in self.granularity if f"{kind}_spans" not in columns]
        if missing:
            raise InputError(f"columns: expected {', '.join(missing)}, got {sorted(columns)}; extract those spans too")
        char_spans = {kind: columns[f"{kind}_spans"] for kind in self.granularity}
        first, *others = tokenized.sides
        options: dict[str, Any] = {"texts": tokenized.texts, "backend": self.backend}
        if not others:
            own = first._asdict()
            own |= {"special_tokens_mask": own.pop("special"), "attention_mask": own.pop("mask")}
            offsets = own.pop("offsets")
            return {
                "spans": {
                    kind: self._bounded(kind, SpanBatch.from_char_spans(spans, offsets, **own, **options))
                    for kind, spans in char_spans.items()
                }
            }
        student, teacher = ((side.offsets, side.mask, side.special) for side in tokenized.sides)
        bounds = [side.cu_seqlens for side in tokenized.sides]
        pairs = {
            kind: SpanBatch.pair(spans, student, teacher, cu_seqlens=bounds if self.flatten else None, **options)
            for kind, spans in char_spans.items()
        }
        return {
            "spans": {kind: self._bounded(kind, pair[0]) for kind, pair in pairs.items()},
            "teacher_spans": {kind: self._bounded(kind, pair[1]) for kind, pair in pairs.items()},
        }

    def _bounded(self, kind: str, spans: SpanBatch) -> SpanBatch:
        return spans if self.capacities is None else spans.with_capacities(self.capacities[kind])

    def _texts(self, i: int, row: Mapping[str, Any]) -> tuple[str, str]:
        prompt, response = "", row.get("text")
        if "prompt" in row and "output" in row:
            prompt, response = row["prompt"], row["output"]
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, prompt + response
        raise InputError(
            f"row {i}: expected strings in the columns 'prompt' and 'output', or in 'text', "
            f"got { ({name: type(value).__name__ for name, value in row.items()}) }"
        )

    def lengths(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of each row in a batch, of ``tokenizer``; columns of spans are not read."""
        prompts, texts = zip(*(self._texts(i, row) for i, row in enumerate(rows)), strict=True)
        return [len(row.ids) for row, _ in self._rows(self.tokenizer, prompts, texts)]

    def padded(self, longest: int) -> int:
        """S of a batch whose longest row has so many tokens."""
        size = self.max_length if self.pad_to == "max_length" else longest
        return -(-size // self.pad_to_multiple_of) * self.pad_to_multiple_of if self.pad_to_multiple_of else size

    def _tokenize(
        self, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]
    ) -> tuple[dict[str, Any], TokenSide]:
        """What a model reads, and what spans are aligned to."""
        parts = self._rows(tokenizer, prompts, texts)
        return _packed(parts) if self.flatten else self._padded(tokenizer, parts)

    def _rows(self, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[Encoded, list[int]]]:
        """Tokens and labels of each text."""
        encoded = encode(tokenizer, texts, self.max_length)
        if self.num_embeddings is not None and tokenizer is self.tokenizer:
            for i, row in enumerate(encoded):
                if (most := max(row.ids, default=0)) >= self.num_embeddings:
                    raise InputError(
                        f"row {i} of a batch: expected tokens below {self.num_embeddings} (the model's embeddings), "
                        f"got {most}, {tokenizer.convert_ids_to_tokens(most)!r}; leave it out of the text"
                    )
        end = tokenizer.eos_token_id
        return [self._row(row, len(prompt), end) for row, prompt in zip(encoded, prompts, strict=True)]

    def _padded(self, tokenizer: Any, parts: Sequence[tuple[Encoded, list[int]]]) -> tuple[dict[str, Any], TokenSide]:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise InputError(f"tokenizer: expected a pad or an end token, {type(tokenizer).__name__} has neither")
        size = self.padded(max(len(row.ids) for row, _ in parts))
        ids, labels = torch.full((len(parts), size), pad), torch.full((len(parts), size), IGNORED_LABEL)
        mask = torch.zeros(len(parts), size, dtype=torch.long)
        offsets = torch.zeros(len(parts), size, 2, dtype=torch.long)
        special = torch.zeros(len(parts), size, dtype=torch.bool)
        for b, (row, own_labels) in enumerate(parts):
            count = len(row.ids)
            real = slice(size - count, size) if tokenizer.padding_side == "left" else slice(0, count)
            ids[b, real] = torch.tensor(row.ids, dtype=torch.long)
            mask[b, real] = 1
            labels[b, real] = torch.tensor(own_labels, dtype=torch.long)
            if real.start:
                labels[b, real.start] = IGNORED_LABEL  # or padding would predict it
            offsets[b, real] = torch.tensor(row.offsets, dtype=torch.long).reshape(-1, 2)
            special[b, real] = torch.tensor(row.special, dtype=torch.bool)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch, TokenSide(offsets, special, mask, None)

    def _row(self, row: Encoded, prompt: int, end: int | None) -> tuple[Encoded, list[int]]:
        """One row's tokens and labels, with the end token where the row was not truncated."""
        whole = len(row.ids) < self.max_length
        if end is not None and row.ids[-1:] == [end]:  # the tokenizer's own: where it goes is decided below
            row = Encoded(row.ids[:-1], row.offsets[:-1], row.special[:-1])
        labels = [
            token if start >= prompt and stop > start else IGNORED_LABEL
            for token, (start, stop) in zip(row.ids, row.offsets, strict=True)
        ]
        if self.add_eos and end is not None and whole:
            row = Encoded([*row.ids, end], [*row.offsets, (0, 0)], [*row.special, True])
            labels = [*labels, end]
        return row, labels


def for_teacher(batch: Mapping[str, Any], teacher_ids: Tensor) -> dict[str, Any]:
    """The teacher's side of a batch whose tokens are the teacher's under other ids; the spans are those of both.

    Args:
        batch: of one tokenizer; teacher_ids: [V] the teacher's id of each of its ids.

    Returns:
        teacher_input_ids, and whatever else of the batch a model is called with, under teacher_ as well.
    """
    same = {f"teacher_{name}": batch[name] for name in (*_OF_A_PASS, *PACKED) if name in batch}
    return same | {"teacher_input_ids": teacher_ids[batch["input_ids"]]}


def _packed(parts: Sequence[tuple[Encoded, list[int]]]) -> tuple[dict[str, Any], TokenSide]:
    """The rows one behind the other."""
    lengths = [len(row.ids) for row, _ in parts]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    flat = {
        "input_ids": [token for row, _ in parts for token in row.ids],
        "labels": [label for _, labels in parts for label in [IGNORED_LABEL, *labels[1:]][: len(labels)]],
        "position_ids": [position for length in lengths for position in range(length)],
    }
    batch: dict[str, Any] = {name: torch.tensor([values], dtype=torch.long) for name, values in flat.items()}
    batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
    batch |= {name: max(lengths) for name in ("max_length_q", "max_length_k")}
    offsets = torch.tensor([pair for row, _ in parts for pair in row.offsets], dtype=torch.long).reshape(-1, 2)
    special = torch.tensor([flag for row, _ in parts for flag in row.special], dtype=torch.bool)
    return batch, TokenSide(offsets, special, None, bounds)


def _spans_of(i: int, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise InputError(f"row {i}: expected the column '{name}', got {sorted(row)}; run SpanExtractor first")
    return row[name]
