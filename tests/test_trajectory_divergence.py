"""FDD through the LM head: several layers' distributions, without logits of all tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mta_fast import reference, trajectory_divergence
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.layout import Head
from mta_fast.ops.trajectory_divergence import _trajectory_divergence

LAYERS, N, V, D_S, D_T = 3, 5, 11, 4, 6
BENT: dict[str, Any] = {"scales": (0.7, 1.2), "softcaps": (2.0, 3.0)}


def _inputs(dtype: torch.dtype = torch.float64, layers: int = LAYERS, size: int = N, ids: int = V) -> dict[str, Any]:
    return {
        "student_states": torch.randn(layers, size, D_S).to(dtype).requires_grad_(),
        "teacher_states": torch.randn(layers, size, D_T).to(dtype),
        "student_weight": torch.randn(ids, D_S).to(dtype).requires_grad_(),
        "teacher_weight": torch.randn(ids, D_T).to(dtype),
        "biases": (torch.randn(ids).to(dtype).requires_grad_(), torch.randn(ids).to(dtype)),
    }


def _learnt(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs["student_states"], inputs["student_weight"], inputs["biases"][0]]


def _by_logits(inputs: dict[str, Any], tau: float, **how: Any) -> Tensor:
    """The same by autograd of all logits, token by token and layer by layer."""
    ids = how.get("vocabulary", V)
    sides = []
    for i, side in enumerate(("student", "teacher")):
        z = inputs[f"{side}_states"] @ inputs[f"{side}_weight"].T + inputs["biases"][i]
        z = z[..., :ids] * how.get("scales", (1.0, 1.0))[i]
        cap = how.get("softcaps", (None, None))[i]
        sides.append(z if cap is None else cap * (z / cap).tanh())
    u_s, u_t = sides
    layers, total = len(u_s), torch.zeros((), dtype=torch.float64)
    for j in range(u_s.shape[1]):
        for k in range(layers):
            p, q = (u_t[k, j] / tau).softmax(-1), (u_s[k, j] / tau).softmax(-1)
            total = total + (p * (p / q).log()).sum() / layers
        for k in range(1, layers):
            d_t, d_s = (u[k, j].log_softmax(-1) - u[k - 1, j].log_softmax(-1) for u in (u_t, u_s))
            total = total + (1 - (d_t @ d_s) / (d_t.norm() * d_s.norm())) / (layers - 1)
    return total


def test_by_hand() -> None:
    # one layer of two ids: q = (1/2, 1/2), p = (3/4, 1/4), tau 1
    one, teacher = torch.ones(1, 1, 1), torch.tensor([[3.0], [1.0]]).log()
    made = trajectory_divergence(one, one, torch.zeros(2, 1), teacher, tau=1.0)
    a, b = math.log(1.5), math.log(0.5)
    assert made.item() == pytest.approx(0.75 * a + 0.25 * b, rel=1e-6)
    # from (1/2, 1/2) on both sides to p = (3/4, 1/4), q = (1/4, 3/4): D^T = (a, b), D^S = (b, a)
    states = torch.tensor([[[0.0]], [[1.0]]])
    made = trajectory_divergence(states, states, -teacher, teacher, tau=1.0)
    assert made.item() == pytest.approx(0.5 * math.log(3) / 2 + 1 - 2 * a * b / (a * a + b * b), rel=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("how", [{}, BENT, {**BENT, "vocabulary": 9}], ids=["plain", "bent", "cut"])
def test_value_and_gradient_are_those_of_the_logits(layers: int, how: dict[str, Any]) -> None:
    inputs = _inputs(layers=layers)
    made, expected = trajectory_divergence(**inputs, tau=2.0, **how), _by_logits(inputs, 2.0, **how)
    torch.testing.assert_close(made, expected)
    for got, true in zip(*(torch.autograd.grad(3 * loss, _learnt(inputs)) for loss in (made, expected)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradcheck(layers: int) -> None:
    inputs = _inputs(layers=layers, size=3)

    def loss(weight: Tensor, bias: Tensor, *states: Tensor) -> Tensor:
        given = inputs | {"student_states": states, "student_weight": weight, "biases": (bias, inputs["biases"][1])}
        return trajectory_divergence(**given, tau=1.5, **BENT)

    states = [state.detach().requires_grad_() for state in inputs["student_states"]]
    assert torch.autograd.gradcheck(loss, (*_learnt(inputs)[1:], *states))


def test_the_explicit_gradient_is_that_of_autograd() -> None:
    u, log_p = torch.randn(3, 5, 7).double().requires_grad_(), torch.randn(3, 5, 7).double().log_softmax(-1)
    values, gradient = reference.trajectory(log_p, u.log_softmax(-1), 1.7, True)
    torch.testing.assert_close(gradient, torch.autograd.grad(values.sum(), u)[0])


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 9])
def test_chunks_and_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Chunks of four tokens, passes over rows of one or three."""
    inputs = _inputs(size=size)
    expected = _by_logits(inputs, 2.0)
    grads = torch.autograd.grad(expected, _learnt(inputs)) if size else map(torch.zeros_like, _learnt(inputs))
    wanted = list(grads)
    monkeypatch.setattr(reference, "TRAJECTORY_LOGITS", 4 * LAYERS * V)
    for rows in (1, 3 * LAYERS * V):
        monkeypatch.setattr(reference, "ROW_LOGITS", rows)
        made = trajectory_divergence(**inputs, tau=2.0)
        torch.testing.assert_close(made, expected)
        for got, true in zip(torch.autograd.grad(made, _learnt(inputs)), wanted, strict=True):
            torch.testing.assert_close(got, true)


