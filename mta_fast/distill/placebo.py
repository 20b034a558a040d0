"""The placebo of MTA: the teacher's token states permuted within each row, so that no token has its own.

A student that is trained on ``shuffled`` states has the same spans, losses of the same form and steps of the same cost
as one that is trained on the states themselves. What the second gains over the first comes from what the states say
about single tokens; which states a row has as a whole, the placebo's student still learns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mta_fast.errors import InputError


def shuffled_positions(input_ids: Tensor, attention_mask: Tensor, seed: int) -> Tensor:
    """Where each token of a batch gets its state from: a random permutation of each row's real positions.

    It is drawn from the seed and the row's own real tokens: the same in every epoch and batch, wherever the padding is,
    and to be used for all layers. On a GPU it waits for the tokens.

    Args:
        input_ids: [B, S] token ids, as the teacher reads them.
        attention_mask: [B, S], non-zero at real tokens.
        seed: any integer; another one, other permutations.

    Returns:
        [B, S] int64 columns, for ``shuffled``; padding keeps its own.

    Raises:
        InputError: ids and mask are not two tensors of one shape [B, S]; rows that are packed into one have no mask.
    """
    if not isinstance(attention_mask, Tensor) or input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
        raise InputError(
            f"attention_mask: expected [B, S] like input_ids {tuple(input_ids.shape)}, got {got}; packed rows can't be "
            f"shuffled: leave flatten (padding_free) out"
        )
    ids, real = input_ids.cpu(), attention_mask.cpu() != 0
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    for row in range(len(ids)):
        place = real[row].nonzero()[:, 0]
        generator = torch.Generator().manual_seed(_row_seed(seed, ids[row, place]))
        positions[row, place] = place[torch.randperm(len(place), generator=generator)]
    return positions.to(input_ids.device)


def shuffled(values: Tensor, positions: Tensor) -> Tensor:
    """[B, S, ...] values of tokens, each row's taken at ``positions``.

    For hidden states, and for the importance that was made of them: unless it is causal, that of shuffled states is the
    shuffled one.

    Args:
        values: [B, S, ...] of any dtype.
        positions: [B, S] of ``shuffled_positions``.
    """
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return values[rows, positions]


def _row_seed(seed: int, ids: Tensor) -> int:
    digest = hashlib.blake2b(f"{seed} ".encode(), digest_size=8)
    digest.update(ids.to(torch.int64).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
