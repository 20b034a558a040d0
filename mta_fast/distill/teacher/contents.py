"""What a cache holds of each token, and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mta_fast.distill.teacher.quantize import GROUP, dequantize, quantize
from mta_fast.errors import InputError

CACHE_DTYPES = ("int8", "bfloat16", "float16", "float32")
Record = dict[str, Tensor]  # of one row: parts by name, [tokens, ...]; ``LAST`` may be [counted, d]
LAST, ENTROPY = "last", "entropy"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Contents:
    """What is stored of a row.

    Attributes:
        dtype: of the chosen layers, one of CACHE_DTYPES; the last state is bfloat16 beside int8.
        layers: {hidden-state index: width}, stored at all real tokens.
        importance: the layers whose token importance is stored, float32; causal: with ``MTAConfig.causal``.
        last: width of the state that the LM head reads; 0: not stored. At counted positions, or at all real tokens
            where it is a layer as well.
        shared: the layer that is this state, and is stored once; None: none.
        entropy: how many ids the entropy weights (float32) are over; 0: not stored.
    """

    dtype: str
    layers: Mapping[int, int]
    importance: tuple[int, ...] = ()
    causal: bool = False
    last: int = 0
    shared: int | None = None
    entropy: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contents:
        """What ``to_dict`` gave, after JSON."""
        layers = {int(layer): width for layer, width in values["layers"].items()}
        return cls(**{**values, "layers": layers, "importance": tuple(values["importance"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(replace(self, layers=dict(self.layers)))

    def lacks(self, wanted: Contents) -> list[str]:
        """What a run reads and this doesn't hold, in words, with both values; more than it reads is fine."""
        missing = []
        layers = {layer: width for layer, width in wanted.layers.items() if self.layers.get(layer) != width}
        if layers:
            missing.append(f"layers {sorted(wanted.layers)}, it has {sorted(self.layers)}")
        elif not set(wanted.importance) <= set(self.importance):
            missing.append(f"the importance of layers {list(wanted.importance)}, it has {list(self.importance)}")
        elif wanted.importance and wanted.causal != self.causal:
            missing.append(f"importance with causal={wanted.causal}, it has causal={self.causal}")
        for what, own, other in (
            ("the state before the LM head, of width", self.last, wanted.last),
            ("entropy weights, over ids:", self.entropy, wanted.entropy),
        ):
            if other and own != other:
                missing.append(f"{what} {other}, it has {own or 'none'}")
        if wanted.dtype != self.dtype:
            missing.append(f"cache_dtype {wanted.dtype}, it has {self.dtype}")
        return missing

    def size(self, tokens: int, counted: int) -> int:
        """Bytes of rows with so many tokens, of which so many are counted positions; without headers."""
        each = sum(_bytes(self.dtype, width) for layer, width in self.layers.items() if layer != self.shared)
        each += 4 * (len(self.importance) + bool(self.entropy))
        last = _bytes(self.last_dtype, self.last)
        return tokens * each + (tokens if self.shared is not None else counted) * last

    @property
    def last_dtype(self) -> str:
        """How the last state is stored: rounded less than int8 would, as logits are made of it."""
        return "bfloat16" if self.dtype == "int8" else self.dtype

    def encode(
        self, states: Mapping[int, Tensor], importance: Mapping[int, Tensor], last: Tensor | None,
        entropy: Tensor | None, counted: Tensor,
    ) -> Record:  # fmt: skip
        """A row as it is stored, on the CPU.

        Args:
            states: {layer: [n, d]} at the row's real tokens; importance: {layer: [n]}; last: [n, d]; entropy: [n].
            counted: [m] which of the n tokens are counted positions.

        Raises:
            InputError: a state that is not finite, which no loss can be made of, or that the dtype can't hold.
        """
        record: Record = {}
        for layer in self.layers:
            if layer != self.shared:
                record |= _encoded(str(layer), states[layer], self.dtype, f"hidden state {layer}")
        for layer in self.importance:
            record[f"{layer}.importance"] = importance[layer].float()
        if self.last:
            assert last is not None
            kept = last if self.shared is not None else last[counted.to(last.device)]
            record |= _encoded(LAST, kept, self.last_dtype, "state before the LM head")
        if self.entropy:
            assert entropy is not None
            record[ENTROPY] = entropy.float()
        return {name: value.cpu().contiguous() for name, value in record.items()}

    def states(self, record: Record, layer: int) -> Tensor:
        """[n, d] of a layer, in float32 from int8, else as it is stored."""
        return _decoded(LAST if layer == self.shared else str(layer), record)


def _bytes(dtype: str, width: int) -> int:
    return width + 2 * -(-width // GROUP) if dtype == "int8" else width * _DTYPES[dtype].itemsize


def _encoded(name: str, states: Tensor, dtype: str, what: str) -> Record:
    if dtype == "int8":
        codes, scales = quantize(states)
        made = {name: codes, f"{name}.scale": scales}
        held = scales
    else:
        held = states.to(_DTYPES[dtype])
        made = {name: held}
    if not held.isfinite().all():
        raise InputError(
            f"teacher: expected finite states that {dtype} can hold, its {what} has NaN, infinity or too large values; "
            f"load the teacher in float32 or bfloat16, or set cache_dtype to one of them"
        )
    return made


def _decoded(name: str, record: Record) -> Tensor:
    scales = record.get(f"{name}.scale")
    return record[name] if scales is None else dequantize(record[name], scales)
