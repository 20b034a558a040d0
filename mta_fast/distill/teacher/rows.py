"""The rows of a batch as the teacher reads them: where their tokens lie, and the key they are stored under."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_fast.spans.collate import IGNORED_LABEL

KEY_BYTES = 16


class TeacherRow(NamedTuple):
    """A row; on the CPU.

    Attributes:
        key: a digest of its teacher token ids and counted positions: the same whatever the template, truncation,
            tokenizer and padding that led to them.
        tokens: [n] where its real tokens lie in the flattened [B * S] batch.
        counted: [m] which of the n predict a label that counts.
    """

    key: bytes
    tokens: Tensor
    counted: Tensor


def side_of(batch: Mapping[str, Any]) -> str:
    """The prefix of the teacher's tokens in a batch: "teacher_" where it has a tokenizer of its own."""
    return "teacher_" if "teacher_input_ids" in batch else ""


def teacher_rows(batch: Mapping[str, Any]) -> list[TeacherRow]:
    """The rows of a batch: those of its attention mask, or of its position_ids where it has none (rows in one)."""
    side = side_of(batch)
    ids, labels = (batch[f"{side}{name}"].cpu().flatten() for name in ("input_ids", "labels"))
    return [_row(ids[place], labels[place], place) for place in row_places(batch, side)]


def row_places(batch: Mapping[str, Any], side: str) -> list[Tensor]:
    """Where each row's real tokens lie in the flattened batch."""
    mask = batch.get(f"{side}attention_mask")
    if mask is not None:
        size = mask.shape[1]
        return [row.nonzero()[:, 0] + b * size for b, row in enumerate(mask.cpu())]
    positions = batch[f"{side}position_ids"].cpu().flatten()
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    return [torch.arange(start, end) for start, end in pairwise(starts)]


def _row(ids: Tensor, labels: Tensor, place: Tensor) -> TeacherRow:
    counts = labels[1:] != IGNORED_LABEL
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(ids.to(torch.int64).numpy().tobytes())
    digest.update(counts.numpy().tobytes())
    return TeacherRow(digest.digest(), place, counts.nonzero()[:, 0])