class _Largest(TorchDispatchMode):
    """The most logits that any tensor made within it holds."""

    logits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, Tensor) and each.shape[-1:] == (300,):
                self.logits = max(self.logits, each.numel())
        return made


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_no_more_logits_than_a_chunks_are_made(monkeypatch: pytest.MonkeyPatch, softcap: float) -> None:
    monkeypatch.setattr(reference, "TRAJECTORY_LOGITS", LAYERS * 300 * 8)
    student, weight = torch.randn(LAYERS, 64, D_S), torch.randn(300, D_S)
    with _Largest() as largest:
        reference.trajectory_divergence(
            student, weight, None, student, weight, None, 2.0, Head(0.5, softcap), Head(), 300,
            torch.float32, torch.float32, True,
        )  # fmt: skip
    assert largest.logits == LAYERS * 300 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_inputs(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype, size=40, ids=500)
    exact = _inputs(size=0)
    for name, value in inputs.items():
        exact[name] = tuple(map(_exact, value)) if isinstance(value, tuple) else _exact(value)
    made, true = (trajectory_divergence(**given, tau=2.0, **BENT) for given in (inputs, exact))
    assert made.dtype == torch.float32
    assert (made.double() - true).abs() <= 3e-6 * true.abs()
    grads = (torch.autograd.grad(loss, _learnt(given)) for loss, given in ((made, inputs), (true, exact)))
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == dtype
        rounded = (expected.to(dtype).double() - expected).norm()
        assert (got.double() - expected).norm() <= 2 * rounded + 5e-6 * expected.norm()


def _exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def test_autocast_rounds_the_factors_alone() -> None:
    inputs = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = trajectory_divergence(**inputs, tau=2.0)
    rounded = {name: x if name == "biases" else x.detach().bfloat16().float() for name, x in inputs.items()}
    assert torch.equal(cast, trajectory_divergence(**rounded, tau=2.0))


