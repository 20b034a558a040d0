"""SpanBatch: the spans of a batch as token ranges, ready for the ops. Made on the CPU, in the data loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mta_fast.errors import InputError
from mta_fast.layout import Rows, Spans, as_tensor, has_capacities
from mta_fast.spans import align, align_cpp
from mta_fast.spans.align import CharSpans, FlatSpans, TokenRanges


@dataclass(frozen=True)
class Capacities:
    """How large a batch may be, beside the shape of its states: what the launches of a captured step follow from.

    Attributes:
        row_tokens: tokens of a row; row_spans: spans of a row.
        spans: spans of a batch; incidences: of its spans, how many cover a token, summed over the tokens.

    Raises:
        InputError: no whole number from 1 to 2^31 - 1.
    """

    row_tokens: int
    row_spans: int
    spans: int
    incidences: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise InputError(f"capacities: expected {name} from 1 to 2^31 - 1, got {value!r}")


@dataclass(frozen=True, eq=False)
class SpanBatch:
    """Token ranges of the N spans of a batch, row after row, in the order they were given; int32.

    Spans may overlap and repeat. A token is *covered* when at least one span holds it. Tokens of zero width
    (special tokens) inside a range are not covered: ``normalize_weights`` gives them weight 0.

    Attributes:
        index: the index tensors as the ops take them; each is an attribute of the batch too.
        rows: the real tokens of each row.
    """

    index: Spans
    rows: Rows

    @classmethod
    def from_char_spans(
        cls,
        char_spans: CharSpans,
        offset_mapping: Any,
        attention_mask: Any = None,
        cu_seqlens: Any = None,
        *,
        special_tokens_mask: Any = None,
        texts: Sequence[str] | None = None,
        drop_truncated: bool = True,
        backend: str = "auto",
    ) -> SpanBatch:
        """Character spans to token ranges; the rule is ``align.token_ranges``.

        Args:
            char_spans: per row, (start, end) characters of the row's text, in any order.
            offset_mapping: [B, S, 2] character offsets of the tokens ([T, 2] with ``cu_seqlens``). This and the
                next two may be tensors, arrays or nested lists, as tokenizers return them.
            attention_mask: [B, S]; None: every token is real.
            cu_seqlens: [B + 1] bounds of packed sequences.
            special_tokens_mask: [B, S] (or [T]), non-zero at special tokens, also those that are written in the text:
                tokenizers give them characters, but no span holds them. A span over more than them keeps its other
                tokens. ``mta_fast.tokens.encode`` tells which they are. None: only tokens of zero width are special.
            texts: the row texts: then only white space is forgiven before a span, and ends are checked.
            drop_truncated: drop a span that ends beyond the last kept character of its row.
            backend: "cpp", "reference" (NumPy) or "auto", which takes C++ where it is built; both find the same.

        Raises:
            InputError: shapes that don't fit, a mask with holes, a span outside the text or with start >= end.
            BackendUnavailableError: backend "cpp" is not built.
        """
        side = _Side.make(offset_mapping, attention_mask, cu_seqlens, special_tokens_mask, texts, backend)
        spans = side.flatten(char_spans)
        found = side.align(spans)
        return side.build(spans, found, _filled(found) & ~(found.cut & drop_truncated))

    @classmethod
    def pair(
        cls,
        char_spans: CharSpans,
        student: tuple[Any, ...],
        teacher: tuple[Any, ...],
        *,
        cu_seqlens: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        backend: str = "auto",
    ) -> tuple[SpanBatch, SpanBatch]:
        """The same spans on the tokens of two tokenizers: (student's, teacher's), span by span the same.

        A span that either side truncates, or has no token for, is dropped on both.

        Args:
            char_spans: per row, (start, end) characters.
            student, teacher: (offset_mapping [B, S, 2], attention_mask [B, S] or None) of each side, and, if wanted,
                its special_tokens_mask; [T] in place of [B, S] with ``cu_seqlens``.
            cu_seqlens: [B + 1] bounds of packed sequences, of the student's tokens and of the teacher's.
            texts, backend: as in ``from_char_spans``.
        """
        sides = [
            _Side.make(offsets, mask, bounds, special[0] if special else None, texts, backend)
            for (offsets, mask, *special), bounds in zip((student, teacher), cu_seqlens or (None, None), strict=True)
        ]
        spans = sides[0].flatten(char_spans)
        sides[1].flatten(char_spans)
        found = [side.align(spans) for side in sides]
        keep = np.logical_and.reduce([_filled(f) & ~f.cut for f in found])
        first, second = (side.build(spans, f, keep) for side, f in zip(sides, found, strict=True))
        return first, second

    def with_capacities(self, most: Capacities) -> SpanBatch:
        """The same spans in tensors whose sizes, and for the Triton kernels whose launches, are those of ``most``.

        A CUDA graph captured with one such batch is right for every other one of the same capacities and shape, once
        its tensors are copied over those that were captured. ``num_spans`` is then the capacity; what lies beyond the
        batch's own spans covers nothing and weighs nothing. Span pairs are taken in pairwise form and at once: their
        scratch grows with the rows and with ``row_spans`` squared. Other backends refuse such a batch.

        Raises:
            InputError: a row or the batch holds more, capacities are given already, or all rows' spans together would
                be 2^31 or more.
        """
        if self.has_capacities:
            raise InputError("capacities: expected a batch without, got one that has them; give them once")
        rows = self.rows.with_capacity(most.row_tokens)
        counts = self.host[:, 0].diff()
        held = {"spans": self.num_spans, "incidences": self.cover_spans.shape[0]}
        held["row_spans"] = int(counts.max()) if counts.numel() else 0
        for name, value in held.items():
            if value > getattr(most, name):
                raise InputError(
                    f"capacities: expected at most {getattr(most, name)} {name}, got {value}; raise it, or make "
                    f"smaller batches"
                )
        if self.num_rows * most.row_spans >= 2**31:
            raise InputError(
                f"capacities: expected fewer than 2^31 spans in all rows (indices are int32), got {self.num_rows} rows "
                f"of {most.row_spans} row_spans"
            )
        index, tokens = self.index, self.token_splits.shape[0] - 1
        bounds = torch.arange(len(counts) + 1, dtype=torch.int32) * most.row_spans
        last = max(self.num_rows - 1, 0)
        return SpanBatch(
            index._replace(
                ranges=_filled_up(index.ranges, most.spans),
                span_rows=_filled_up(index.span_rows, most.spans, last),
                covered=_filled_up(index.covered, tokens),
                covered_rows=_filled_up(index.covered_rows, tokens, last),
                cover_splits=_filled_up(index.cover_splits, tokens + 1, self.cover_spans.shape[0]),
                cover_spans=_filled_up(index.cover_spans, most.incidences),
                host=torch.cat([index.host, bounds[:, None]], 1),
            ),
            rows,
        )

    def copy_(self, other: SpanBatch) -> None:
        """Make this batch, whose tensors a CUDA graph was captured with, hold another one's spans; on any device.

        ``host`` and ``rows.host`` keep the lengths of the batch that was captured; a graph does not read them.

        Raises:
            InputError: a batch of other capacities or of another shape.
        """
        own, others = self._sizes(), other._sizes()
        if own is None or own != others:
            raise InputError(f"copy_: expected a batch of the same capacities and shape, {own}, got {others}")
        for mine, theirs in zip(
            (*self.index[:-1], self.rows.table), (*other.index[:-1], other.rows.table), strict=True
        ):
            mine.copy_(theirs, non_blocking=True)

    def _sizes(self) -> tuple[Any, ...] | None:
        """What the launches for this batch follow from; None without capacities."""
        if not self.has_capacities:
            return None
        bounds = Capacities(
            row_tokens=int(self.rows.host[:1, 2].sum()),
            row_spans=int(self.host[:2, 2].sum()),
            spans=self.num_spans,
            incidences=self.cover_spans.shape[0],
        )
        return self.shape, self.num_rows, bounds

    @property
    def has_capacities(self) -> bool:
        """Whether ``with_capacities`` made it."""
        return has_capacities(self.host)

    @property
    def ranges(self) -> Tensor:
        """[N, 2] first token and one past the last, on the flat token axis."""
        return self.index.ranges

    @property
    def span_rows(self) -> Tensor:
        """[N] the row of each span."""
        return self.index.span_rows

    @property
    def span_splits(self) -> Tensor:
        """[B + 1] spans of row b are splits[b] to splits[b + 1]."""
        return self.index.span_splits

    @property
    def covered(self) -> Tensor:
        """[C] distinct covered tokens (flat), ascending."""
        return self.index.covered

    @property
    def covered_rows(self) -> Tensor:
        """[C] the row of each covered token."""
        return self.index.covered_rows

    @property
    def covered_splits(self) -> Tensor:
        """[B + 1] covered tokens of row b are splits[b] to splits[b + 1]."""
        return self.index.covered_splits

    @property
    def cover_splits(self) -> Tensor:
        """[C + 1] spans of covered token c: ``cover_spans[splits[c] : splits[c + 1]]``; n_j is ``diff()`` of it."""
        return self.index.cover_splits

    @property
    def cover_spans(self) -> Tensor:
        """[I] the spans of each covered token, token after token."""
        return self.index.cover_spans

    @property
    def token_splits(self) -> Tensor:
        """[T + 1] the same lists by flat token: ``cover_spans[splits[j] : splits[j + 1]]``, empty if none covers j."""
        return self.index.token_splits

    @property
    def host(self) -> Tensor:
        """[B + 1, 2] on the CPU: span_splits, and the running number of tokens in the ranges."""
        return self.index.host

    @property
    def num_spans(self) -> int:
        """N."""
        return self.ranges.shape[0]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.span_splits.shape[0] - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S) or (T,): the leading shape of the hidden states these spans belong to."""
        return self.rows.shape

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.ranges.device

    def index_tensors(self) -> Spans:
        """The index tensors as the ops take them."""
        return self.index

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpanBatch:
        """The same spans with the index tensors on ``device``; ``host`` and ``rows.host`` stay on the CPU."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking), self.rows.to(device, non_blocking))

    def pin_memory(self) -> SpanBatch:
        """The same spans in pinned memory; called by ``DataLoader(pin_memory=True)``."""
        return self._map(Tensor.pin_memory, self.rows.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor], rows: Rows) -> SpanBatch:
        moved = {name: move(tensor) for name, tensor in self.index._asdict().items() if name != "host"}
        return SpanBatch(self.index._replace(**moved), rows)


@dataclass(frozen=True)
class _Side:
    """One tokenizer's view of the batch: flat tokens and the rows of real ones."""

    offsets: np.ndarray  # [T, 2] int64, of zero width at special tokens
    kept: np.ndarray | None  # [B] where the last real token ends, special or not; None: none is known to be special
    table: np.ndarray  # [B, 2] int64, (start, length) of each row
    rows: Rows
    texts: Sequence[str] | None
    functions: ModuleType  # the backend

    @classmethod
    def make(
        cls,
        offset_mapping: Any,
        attention_mask: Any,
        cu_seqlens: Any,
        special: Any,
        texts: Sequence[str] | None,
        backend: str,
    ) -> _Side:
        expected = "[B, S, 2]" if cu_seqlens is None else "[T, 2]"
        made = as_tensor("offset_mapping", offset_mapping, f"padded {expected}")
        offsets = made.detach().cpu().numpy().astype(np.int64, copy=False)
        if cu_seqlens is not None and attention_mask is not None:
            raise InputError("SpanBatch: expected attention_mask or cu_seqlens, got both; packed rows need no mask")
        if offsets.ndim != (3 if cu_seqlens is None else 2) or offsets.shape[-1] != 2:
            raise InputError(f"offset_mapping: expected {expected}, got shape {offsets.shape}")
        rows = cls._rows(offsets.shape[:-1], attention_mask, cu_seqlens)
        table = rows.host.numpy().astype(np.int64)
        functions = align_cpp if align.choose(backend) == "cpp" else align
        offsets, kept = offsets.reshape(-1, 2), None
        if special is not None:
            mask = as_tensor("special_tokens_mask", special, expected).detach().cpu().numpy() != 0
            if mask.shape != rows.shape:
                raise InputError(f"special_tokens_mask: expected {rows.shape} as in offset_mapping, got {mask.shape}")
            ends = np.where(offsets[:, 1] > offsets[:, 0], offsets[:, 1], 0)
            kept = np.array([ends[start : start + length].max(initial=0) for start, length in table], np.int64)
            offsets = np.where(mask.reshape(-1, 1), 0, offsets)
        return cls(offsets, kept, table, rows, texts, functions)

    @staticmethod
    def _rows(shape: tuple[int, ...], attention_mask: Any, cu_seqlens: Any) -> Rows:
        if cu_seqlens is not None:
            return Rows.from_cu_seqlens(cu_seqlens, *shape).to("cpu")
        if attention_mask is None:
            return Rows.full(*shape)
        mask = as_tensor("attention_mask", attention_mask, "[B, S]").detach().cpu()
        if tuple(mask.shape) != shape:
            raise InputError(f"attention_mask: expected {shape} as in offset_mapping, got {tuple(mask.shape)}")
        return Rows.from_mask(mask)

    def flatten(self, char_spans: CharSpans) -> FlatSpans:
        if len(char_spans) != len(self.table):
            raise InputError(f"character spans: expected {len(self.table)} rows, got {len(char_spans)}")
        if self.texts is not None and len(self.texts) != len(self.table):
            raise InputError(f"texts: expected {len(self.table)} rows, got {len(self.texts)}")
        return self.functions.flatten_spans(char_spans, self.texts)

    def align(self, spans: FlatSpans) -> TokenRanges:
        found = self.functions.token_ranges(spans, self.offsets, self.table, self.texts)
        if self.kept is None or not len(spans.row):
            return found
        return found._replace(cut=spans.bounds[:, 1] > self.kept[spans.row])

    def build(self, spans: FlatSpans, found: TokenRanges, keep: np.ndarray) -> SpanBatch:
        row, ranges = (spans.row, found.ranges) if keep.all() else (spans.row[keep], found.ranges[keep])
        index = self.functions.span_index(row, ranges, self.offsets, self.table)
        return SpanBatch(index, self.rows)


def _filled_up(values: Tensor, size: int, filler: int = 0) -> Tensor:
    """Values [n, ...] as [size, ...], the rest of them ``filler``."""
    rest = values.new_full((size - len(values), *values.shape[1:]), filler)
    return torch.cat([values, rest])


def _filled(found: TokenRanges) -> np.ndarray:
    """[N] whether a token belongs to the span."""
    return found.ranges[:, 1] > found.ranges[:, 0]
