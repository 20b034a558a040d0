"""Training without padding: what it can't be joined with, and whether a model keeps packed rows apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.config import MTAConfig
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.models import UNFIT
from mta_fast.errors import InputError
from mta_fast.inputs import HALF_PRECISION_TOLERANCE, PROBE_TOLERANCE, model_inputs, takes_positions
from mta_fast.layers import evaluating, unwrap
from mta_fast.spans.collate import SpanCollator

FIRST_TOKENS, SECOND_TOKENS = 8, 6  # of the probe's two rows
LEAKED_SHARE = 0.05  # of what the first row changes in the second were both one text; rounding stays far below
MEND = "leave padding_free out; train_sampling_strategy: group_by_length makes batches of little padding"


def check_joined(padding_free: bool, config: MTAConfig | None, method: BaseMethod, collator: Any) -> None:
    """Refuse what reads padding or the rows of a padded batch, and a collator that does not pack.

    Args:
        config: MTA's. collator: what makes the batches, which a base method may have wrapped.

    Raises:
        InputError: names it and the mend.
    """
    inner = getattr(collator, "collator", collator)
    flat = isinstance(inner, SpanCollator) and inner.flatten
    if flat != padding_free:
        raise InputError(
            f"data_collator: expected SpanCollator(flatten={padding_free}) with padding_free {padding_free}, got "
            f"{f'flatten={flat}' if isinstance(inner, SpanCollator) else type(inner).__name__}; set both, or neither"
        )
    if padding_free and config is not None and config.count_padding:
        raise InputError(
            f"padding_free: expected an MTA without count_padding, which the public preset has: its importance counts "
            f"padding; {MEND}"
        )
    if padding_free and method.reads_rows:
        raise InputError(
            f"padding_free: expected a base loss of tokens, {method.name} takes means over the rows of a padded batch; "
            f"{MEND}"
        )


def check_packing(model: nn.Module, side: str) -> None:
    """Refuse a model in which packed rows read each other, found out with two rows through the model as it is.

    The second row's logits must not change with the first row's tokens, and be those of the row alone. Called under
    the autocast of the training.

    Args:
        model: a causal language model, its attention implementation and dtype as in training; its mode is kept.
        side: "student" or "teacher", for the message.

    Raises:
        InputError: they do, the model takes no position_ids, or it can't run on packed rows.
    """
    inner: Any = unwrap(model)
    attention = getattr(inner.config, "_attn_implementation", None)
    name = f"the {side} ({type(inner).__name__}, attn_implementation {attention!r})"
    if not takes_positions(model):
        raise InputError(f"padding_free: expected models that take position_ids, {name} takes none; {MEND}")
    try:
        leaked, mixed, shifted = _probe(model)
    except UNFIT as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"padding_free: expected a model that runs on packed rows, {name} raised {error} on its device; {MEND}"
        ) from None
    other = [way for way in ("sdpa", "eager") if way != attention]
    mend = f"load it with attn_implementation flash_attention_2 on a GPU, or try {' or '.join(other)}; else {MEND}"
    if not leaked <= LEAKED_SHARE * mixed:
        raise InputError(
            f"padding_free: expected rows that don't read each other, those of {name} do: another first row changes "
            f"the second's logits by {leaked:.1e} (by {mixed:.1e} were both one text); {mend}"
        )
    if not shifted <= 1:
        raise InputError(
            f"padding_free: expected a row's own logits behind another row, {name} has others there (by {shifted:.1f} "
            f"times what rounding explains); {mend}"
        )


def _probe(model: nn.Module) -> tuple[float, float, float]:
    """How far the second row's logits are moved by another first row, packed and as one text, and by being packed.

    The last is relative to what rounding explains.
    """
    device = next(model.parameters()).device
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # transformers' method
    drawn = torch.randint(size, (FIRST_TOKENS + SECOND_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
    first, second = drawn.split([FIRST_TOKENS, SECOND_TOKENS])
    firsts = first, (first + 1) % size
    with evaluating(model), torch.no_grad():
        packed, other = (_logits(model, _packed(each, second)) for each in firsts)
        joined, other_joined = (_logits(model, _whole(torch.cat([each, second]))) for each in firsts)
        alone = _logits(model, _whole(second))
    tolerance = HALF_PRECISION_TOLERANCE if _is_half(model, alone) else PROBE_TOLERANCE[torch.float32]
    packed, other, joined, other_joined, alone = (each.float() for each in (packed, other, joined, other_joined, alone))
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    shifted = float((packed - alone).norm() / (tolerance * spread).clamp(min=1e-30))
    return float((packed - other).norm()), float((joined - other_joined).norm()), shifted


def _is_half(model: nn.Module, logits: Tensor) -> bool:
    half = (torch.bfloat16, torch.float16)
    return (
        logits.dtype in half
        or any(p.dtype in half for p in model.parameters())
        or torch.is_autocast_enabled(logits.device.type)
    )


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**model_inputs(model, batch), use_cache=False).logits[0, -SECOND_TOKENS:]
    return logits


def _whole(tokens: Tensor) -> dict[str, Any]:
    return {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}


def _packed(*rows: Tensor) -> dict[str, Any]:
    lengths = torch.tensor([0, *map(len, rows)], device=rows[0].device)
    bounds, longest = lengths.cumsum(0, dtype=torch.int32), max(map(len, rows))
    positions = torch.cat([torch.arange(len(row), device=row.device) for row in rows])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