def test_heads_of_different_size() -> None:
    inputs = _inputs()
    inputs["teacher_weight"], of_teacher = torch.randn(V + 5, D_T).double(), torch.randn(V + 5).double()
    inputs["biases"] = (inputs["biases"][0], of_teacher)
    with pytest.raises(InputError, match="vocabulary: expected the number of common ids, as the heads have 11 and 16"):
        trajectory_divergence(**inputs, tau=2.0)
    made = trajectory_divergence(**inputs, tau=2.0, vocabulary=9)
    torch.testing.assert_close(made, _by_logits(inputs, 2.0, vocabulary=9))
    grad = torch.autograd.grad(made, inputs["student_weight"])[0]
    assert grad[:9].abs().sum(1).all()
    assert not grad[9:].any()


def test_equal_models_and_far_ones() -> None:
    inputs = _inputs(torch.float32)
    same = {"teacher_states": inputs["student_states"].detach(), "teacher_weight": inputs["student_weight"].detach()}
    same["biases"] = (inputs["biases"][0], inputs["biases"][0].detach())
    loss = trajectory_divergence(**(inputs | same), tau=2.0)
    assert loss.abs() < 1e-5
    assert torch.autograd.grad(loss, inputs["student_states"])[0].abs().max() < 1e-5
    far = {"student_weight": 1000 * inputs["student_weight"], "teacher_weight": -1000 * inputs["teacher_weight"]}
    loss = trajectory_divergence(**(inputs | far), tau=2.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, inputs["student_states"])[0].isfinite().all()


def test_layers_that_do_not_differ_have_no_direction() -> None:
    """A cosine with a zero vector is 0, and so is its gradient."""
    inputs = _inputs(layers=2)
    still = inputs["student_states"].detach()[:1].expand(2, -1, -1).clone().requires_grad_()
    both = trajectory_divergence(**(inputs | {"student_states": still}), tau=2.0)
    apart = []
    for k in (0, 1):
        layer = {"student_states": still[k : k + 1], "teacher_states": inputs["teacher_states"][k : k + 1]}
        apart.append(trajectory_divergence(**(inputs | layer), tau=2.0))
    expected = sum(apart) / 2 + N
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(torch.autograd.grad(both, still), torch.autograd.grad(expected, still))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_stays_with_its_token(side: str) -> None:
    inputs = _inputs(torch.float32)
    broken = inputs[f"{side}_states"].detach().clone()
    broken[1, 2, 0] = torch.nan
    given = inputs | {f"{side}_states": broken.requires_grad_(side == "student")}
    loss = trajectory_divergence(**given, tau=2.0)
    assert loss.isnan()
    grad = torch.autograd.grad(loss, given["student_states"])[0]
    assert grad.isnan().any(-1).any(0).tolist() == [j == 2 for j in range(N)]


def test_gradients_are_made_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[bool, bool]] = []
    original = reference.trajectory_divergence
    monkeypatch.setattr(
        reference, "trajectory_divergence", lambda *args: (wanted.append(args[-2:]), original(*args))[1]
    )
    inputs = _inputs()
    with torch.no_grad():
        trajectory_divergence(**inputs, tau=2.0)
    frozen = {
        "student_weight": inputs["student_weight"].detach(),
        "biases": tuple(b.detach() for b in inputs["biases"]),
    }
    loss = trajectory_divergence(**(inputs | frozen), tau=2.0)
    alone = torch.autograd.grad(loss, inputs["student_states"])[0]
    trajectory_divergence(**(inputs | frozen | {"student_states": inputs["student_states"].detach()}), tau=2.0)
    whole = torch.autograd.grad(trajectory_divergence(**inputs, tau=2.0), inputs["student_states"])[0]
    assert wanted == [(False, True), (True, False), (False, False), (True, True)]
    assert torch.equal(alone, whole)


def test_the_teacher_has_no_gradient() -> None:
    inputs = _inputs()
    teachers = [inputs["teacher_states"], inputs["teacher_weight"], inputs["biases"][1]]
    for each in teachers:
        each.requires_grad_()
    trajectory_divergence(**inputs, tau=2.0).backward()
    assert all(each.grad is None for each in teachers)
    assert all(each.grad is not None for each in _learnt(inputs))


