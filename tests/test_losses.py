"""Base losses."""

from __future__ import annotations

import warnings

import pytest
import torch

from mta_fast.distill.data import format_prompt
from mta_fast.distill.methods.losses import BASE_LOSSES, base_loss, skewed_reverse_kl
from mta_fast.errors import InputError


def test_srkl_by_hand() -> None:
    # one counted position: q = (3/4, 1/4), p = (1/2, 1/2), mixture 0.9 p + 0.1 q = (0.525, 0.475)
    student = torch.tensor([[[3.0, 1.0], [7.0, 7.0]]]).double().log()
    teacher = torch.tensor([[[1.0, 1.0], [1.0, 9.0]]]).double().log()
    q, mixture = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.525, 0.475]).double()
    loss = skewed_reverse_kl(student, teacher, torch.tensor([[-100, 1]]))
    torch.testing.assert_close(loss, (q * (q / mixture).log()).sum())


def test_srkl_is_zero_at_the_teacher_and_skips_what_does_not_count() -> None:
    logits = torch.randn(2, 4, 5).double()
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, 3]])
    assert skewed_reverse_kl(logits, logits, labels).abs() < 1e-12
    other = logits.clone()
    other[0, 2:] = torch.nan  # predicts labels that do not count
    other[1, :2] = torch.nan
    assert skewed_reverse_kl(other, logits, labels).abs() < 1e-12


@pytest.mark.parametrize("name", sorted(BASE_LOSSES))
def test_labels_that_are_all_masked_are_named(name: str) -> None:
    logits, labels = torch.randn(2, 4, 5).double().requires_grad_(), torch.full((2, 4), -100)
    labels[0, 0] = 3  # the first token's: no position predicts it
    for reduction in ("mean", "sum"):
        with pytest.warns(UserWarning, match="labels: expected one that counts in the batch, got -100 everywhere"):
            nothing = base_loss(name)(logits, logits, labels, reduction=reduction)
        nothing.backward()
        assert nothing.item() == 0
    labels[1, 3] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base_loss(name)(logits, logits, labels)


def test_srkl_gradient_goes_through_the_mixture() -> None:
    teacher, labels = torch.randn(1, 3, 4).double(), torch.tensor([[0, 1, 2]])
    student = torch.randn(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: skewed_reverse_kl(s, teacher, labels), student)


def test_errors_name_expected_and_received() -> None:
    logits = torch.randn(1, 3, 4)
    with pytest.raises(InputError, match="alpha: expected a number between 0 and 1, got 1"):
        skewed_reverse_kl(logits, logits, torch.zeros(1, 3), alpha=1)
    with pytest.raises(InputError, match="different vocabularies"):
        skewed_reverse_kl(logits, logits[..., 1:], torch.zeros(1, 3))
    with pytest.raises(InputError, match="labels: expected"):
        skewed_reverse_kl(logits, logits, torch.zeros(1, 2))


def test_prompt_template() -> None:
    without = format_prompt("Sum up.")
    assert without.startswith("Below is an instruction that describes a task. Write a response")
    assert without.endswith("completes the request.\n\n### Instruction:\nSum up.\n\n### Response:\n")
    assert "### Input:\nThe text.\n\n### Response:\n" in format_prompt("Sum up.", "The text.")


def test_prompt_template_equals_the_data(shared: object) -> None:
    import json
    from pathlib import Path

    assert isinstance(shared, Path)
    for line in (shared / "data/dolly/dev.jsonl").read_text().splitlines()[:200]:
        row = json.loads(line)
        assert format_prompt(row["instruction"], row["input"]) == row["prompt"]


Q, P = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()


def _by_hand(name: str) -> torch.Tensor:
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    return {
        "forward_kl": kl(P, Q),
        "reverse_kl": kl(Q, P),
        "skl": kl(P, 0.1 * P + 0.9 * Q),
        "srkl": kl(Q, 0.9 * P + 0.1 * Q),
        "jsd": 0.3 * kl(P, 0.3 * P + 0.7 * Q) + 0.7 * kl(Q, 0.3 * P + 0.7 * Q),
        "cross_entropy": -Q[1].log(),
    }[name]


@pytest.mark.parametrize("name", sorted(BASE_LOSSES))
def test_each_loss_by_hand(name: str) -> None:
    student, teacher = (torch.stack([d, d]).log()[None] for d in (Q, P))
    labels = torch.tensor([[-100, 1]])
    loss = base_loss(name, **({"beta": 0.3} if name == "jsd" else {}))
    torch.testing.assert_close(loss(student, teacher, labels), _by_hand(name))
    twice = torch.cat([student, student]), torch.cat([teacher, teacher]), torch.cat([labels, labels])
    torch.testing.assert_close(loss(*twice), _by_hand(name))
    torch.testing.assert_close(loss(*twice, reduction="sum"), 2 * _by_hand(name))


@pytest.mark.parametrize("name", sorted(BASE_LOSSES))
def test_gradients(name: str) -> None:
    teacher, labels = torch.randn(1, 3, 4).double(), torch.tensor([[0, 1, 2]])
    student = torch.randn(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: base_loss(name)(s, teacher, labels), student)


def test_a_detached_mixture_has_another_gradient() -> None:
    teacher, labels = torch.randn(1, 3, 4).double(), torch.tensor([[0, 1, 2]])
    gradients = []
    for detach in (False, True):
        student = torch.arange(12).reshape(1, 3, 4).double().requires_grad_()
        loss = skewed_reverse_kl(student, teacher, labels, detach_mixture=detach)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert not torch.allclose(*gradients)


def test_names_and_options_are_checked() -> None:
    with pytest.raises(InputError, match="expected one of forward_kl, .* got 'slk', did you mean 'skl'"):
        base_loss("slk")
    with pytest.raises(InputError, match="base loss jsd: expected options among beta, got 'alpha'"):
        base_loss("jsd", alpha=0.1)
    with pytest.raises(InputError, match="reduction: expected 'mean' or 'sum', got 'max'"):
        base_loss("srkl")(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2), reduction="max")  # type: ignore[arg-type]  # on purpose
