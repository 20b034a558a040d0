"""Entropy weights."""

from __future__ import annotations

import math

import pytest
import torch

from mta_fast import entropy_weights, reference
from mta_fast.errors import InputError
from mta_fast.ops.entropy import _entropy_weights


def test_by_hand() -> None:
    # uniform over two: 0; certain: 1; (3/4, 1/4): 1 - H / ln 2
    logits = torch.tensor([[[0.0, 0.0], [200.0, 0.0], [math.log(3), 0.0]]]).double()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = torch.tensor([[0.0, 1.0, 1 - entropy / math.log(2)]]).double()
    torch.testing.assert_close(entropy_weights(logits), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("budget", [1, 7, 64, 1 << 22])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    logits = torch.randn(3, 5, 13)
    expected = entropy_weights(logits.double())
    monkeypatch.setattr(reference, "LOGIT_BUDGET", budget)
    torch.testing.assert_close(entropy_weights(logits).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(2, 3, 50)).to(dtype).requires_grad_()
    made = entropy_weights(logits)
    assert made.dtype == torch.float32
    assert not made.requires_grad
    torch.testing.assert_close(made.double(), entropy_weights(logits.double()), rtol=1e-5, atol=1e-6)


def test_errors_name_expected_and_received() -> None:
    with pytest.raises(InputError, match="vocabulary of at least 2, got 1"):
        entropy_weights(torch.randn(2, 3, 1))
    with pytest.raises(InputError, match="logits: expected float64"):
        entropy_weights(torch.ones(2, 3, 4, dtype=torch.long))


def test_opcheck() -> None:
    torch.library.opcheck(_entropy_weights, (torch.randn(2, 3, 7),))