def test_double_backward_raises() -> None:
    inputs = _inputs()
    with pytest.raises(DoubleBackwardError, match="trajectory_divergence"):
        torch.autograd.grad(trajectory_divergence(**inputs, tau=2.0), _learnt(inputs), create_graph=True)


def test_twice_the_same_and_kept_for_a_second_backward() -> None:
    inputs = _inputs(torch.float32, size=60, ids=1500)
    loss, again = (trajectory_divergence(**inputs, tau=2.0) for _ in range(2))
    first = torch.autograd.grad(loss, _learnt(inputs), retain_graph=True)
    for each in (torch.autograd.grad(loss, _learnt(inputs)), torch.autograd.grad(again, _learnt(inputs))):
        assert all(torch.equal(a, b) for a, b in zip(first, each, strict=True))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tau": 0.0}, "tau: expected a temperature > 0, got 0.0"),
    ({"softcaps": (0.0, None)}, r"softcaps\[0\]: expected a number > 0 or None, got 0.0"),
    ({"softcaps": (None, -1.0)}, r"softcaps\[1\]: expected a number > 0 or None, got -1.0"),
    ({"vocabulary": 12}, "vocabulary: expected from 1 to 11 ids, as student_weight has, got 12"),
    ({"student_states": []}, "student_states: expected a state for each of 1 or more layers, got none"),
    ({"student_states": [torch.rand(5, 4), torch.rand(4, 4)]}, r"student_states\[1\]: expected shape \(5, 4\)"),
    ({"teacher_states": torch.rand(2, N, D_T)}, r"teacher_states: expected shape \(3, 5, 6\)"),
    ({"student_states": torch.rand(0, N, D_S), "teacher_states": torch.rand(0, N, D_T)}, "at least 1 layer, got 0"),
    ({"student_weight": torch.rand(V, 3)}, r"student_weight: expected shape \[any, 4\], got \[11, 3\]"),
    ({"biases": (torch.rand(3), None)}, "student_bias: expected"),
    ({"student_weight": torch.rand(V, D_S, device="meta")}, "student_weight: expected on cpu, got meta"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_errors_name_expected_and_received(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trajectory_divergence(**(_inputs() | {"tau": 2.0} | changes))


@pytest.mark.parametrize("learns", [True, False])
def test_opcheck(learns: bool) -> None:
    inputs = _inputs()
    states, weight, bias = _learnt(inputs)
    own = (weight, bias) if learns else (weight.detach(), None)
    torch.library.opcheck(
        _trajectory_divergence,
        (states, *own, inputs["teacher_states"], inputs["teacher_weight"], None, 2.0, 0.5, 3.0, 1.0, 0.0, V,
         torch.float64, torch.float64, True, learns),
    )  # fmt: skip


def test_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(trajectory_divergence, fullgraph=True, backend="aot_eager")
    for i, size in enumerate((5, 8, 13)):
        inputs = _inputs(size=size)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            made = compiled(**inputs, tau=2.0)
            grads = torch.autograd.grad(made, _learnt(inputs))
        plain = trajectory_divergence(**inputs, tau=2.0)
        torch.testing.assert_close(made, plain)
        torch.testing.assert_close(grads, torch.autograd.grad(plain, _learnt(inputs)))
    torch._dynamo.reset()


def test_a_second_statement_agrees_on_one_batch() -> None:
    """All tokens at once by torch's own cosine: what FDD is where the logits are at hand."""
    u_s, u_t = torch.randn(2, LAYERS, N, V).double()
    log_q, log_p = u_s.log_softmax(-1), u_t.log_softmax(-1)
    kl = F.kl_div((u_s / 3).log_softmax(-1), (u_t / 3).softmax(-1), reduction="none").sum(-1).mean(0)
    der = (1 - F.cosine_similarity(log_p.diff(dim=0), log_q.diff(dim=0), dim=-1)).mean(0)
    torch.testing.assert_close(reference.trajectory(log_p, log_q, 3.0)[0], kl + der)
