"""The placebo: states permuted within their rows."""

from __future__ import annotations

import pytest
import torch

from mta_fast.distill.placebo import shuffled, shuffled_positions
from mta_fast.errors import InputError
from mta_fast.ops.importance import token_importance

IDS = torch.randint(0, 1000, (4, 12), generator=torch.Generator().manual_seed(3))
# padding right, none, left; a row of one token
MASK = torch.tensor([[1] * 9 + [0] * 3, [1] * 12, [0] * 4 + [1] * 8, [1] + [0] * 11])


def test_each_row_keeps_its_states_and_its_padding() -> None:
    states = torch.randn(4, 12, 5)
    positions = shuffled_positions(IDS, MASK, 7)
    moved = shuffled(states, positions)
    assert positions.dtype == torch.int64
    for b, real in enumerate(MASK.bool()):
        assert sorted(positions[b, real].tolist()) == real.nonzero()[:, 0].tolist()
        assert sorted(moved[b, real].tolist()) == sorted(states[b, real].tolist())
        assert torch.equal(moved[b, ~real], states[b, ~real])
    own = torch.arange(12)
    assert all((positions[b] != own).sum() > 4 for b in range(3))
    assert torch.equal(positions[3], own)


def test_a_permutation_is_the_row_s_own() -> None:
    whole = shuffled_positions(IDS, MASK, 7)
    alone = shuffled_positions(IDS[2:3, 4:], MASK[2:3, 4:], 7)  # without its padding
    assert torch.equal(alone[0] + 4, whole[2, 4:])
    wide = torch.cat([torch.full((1, 5), 999), IDS[:1, :9]], 1)  # its padding on the other side, other ids in it
    assert torch.equal(shuffled_positions(wide, wide != 999, 7)[0, 5:] - 5, whole[0, :9])
    again = shuffled_positions(IDS.flip(0), MASK.flip(0), 7)
    assert torch.equal(again.flip(0), whole)


def test_it_differs_between_rows_and_seeds() -> None:
    ids = torch.arange(24).view(2, 12)
    ones = torch.ones_like(ids)
    first, second = shuffled_positions(ids, ones, 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffled_positions(ids, ones, 2)[0])
    # every permutation of four tokens comes up
    made = {tuple(shuffled_positions(ids[:1, :4], ones[:1, :4], seed)[0].tolist()) for seed in range(300)}
    assert len(made) == 24


def test_importance_goes_with_its_state() -> None:
    states = torch.randn(4, 12, 5, dtype=torch.float64)
    positions = shuffled_positions(IDS, MASK, 7)
    of_shuffled = token_importance(shuffled(states, positions), MASK, backend="reference")
    torch.testing.assert_close(of_shuffled, shuffled(token_importance(states, MASK, backend="reference"), positions))


@pytest.mark.parametrize("mask", [None, torch.ones(4, 11), torch.ones(12)])
def test_rows_without_a_mask_are_refused(mask: torch.Tensor | None) -> None:
    with pytest.raises(InputError, match=r"attention_mask: expected \[B, S\] like input_ids \(4, 12\), got"):
        shuffled_positions(IDS, mask, 0)
