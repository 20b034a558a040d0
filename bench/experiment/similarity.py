"""Layer pairs by the similarity of their states: linear CKA (Kornblith et al., arXiv 1905.00414), unit rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.experiment.prepare import Prepared
from bench.experiment.setups import SELECT
from mta_fast.distill.models import load_model
from mta_fast.distill.teacher.rows import side_of
from mta_fast.inputs import model_inputs
from mta_fast.layers import capture_layers, evaluating


@torch.no_grad()
def pairs_by_similarity(prepared: Prepared, student: Path) -> tuple[tuple[int, int], ...]:
    """For each student layer of the full method the teacher layer that is most similar, ascending.

    Args:
        student: the folder of a trained student; compared on a batch of rows that learning rates are chosen by.
    """
    own_layers = prepared.full.student_layers
    batch = prepared.batches[SELECT][-1]
    mask = batch["attention_mask"].cumsum(1) * batch["attention_mask"] > 1  # first tokens' states are like no other's
    own = _states(load_model(str(student)), batch, own_layers, mask)
    teacher_layers = list(range(1, prepared.depths[1] + 1))
    other = _states(prepared.teacher(), batch, teacher_layers, mask, side_of(batch))
    table = torch.tensor([[linear_cka(own[s], other[t]) for t in teacher_layers] for s in own_layers])
    chosen = ascending(table)
    return tuple((layer, teacher_layers[place]) for layer, place in zip(own_layers, chosen, strict=True))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """|X'Y|^2 / (|X'X| |Y'Y|) of centred states [T, d] of the same tokens; 1 where they are alike up to rotation."""
    x, y = (states.double() - states.double().mean(0) for states in (first, second))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def ascending(table: Tensor) -> list[int]:
    """The strictly ascending column of each row [L, N] whose sum is the largest."""
    best, origin = table[0].double(), []
    for row in range(1, len(table)):
        top, place = best.cummax(0)
        shifted = torch.cat([torch.full((1,), float("-inf"), dtype=torch.double), top[:-1]])
        origin.append(torch.cat([torch.zeros(1, dtype=torch.long), place[:-1]]))
        best = table[row].double() + shifted
    chosen = [int(best.argmax())]
    for places in reversed(origin):
        chosen.append(int(places[chosen[-1]]))
    return chosen[::-1]


def _states(model: Any, batch: Any, layers: Sequence[int], mask: Tensor, side: str = "") -> dict[int, Tensor]:
    with evaluating(model), capture_layers(model, layers) as hidden:
        model(**model_inputs(model, batch, side), use_cache=False)
    return {layer: F.normalize(state[mask], dim=-1) for layer, state in hidden.items()}  # as Hid compares them
