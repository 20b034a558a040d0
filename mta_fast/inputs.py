"""What a model is called with: a batch's tokens and mask or row bounds, and positions where it can't count them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mta_fast.errors import InputError
from mta_fast.layers import evaluating, unwrap

PROBE_TOKENS, PROBE_PADDING = 3, 5
# of rows that are packed, as transformers names them
PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# relative difference of the probe's logits: rounding stays below, padding that is read as text is far above
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_PRECISION_TOLERANCE = 0.1
_keeps_values: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, S] int64: 0 at the first real token of a row and at padding before it, then counting on.

    Where a row begins with a real token these are the columns, as models count by themselves.

    Args:
        attention_mask: [B, S], non-zero at real tokens. No synchronisation.
    """
    before = ((attention_mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns - before).clamp(min=0)


def attended(batch: Mapping[str, Any]) -> Tensor:
    """[B, S], or [1, T] of packed rows: non-zero at real tokens."""
    mask: Tensor | None = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def model_inputs(model: nn.Module, batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arguments of a model for a batch of SpanCollator: ``model(**model_inputs(model, batch))``.

    With padding on the left they hold position_ids, without which GPT-2 and others count from the first column.

    Args:
        model: a causal language model of transformers, also wrapped as in ``layers.unwrap``.
        batch: input_ids and attention_mask [B, S]; and position_ids, or else they come from the mask. Or rows packed
            by ``SpanCollator(flatten=True)``.
        prefix: "teacher_" for the tokens of a teacher's own tokenizer.

    Returns:
        input_ids and attention_mask, and position_ids [B, S] for a model that takes them, where padding may be left.
        Of packed rows: input_ids, position_ids, and their bounds for a model that hands them to its attention.

    Raises:
        InputError: packed rows for a model that takes no positions.
    """
    if f"{prefix}cu_seq_lens_q" in batch:
        return _packed_inputs(model, batch, prefix)
    inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
    if (f"{prefix}position_ids" in batch or _may_pad_left(batch, prefix)) and takes_positions(model):
        given = batch.get(f"{prefix}position_ids")
        inputs["position_ids"] = position_ids(inputs["attention_mask"]) if given is None else given
    return inputs


def _packed_inputs(model: nn.Module, batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    if not takes_positions(model):
        raise InputError(
            f"model: expected one that takes position_ids with packed rows, {type(unwrap(model)).__name__} takes none; "
            f"leave flatten (padding_free) out"
        )
    parameters = inspect.signature(type(unwrap(model)).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name in PACKED if takes_any or name in parameters]
    return {name: batch[prefix + name] for name in ("input_ids", *names)}


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward takes position_ids that count from 0; RoBERTa's kind counts its tokens itself."""
    inner = unwrap(model)
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return False
    return not any(hasattr(module, "create_position_ids_from_input_ids") for module in inner.modules())


def _may_pad_left(batch: Mapping[str, Any], prefix: str) -> bool:
    """Whether a row begins with padding, as far as it is known without a synchronisation; else True."""
    mask, spans = batch[f"{prefix}attention_mask"], batch.get(f"{prefix}spans")
    if mask.device.type == "cpu":
        return bool((mask[:, 0] == 0).any())
    if isinstance(spans, Mapping) and spans:
        rows = next(iter(spans.values())).rows
        return bool((rows.host[:, 0] % rows.shape[-1] != 0).any())
    return True


def check_left_padding(model: nn.Module, pad: int, name: str, mend: str) -> None:
    """Refuse a model that takes no positions and has other values with padding on the left (RWKV, BART's decoder).

    Found out with two passes over a few tokens, once a model.

    Args:
        model: a causal language model; its mode is kept.
        pad: the padding token. name: of the model, for the message; mend: what to do about it.

    Raises:
        InputError: it has.
    """
    if takes_positions(model):
        return
    inner = unwrap(model)
    if inner not in _keeps_values:
        _keeps_values[inner] = _probe(model, pad)
    if not _keeps_values[inner]:
        raise InputError(
            f"{name}: expected a model with the same values wherever its padding is, {type(inner).__name__} takes no "
            f"position_ids and has others with padding on the left; {mend}"
        )


def _probe(model: nn.Module, pad: int) -> bool:
    """Whether logits stay as they are when padding is put before the tokens."""
    tokens = [token for token in range(PROBE_TOKENS + 1) if token != pad][:PROBE_TOKENS]
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * PROBE_PADDING + tokens], device=device)
    mask = torch.tensor([[0] * PROBE_PADDING + [1] * PROBE_TOKENS], device=device)
    with evaluating(model), torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, PROBE_PADDING:]
        real = ids[:, PROBE_PADDING:]
        alone = model(input_ids=real, attention_mask=torch.ones_like(real), use_cache=False).logits
    tolerance = PROBE_TOLERANCE.get(alone.dtype, HALF_PRECISION_TOLERANCE)
    padded, alone = padded.float(), alone.float()
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    return bool((padded - alone).norm() <= tolerance * spread)
