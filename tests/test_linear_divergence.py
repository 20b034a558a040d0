"""Base losses through the LM head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mta_fast import _extension, linear_divergence_loss, reference
from mta_fast.contract import DIVERGENCES
from mta_fast.distill.methods import losses
from mta_fast.errors import DoubleBackwardError, InputError
from mta_fast.layout import Head
from mta_fast.ops.linear_divergence import _linear_divergence, _linear_divergence_rows

pytestmark = pytest.mark.usefixtures("cpu_backend")

M, V, D_S, D_T = 7, 11, 4, 6
READ_TEACHER = [name for name in DIVERGENCES if name != "cross_entropy"]
CASES = [*((name, False) for name in DIVERGENCES), ("srkl", True)]


def _inputs(dtype: torch.dtype = torch.float64, size: int = M, vocabulary: int = V) -> dict[str, Tensor]:
    made = {
        "student_hidden": torch.randn(size, D_S),
        "student_weight": torch.randn(vocabulary, D_S),
        "teacher_hidden": torch.randn(size, D_T),
        "teacher_weight": torch.randn(vocabulary, D_T),
        "student_bias": torch.randn(vocabulary),
        "teacher_bias": torch.randn(vocabulary),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def _learnt(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")]


def _labels(size: int = M, vocabulary: int = V) -> Tensor:
    return torch.arange(size) * 5 % vocabulary


def _by_logits(inputs: dict[str, Tensor], name: str, labels: Tensor, weights: Tensor, how: dict[str, Any]) -> Tensor:
    """[M] w_i l_i by autograd of [M, V] logits; ``how``: alpha, detach, beta, vocabulary, temperature and the heads."""
    logs = []
    for side in ("student", "teacher"):
        z = inputs[f"{side}_hidden"] @ inputs[f"{side}_weight"].T + inputs[f"{side}_bias"]
        z = z[:, : how["vocabulary"]] * how[f"{side}_scale"]
        cap = how[f"{side}_softcap"]
        z = z if cap is None else cap * (z / cap).tanh()
        logs.append((z / how["temperature"]).log_softmax(-1))
    log_q, log_p = logs
    if name == "cross_entropy":
        return -weights * log_q[torch.arange(len(labels)), labels]
    p, q, a, b = log_p.exp(), log_q.exp(), how["alpha"], how["beta"]
    a = a[:, None] if isinstance(a, Tensor) else a
    mixed = q.detach() if how["detach"] else q

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log()).sum(-1)

    m = b * p + (1 - b) * q
    values = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skl": lambda: kl(p, a * p + (1 - a) * q),
        "srkl": lambda: kl(q, (1 - a) * p + a * mixed),
        "jsd": lambda: b * kl(p, m) + (1 - b) * kl(q, m),
    }[name]()
    return weights * values


def test_by_hand() -> None:
    # q = (1/2, 1/2), p = (3/4, 1/4)
    hidden, head = torch.tensor([[1.0]]), torch.zeros(2, 1)
    other = torch.tensor([[math.log(3)], [0.0]])
    expected = {
        "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse_kl": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2),
        "skl": 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475),  # m = 0.1 p + 0.9 q
        "srkl": 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275),  # m = 0.9 p + 0.1 q
        "jsd": 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
        + 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)),
    }
    for name, value in expected.items():
        loss = linear_divergence_loss(hidden, head, hidden, other, divergence=name)
        assert loss.item() == pytest.approx(value, rel=1e-6), name
    labels = torch.tensor([1])
    loss = linear_divergence_loss(hidden, other, divergence="cross_entropy", labels=labels)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("name", "detach"), CASES)
@pytest.mark.parametrize("capped", [False, True])
def test_value_and_gradient_are_those_of_the_logits(name: str, detach: bool, capped: bool, reduction: str) -> None:
    inputs, labels, weights = _inputs(), _labels(vocabulary=9), torch.rand(M).double()
    caps = {"student_softcap": 2.0 if capped else None, "teacher_softcap": 3.0 if capped else None}
    how: dict[str, Any] = {"vocabulary": 9, "temperature": 1.5, "student_scale": 0.7, "teacher_scale": 1.2, "beta": 0.3}
    how |= {"alpha": torch.rand(M).double() * 0.8 + 0.1, **caps}
    learnt = _learnt(inputs)
    values = _by_logits(inputs, name, labels, weights, how | {"detach": detach})
    made = linear_divergence_loss(
        **inputs, divergence=name, labels=labels, weights=weights, reduction=reduction, detach_mixture=detach, **how
    )
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
    torch.testing.assert_close(made, expected)
    upstream = torch.randn_like(expected)
    for got, true in zip(
        torch.autograd.grad(made, learnt, upstream), torch.autograd.grad(expected, learnt, upstream), strict=True
    ):
        torch.testing.assert_close(got, true)
    assert learnt[1].shape == (V, D_S)


@pytest.mark.parametrize(("name", "detach"), CASES)
def test_the_logits_functions_give_the_same(name: str, detach: bool) -> None:
    inputs, labels = _inputs(), _labels()
    learnt = _learnt(inputs)
    logits = [
        (inputs[f"{side}_hidden"] @ inputs[f"{side}_weight"].T + inputs[f"{side}_bias"])[None]
        for side in ("student", "teacher")
    ]
    padded = [torch.cat([x, torch.zeros(1, 1, V).double()], 1) for x in logits]  # position j predicts label j + 1
    options = {"detach_mixture": detach} if name in ("skl", "srkl") else {}
    expected = losses.BASE_LOSSES[name](*padded, torch.cat([torch.tensor([-100]), labels])[None], **options)
    made = linear_divergence_loss(**inputs, divergence=name, labels=labels, detach_mixture=detach)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, learnt), torch.autograd.grad(expected, learnt))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name: str, reduction: str) -> None:
    inputs, labels = _inputs(size=3), _labels(3)
    rest = {key: x for key, x in inputs.items() if key.startswith("teacher")}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_divergence_loss(
            hidden, weight, **rest, student_bias=bias, divergence=name, labels=labels, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, _learnt(inputs))


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", chunk)
    inputs, labels = _inputs(), _labels()
    learnt = _learnt(inputs)
    made = linear_divergence_loss(**inputs, divergence=name, labels=labels, backend="reference")
    how = {"vocabulary": V, "temperature": 1.0, "alpha": 0.1, "beta": 0.5, "detach": False}
    for side in ("student", "teacher"):
        how |= {f"{side}_scale": 1.0, f"{side}_softcap": None}
    expected = _by_logits(inputs, name, labels, torch.ones(M).double(), how).mean()
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, learnt), torch.autograd.grad(expected, learnt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_rounding_is_that_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    """2,100 ids are several tiles of the C++ kernel, 6,000 positions several chunks."""
    size = 6000 if (name, dtype) == ("srkl", torch.float32) else 300
    inputs, labels = _inputs(dtype, size, 2100), _labels(size, 2100)
    learnt = _learnt(inputs)
    loss = linear_divergence_loss(**inputs, divergence=name, labels=labels)
    exact = {key: x.detach().double() for key, x in inputs.items()}
    leaves = _learnt(exact)
    true = linear_divergence_loss(**exact, divergence=name, labels=labels, backend="reference")
    assert loss.dtype == torch.float32
    assert (loss.double() - true).abs() <= 3e-6 * true.abs()
    for got, expected, leaf in zip(
        torch.autograd.grad(loss, learnt), torch.autograd.grad(true, leaves), learnt, strict=True
    ):
        assert got.dtype == dtype
        rounded = (expected.to(leaf.dtype).double() - expected).norm()
        assert (got.double() - expected).norm() <= 2 * rounded + 5e-6 * expected.norm()


@pytest.mark.parametrize("name", READ_TEACHER)
def test_equal_models_and_far_ones(name: str) -> None:
    hidden, head = torch.randn(M, D_S).requires_grad_(), torch.randn(V, D_S)
    loss = linear_divergence_loss(hidden, head, hidden.detach(), head, divergence=name)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6
    far = linear_divergence_loss(hidden, 100 * head, hidden.detach(), -100 * head, divergence=name)
    assert far.isfinite()
    assert torch.autograd.grad(far, hidden)[0].isfinite().all()


def test_nan_stays_in_its_row_of_values() -> None:
    inputs = _inputs(torch.float32)
    inputs["student_hidden"][2, 1] = torch.nan
    inputs["teacher_hidden"][5, 0] = torch.nan
    values = linear_divergence_loss(**inputs, reduction="none")
    assert values.isnan().tolist() == [i in (2, 5) for i in range(M)]


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_position_and_one(name: str, size: int) -> None:
    inputs, labels = _inputs(size=size), _labels(size)
    learnt = _learnt(inputs)
    loss = linear_divergence_loss(**inputs, divergence=name, labels=labels)
    assert (loss.item() == 0) == (size == 0)
    for leaf, grad in zip(learnt, torch.autograd.grad(loss, learnt), strict=True):
        assert grad.shape == leaf.shape
        assert bool(grad.any()) == (size == 1)
    assert linear_divergence_loss(**inputs, divergence=name, labels=labels, reduction="none").shape == (size,)


def test_chosen_ids_of_heads_of_different_size() -> None:
    inputs = _inputs()
    inputs["teacher_weight"], inputs["teacher_bias"] = torch.randn(V + 5, D_T).double(), torch.randn(V + 5).double()
    with pytest.raises(InputError, match="vocabulary: expected the number of common ids, as the heads have 11 and 16"):
        linear_divergence_loss(**inputs)
    ids = torch.tensor([3, 0, 10]), torch.tensor([15, 2, 7])
    learnt = _learnt(inputs)
    made = linear_divergence_loss(**inputs, vocabulary=ids)
    cut = inputs | {
        name: x[ids[name.startswith("teacher")]] for name, x in inputs.items() if not name.endswith("hidden")
    }
    expected = linear_divergence_loss(**cut)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, learnt), torch.autograd.grad(expected, learnt))
    grad = torch.autograd.grad(linear_divergence_loss(**inputs, vocabulary=ids), learnt[1])[0]
    assert sorted(grad.abs().sum(1).nonzero().flatten().tolist()) == [0, 3, 10]


def test_autocast_rounds_the_factors_alone() -> None:
    inputs = _inputs(torch.float32)
    learnt = _learnt(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_divergence_loss(**inputs)
    rounded = {key: x if key.endswith("bias") else x.detach().bfloat16().float() for key, x in inputs.items()}
    leaves = _learnt(rounded)
    plain = linear_divergence_loss(**rounded)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    for got, expected in zip(torch.autograd.grad(cast, learnt), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(got, expected)


def test_no_gradient_is_computed_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    original = reference.linear_divergence
    monkeypatch.setattr(reference, "linear_divergence", lambda *args: (wanted.append(args[17]), original(*args))[1])
    inputs = _inputs()
    linear_divergence_loss(**inputs, backend="reference")
    inputs["student_bias"].requires_grad_()
    with torch.no_grad():
        linear_divergence_loss(**inputs, backend="reference")
    linear_divergence_loss(**inputs, backend="reference", reduction="none")
    linear_divergence_loss(**inputs, backend="reference")
    assert wanted == [False, False, False, True]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["srkl", "cross_entropy"])
def test_a_frozen_head_costs_no_gradient_of_its_own(name: str, dtype: torch.dtype, reduction: str) -> None:
    inputs = _inputs(dtype)
    options: dict[str, Any] = {"divergence": name, "labels": _labels(), "reduction": reduction}
    student, weight, bias = _learnt(inputs)
    expected, *_ = torch.autograd.grad(linear_divergence_loss(**inputs, **options).sum(), [student, weight, bias])
    frozen = inputs | {"student_weight": weight.detach(), "student_bias": bias.detach()}
    loss = linear_divergence_loss(**frozen, **options)
    if reduction == "sum":
        kept = [tuple(tensor.shape) for tensor in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]  # it has one
        assert kept == [(M, D_S), (0, D_S), (0,)]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.equal(gradient, expected)


def test_the_teacher_and_the_weights_have_no_gradient() -> None:
    inputs = {name: x.requires_grad_() for name, x in _inputs().items()}
    weights, alpha = (torch.rand(M).double().requires_grad_() for _ in range(2))
    linear_divergence_loss(**inputs, weights=weights, alpha=alpha).backward()
    assert [x.grad is not None for x in inputs.values()] == [True, True, False, False, True, False]
    assert weights.grad is None
    assert alpha.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction: str) -> None:
    inputs = _inputs()
    learnt = _learnt(inputs)
    loss = linear_divergence_loss(**inputs, reduction=reduction)
    with pytest.raises(DoubleBackwardError, match="linear_divergence_loss"):
        torch.autograd.grad(loss.sum(), learnt, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twice_the_same_and_kept_for_a_second_backward(reduction: str) -> None:
    inputs = _inputs(torch.float32, 300, 1500)
    learnt = _learnt(inputs)
    loss = linear_divergence_loss(**inputs, reduction=reduction).sum()
    first = torch.autograd.grad(loss, learnt, retain_graph=True)
    again = linear_divergence_loss(**inputs, reduction=reduction).sum()
    for a, b, c in zip(first, torch.autograd.grad(loss, learnt), torch.autograd.grad(again, learnt), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.skipif(_extension.why_missing() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("size", [3, 900])
def test_bitwise_the_same_at_any_thread_count(size: int) -> None:
    inputs = _inputs(torch.float32, size, 20_000)
    learnt = _learnt(inputs)

    def everything() -> list[Tensor]:
        loss = linear_divergence_loss(**inputs, backend="cpp")
        return [loss.detach(), *torch.autograd.grad(loss, learnt)]

    torch.set_num_threads(1)
    alone = everything()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(everything(), alone, strict=True)), threads


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "kl"}, "divergence: expected one of forward_kl, .* got 'kl'"),
    ({"reduction": "sample"}, "reduction: expected one of mean, sum, none, got 'sample'"),
    ({"alpha": 0.0}, "alpha: expected a number between 0 and 1, got 0.0"),
    ({"alpha": 1}, "alpha: expected a number between 0 and 1, got 1"),
    ({"alpha": torch.rand(3)}, r"alpha: expected shape \(7,\)"),
    ({"beta": 1.0}, "beta: expected a number between 0 and 1, got 1.0"),
    ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    ({"student_softcap": 0.0}, "student_softcap: expected a number > 0 or None, got 0.0"),
    ({"teacher_softcap": -1.0}, "teacher_softcap: expected a number > 0 or None, got -1.0"),
    ({"vocabulary": 12}, "vocabulary: expected from 1 to 11 ids, as student_weight has, got 12"),
    ({"vocabulary": 0}, "vocabulary: expected from 1 to 11 ids"),
    ({"weights": torch.rand(3)}, r"weights: expected shape \(7,\)"),
    ({"teacher_hidden": torch.rand(3, D_T)}, r"teacher_hidden: expected shape \(7, 6\)"),
    ({"teacher_weight": None}, "teacher_hidden, teacher_weight: expected both with srkl, got none"),
    ({"student_weight": torch.rand(V, 3)}, r"student_weight: expected shape \[any, 4\], got \[11, 3\]"),
    ({"student_bias": torch.rand(3)}, "student_bias: expected"),
    ({"divergence": "cross_entropy"}, r"labels: expected \[M\] ids with cross_entropy, got none"),
    ({"divergence": "cross_entropy", "labels": torch.full((M,), V)}, "labels: expected indices from 0 to 10, got 11"),
    ({"divergence": "cross_entropy", "labels": torch.full((M,), -100)}, "labels: expected indices .* got -100"),
    ({"divergence": "skl", "detach_mixture": True}, "detach_mixture: expected False with skl, got True"),
    ({"student_weight": torch.rand(V, D_S, device="meta")}, "student_weight: expected on cpu, got meta"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_errors_name_expected_and_received(changes: dict[str, Any], message: str) -> None:
    inputs = _inputs()
    _learnt(inputs)
    # the values of labels are for the backend to read, and the C++ kernels raise a RuntimeError
    with pytest.raises((InputError, RuntimeError) if "labels" in changes else InputError, match=message):
        linear_divergence_loss(**(inputs | changes))


@pytest.mark.parametrize("name", ["srkl", "cross_entropy"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(name: str, bias: bool) -> None:
    inputs = _inputs()
    hidden, weight, of_student = _learnt(inputs)
    teacher = [inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"]]
    labels = _labels() if name == "cross_entropy" else None
    raw = (hidden, weight, of_student if bias else None, *([None] * 3 if labels is not None else teacher), labels,
           torch.full((M,), 0.1), torch.rand(M), name, 0.5, False, *Head(), *Head(0.5, 3.0, 2.0), V,
           torch.float64, torch.float64)  # fmt: skip
    torch.library.opcheck(_linear_divergence, (*raw, True, True, "reference"))
    frozen = [x if x is None else x.detach() for x in raw[1:3]]
    torch.library.opcheck(_linear_divergence, (hidden, *frozen, *raw[3:], True, False, "reference"))
    torch.library.opcheck(_linear_divergence_rows, (*raw, "reference"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_all_sizes(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence_loss, fullgraph=True, backend="aot_eager")
    for i, size in enumerate((5, 8, 13, 40)):
        inputs = _inputs(size=size)
        learnt = _learnt(inputs)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            made = compiled(**inputs, reduction=reduction)
            grads = torch.autograd.grad(made.sum(), learnt)
        plain = linear_divergence_loss(**inputs, reduction=reduction)
        torch.testing.assert_close(made, plain)
        torch.testing.assert_close(grads, torch.autograd.grad(plain.sum(), learnt))
    torch._dynamo.reset()
