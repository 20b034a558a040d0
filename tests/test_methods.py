"""Base methods: DistiLLM, DistiLLM-2 and FDD against sums by hand and plain formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import make_model
from torch import Tensor

pytest.importorskip("transformers")

from mta_fast.distill.heads import LMHead, deferring_logits, take_apart
from mta_fast.distill.methods import fdd
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.distillm import DistiLLM
from mta_fast.distill.methods.distillm2 import DistiLLM2, PairCollator
from mta_fast.distill.methods.fdd import FDD
from mta_fast.distill.methods.losses import forward_kl, skewed_reverse_kl
from mta_fast.distill.methods.registry import base_method
from mta_fast.errors import InputError

IGNORED = -100


def _out(logits: Tensor) -> Any:
    return SimpleNamespace(logits=logits, hidden_states=None)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


# --- by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distillm", "distillm2", "fdd", "srkl", "cross_entropy"])
def test_methods_by_name(name: str) -> None:
    assert isinstance(base_method(name), BaseMethod)


def test_unknown_names_and_options() -> None:
    with pytest.raises(InputError, match="got 'distilm', did you mean 'distillm'"):
        base_method("distilm")
    with pytest.raises(InputError, match="base loss distillm2: expected options among alpha, .*, got 'betta', did"):
        base_method("distillm2", betta=1)
    with pytest.raises(InputError, match="base loss srkl: expected options among alpha, .*, got 'beta'"):
        base_method("srkl", beta=1)


def test_a_class_of_ones_own_by_module_and_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(
        "from mta_fast.distill import BaseMethod\n\n\nclass Own(BaseMethod):\n"
        "    def __init__(self, weight=1.0, **others):\n        super().__init__()\n        self.weight = weight\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert base_method("own_losses:Own", weight=2.0, other=1).weight == 2.0  # type: ignore[attr-defined]  # it has one
    with pytest.raises(InputError, match="base loss: expected module:name .*, got 'own_losses:None_'"):
        base_method("own_losses:None_")
    with pytest.raises(InputError, match="expected a BaseMethod, got Counter"):
        base_method("collections:Counter")


def test_a_loss_alone_is_the_mean_over_the_counted_positions() -> None:
    student, teacher = torch.randn(2, 2, 5, 7).double()
    batch = {"labels": torch.tensor([[IGNORED, IGNORED, 1, 2, 3], [IGNORED, 4, IGNORED, IGNORED, IGNORED]])}
    for name, loss in (("forward_kl", forward_kl), ("distillm", skewed_reverse_kl)):
        expected = loss(student, teacher, batch["labels"])
        torch.testing.assert_close(base_method(name)(_out(student), _out(teacher), batch), expected)


# --- DistiLLM-2 --------------------------------------------------------------------------------------------------

LABELS = torch.tensor(
    [
        [IGNORED, IGNORED, 1, 2],  # chosen, two tokens
        [IGNORED, IGNORED, IGNORED, 0],  # chosen, one
        [IGNORED, 2, 1, 0],  # rejected, three
        [IGNORED, IGNORED, 0, IGNORED],  # rejected, one
    ]
)


def _pairs() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 4, 4, 3).double()
    return student.requires_grad_(), teacher


def _plain_distillm2(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, alphas: Any = (0.1,) * 4, detach: bool = True
) -> Tensor:
    """Row by row, as math.md has it."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row, a in enumerate(alphas):
        at = [j for j in range(3) if LABELS[row, j + 1] != IGNORED]  # position j predicts label j + 1
        mixed = q.detach() if detach else q
        if row < 2:
            values = _kl(p[row, at], a * p[row, at] + (1 - a) * q[row, at])
            total = total + (2 - beta) * values.mean()
        else:
            values = _kl(q[row, at], (1 - a) * p[row, at] + a * mixed[row, at])
            total = total + beta * values.mean()
    return total / 2


@pytest.mark.parametrize(("beta", "detach"), [(1.0, True), (0.6, False)])
def test_distillm2_is_the_mean_over_pairs_of_token_means(beta: float, detach: bool) -> None:
    student, teacher = _pairs()
    loss = DistiLLM2(beta=beta, detach_mixture=detach)(_out(student), _out(teacher), {"labels": LABELS})
    expected = _plain_distillm2(student, teacher, beta=beta, detach=detach)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))


def test_distillm2_by_hand() -> None:
    # two words; q = (3/4, 1/4) and p = (1/2, 1/2) wherever a label counts: the mixtures are the same two numbers
    student = torch.tensor([3.0, 1.0]).double().log().expand(2, 2, 2)
    teacher = torch.zeros(2, 2, 2).double()
    labels = torch.tensor([[IGNORED, 1], [IGNORED, 0]])
    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.75, 0.25]).double()
    chosen = (p * (p / torch.tensor([0.725, 0.275]).double()).log()).sum()  # 0.1 p + 0.9 q
    rejected = (q * (q / torch.tensor([0.525, 0.475]).double()).log()).sum()  # 0.9 p + 0.1 q
    method = DistiLLM2(beta=0.5)
    torch.testing.assert_close(method(_out(student), _out(teacher), {"labels": labels}), 1.5 * chosen + 0.5 * rejected)


def test_distillm2_gradcheck() -> None:
    student, teacher = _pairs()
    for method in (DistiLLM2(detach_mixture=False), DistiLLM2(detach_mixture=False, beta=1.7, alpha=0.3)):
        assert torch.autograd.gradcheck(lambda s, m=method: m(_out(s), _out(teacher), {"labels": LABELS}), student)


def test_beta_grows_with_the_progress() -> None:
    method = DistiLLM2(growing_beta=True)
    for progress, beta in ((0.0, 1.0), (0.25, 1.25), (0.5, 1.5), (0.9, 1.5)):
        method.progress = progress
        assert method.beta == pytest.approx(beta)


def test_adaptive_alpha_by_its_formula() -> None:
    student, teacher = _pairs()
    log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)

    def mean(log: Tensor, row: int) -> Tensor:
        at = [j for j in range(3) if LABELS[row, j + 1] != IGNORED]
        return torch.stack([log[row, j, LABELS[row, j + 1]] for j in at]).mean()

    gaps = [(mean(log_p, row).exp() - mean(log_q, row).exp()) * (1 if row < 2 else -1) for row in range(4)]
    anchors = [sum(gaps[:2]) / 2] * 2 + [sum(gaps[2:]) / 2] * 2
    alphas = [
        float((1 - 0.9 * anchor / (gap + 1e-5)).clamp(0.01, 0.1)) for gap, anchor in zip(gaps, anchors, strict=True)
    ]
    assert len({round(alpha, 4) for alpha in alphas}) > 1
    method = DistiLLM2(adaptive_alpha=True, anchor_steps=2)
    batch = {"labels": LABELS}
    first = method(_out(student), _out(teacher), batch)
    torch.testing.assert_close(first, _plain_distillm2(student, teacher))  # the mean is not known yet
    second = method(_out(student), _out(teacher), batch)
    torch.testing.assert_close(second, _plain_distillm2(student, teacher, alphas=alphas))
    kept = DistiLLM2(adaptive_alpha=True, anchor_steps=2)
    kept.load_state_dict(method.state_dict())
    torch.testing.assert_close(kept(_out(student), _out(teacher), batch), second)


def test_evaluation_does_not_move_the_anchor() -> None:
    student, teacher = _pairs()
    method = DistiLLM2(adaptive_alpha=True, anchor_steps=1)
    with torch.no_grad():
        method(_out(student), _out(teacher), {"labels": LABELS})
    assert method.state_dict()["seen"] == 0


def test_distillm2_refuses_what_is_no_pair() -> None:
    student, teacher = torch.randn(2, 3, 4, 3)
    with pytest.raises(InputError, match="as many rejected rows as chosen ones, got 3 rows"):
        DistiLLM2()(_out(student), _out(teacher), {"labels": LABELS[:3]})
    with pytest.raises(InputError, match="'chosen' and 'rejected', got .*'output'"):
        PairCollator(None)([{"prompt": "a", "output": "b"}])  # type: ignore[arg-type]  # it is not reached
    for options, message in (({"beta": 3}, "beta: expected"), ({"alpha": 1}, "alpha"), ({"anchor_steps": 0}, "anchor")):
        with pytest.raises(InputError, match=message):
            DistiLLM2(**options)


def test_pair_collator_orders_and_renames() -> None:
    seen: list[Any] = []
    PairCollator(seen.append)(  # type: ignore[arg-type]  # what it is given is looked at
        [
            {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_word_spans": [[0, 1]], "rejected_word_spans": []},
            {"prompt": "P", "chosen": "C", "rejected": "R", "chosen_word_spans": [[1, 2]], "rejected_word_spans": []},
        ]
    )
    assert [row["output"] for row in seen[0]] == ["c", "C", "r", "R"]
    assert seen[0][1] == {"prompt": "P", "output": "C", "word_spans": [[1, 2]]}


# --- DistiLLM ----------------------------------------------------------------------------------------------------


class _Numbers:
    """Random numbers that were chosen."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = list(numbers)

    def random(self) -> float:
        return self._numbers.pop(0)


@pytest.mark.parametrize(
    ("schedule", "progress", "sources"),
    [  # f = 0.8, U = 0.1, 0.3, 0.5, 0.7, 0.9, the buffer full
        ("decreasing", 0.0, ["student"] * 4 + ["data"]),
        ("decreasing", 0.5, ["student", "student", "replay", "replay", "data"]),
        ("constant", 0.9, ["student", "student", "replay", "replay", "data"]),
        ("increasing", 0.25, ["student", "replay", "replay", "replay", "data"]),
    ],
)
def test_where_a_batch_comes_from(schedule: str, progress: float, sources: list[str]) -> None:
    method = DistiLLM(schedule=schedule, threshold=0.8, capacity=1)
    method.replay.append({"prompt": "p", "output": "o"})
    method.progress = progress
    method._random = _Numbers(0.1, 0.3, 0.5, 0.7, 0.9)  # type: ignore[assignment]  # a stand-in
    assert [method.next_source() for _ in sources] == sources


def test_the_student_writes_until_the_buffer_is_full() -> None:
    method = DistiLLM(threshold=0.5, capacity=2)
    method.progress = 1.0
    method._random = _Numbers(0.4, 0.6, 0.4)  # type: ignore[assignment]  # a stand-in
    assert [method.next_source() for _ in range(2)] == ["student", "data"]
    method.replay.extend([{"output": "1"}, {"output": "2"}, {"output": "3"}])
    assert [row["output"] for row in method.replay] == ["2", "3"]
    assert method.next_source() == "replay"


def test_the_threshold_follows_the_validation_loss() -> None:
    method = DistiLLM(threshold=0.85)
    thresholds = []
    for loss in (1.0, 1.05, 1.1, 1.15, 1.3, 1.5):  # kept at first; 1.1 is 0.1 above it, 1.3 above 1.1, 1.5 above 1.3
        method.observe_validation(loss)
        thresholds.append(round(method.threshold, 4))
    assert thresholds == [0.85, 0.85, 0.95, 0.95, 1.0, 1.0]
    assert method.kept_loss == 1.5


def test_the_state_of_distillm_goes_on() -> None:
    one, other = DistiLLM(threshold=0.5, capacity=3), DistiLLM(threshold=0.1, capacity=3, seed=7)
    one.replay.extend({"prompt": str(i), "output": "o"} for i in range(3))
    one.observe_validation(2.0)
    one.next_source()
    import json

    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (other.threshold, other.kept_loss, list(other.replay)) == (0.5, 2.0, list(one.replay))
    assert [one.next_source() for _ in range(20)] == [other.next_source() for _ in range(20)]
    assert one.replayed(2) == other.replayed(2)


def test_replayed_rows_are_drawn_without_repeats_where_there_are_enough() -> None:
    method = DistiLLM(capacity=8)
    method.replay.extend({"output": str(i)} for i in range(4))
    assert len({row["output"] for row in method.replayed(4)}) == 4
    assert len(method.replayed(6)) == 6


def test_distillm_refuses_bad_settings() -> None:
    for options, message in (
        ({"schedule": "decreasin"}, "got 'decreasin', did you mean 'decreasing'"),
        ({"threshold": 1.5}, "threshold: expected"),
        ({"capacity": 0}, "capacity: expected"),
        ({"validation_loss": "srkl"}, "validation_loss: expected one of base, cross_entropy, got 'srkl'"),
        ({"count_step": 1}, "count_step: expected true or false, got 1"),
        ({"alpha": 7.0}, "alpha: expected a number between 0 and 1, got 7.0"),
        ({"loss": "forward_kl"}, "loss: expected one of srkl, skl, got 'forward_kl'"),
    ):
        with pytest.raises(InputError, match=message):
            DistiLLM(**options)


# --- FDD ---------------------------------------------------------------------------------------------------------


def _head(model: Any, family: str, state: Tensor, last: bool) -> Tensor:
    if family == "opt-350m" and not last:
        state = model.model.decoder.project_out(state)
    return model.lm_head(state)


def _plain_fdd(models: Any, family: str, outs: Any, pairs: Any, mask: Tensor, tau: float) -> Tensor:
    """All logits at once, as math.md has it."""
    kept = mask.bool()
    u = [
        [_head(models[i], family, outs[i].hidden_states[pair[i]], pair[i] == (4, 6)[i])[kept] for pair in pairs]
        for i in (0, 1)
    ]
    trajectory = [_kl((t / tau).softmax(-1), (s / tau).softmax(-1)).mean() for s, t in zip(*u, strict=True)]
    log_s, log_t = ([F.log_softmax(state, -1) for state in side] for side in u)
    derivative = [
        (1 - F.cosine_similarity(log_t[k] - log_t[k - 1], log_s[k] - log_s[k - 1], dim=-1)).mean()
        for k in range(1, len(pairs))
    ]
    total = torch.stack(trajectory).mean()
    return total + torch.stack(derivative).mean() if derivative else total


def _models(family: str) -> tuple[Any, Any]:
    return make_model(family, 4).double(), make_model(family, 6, width=48).double().requires_grad_(False)


def _batch() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    ids = torch.randint(1, 60, (2, 6))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


@pytest.mark.parametrize("family", ["gpt2", "opt", "opt-350m", "qwen2"])
@pytest.mark.parametrize("pairs", [[(2, 3), (3, 5), (4, 6)], [(2, 3)]])
def test_fdd_equals_all_logits_at_once(family: str, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models, batch = _models(family), _batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outs = [model(**inputs, output_hidden_states=True) for model in models]
    expected = _plain_fdd(models, family, outs, pairs, batch["attention_mask"], 2.0)
    expected = expected + skewed_reverse_kl(outs[0].logits, outs[1].logits, batch["labels"])
    parameters = [p for p in models[0].parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    for budget in (1 << 24, 64 * 2 * len(pairs) * 3):  # in one piece; in pieces of three tokens
        monkeypatch.setattr(fdd, "LOGIT_BUDGET", budget)
        loss = FDD(pairs, tau=2.0).attach(*models)(outs[0], outs[1], batch)
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_fdd_gradcheck() -> None:
    heads = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    student, teacher = torch.randn(2, 5, 3).double().requires_grad_(), torch.randn(2, 5, 4).double()

    def loss(states: Tensor) -> Tensor:
        return fdd.feature_dynamics(
            states, teacher, lambda h: h @ heads[0].T, lambda h: h @ heads[1].T, tau=2.0, vocabulary=7
        )

    assert torch.autograd.gradcheck(loss, student)


def test_fdd_keeps_no_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens = 300, 64
    monkeypatch.setattr(fdd, "LOGIT_BUDGET", 2 * 2 * vocabulary * 8)  # eight tokens
    kept = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel() * (value.shape[-1:] == (vocabulary,))
        return value

    states = torch.randn(2, tokens, 4, requires_grad=True)
    matrix = torch.randn(4, vocabulary)

    def head(h: Tensor) -> Tensor:
        return h @ matrix

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        total = fdd.feature_dynamics(states, states.detach(), head, head, tau=1.0, vocabulary=vocabulary)
    assert kept == 0
    total.backward()
    assert states.grad is not None


def _read(model: Any, inputs: Any) -> Any:
    """Its pass without logits, as the trainer makes it."""
    head = take_apart(model)
    assert isinstance(head, LMHead)
    with deferring_logits(head) as read:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    return SimpleNamespace(hidden_states=hidden, head=read)


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "gemma2", "cohere", "granite"])
def test_fdds_last_distribution_is_the_models(family: str) -> None:
    """Its own logits, which are softcapped or scaled, on both paths; a student's gradient too."""
    student, teacher = models = [make_model(family).eval() for _ in range(2)]
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data += torch.randn_like(parameter) / 5  # logits that a softcap bends
    batch = _batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outs = [model(**inputs, output_hidden_states=True) for model in (student, teacher)]
    q, p = ((out.logits[batch["attention_mask"].bool()] / 3).softmax(-1) for out in outs)
    expected = _kl(p.detach(), q).sum()
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True, retain_graph=True)
    method = FDD([(4, 4)], tau=3.0).attach(student, teacher)
    for found in (outs, [_read(model, inputs) for model in (student, teacher)]):
        made = method.sums(*found, batch)[1]
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(made, parameters, allow_unused=True, retain_graph=True)
        for got, true in zip(grads, wanted, strict=True):
            assert got is None if true is None else (got - true).norm() <= 1e-4 * true.norm() + 1e-5


@pytest.mark.parametrize("family", ["opt-350m", "gemma2", "granite"])
def test_fdd_through_the_heads_is_fdd_of_logits(family: str) -> None:
    models = [make_model(name).double().eval() for name in (family, "cohere")]
    batch = _batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    method = FDD([(1, 2), (3, 3), (4, 4)]).attach(*models)
    plain = method(*(model(**inputs, output_hidden_states=True) for model in models), batch)
    read = method(*(_read(model, inputs) for model in models), batch)
    torch.testing.assert_close(read, plain)
    parameters = list(models[0].parameters())
    for got, true in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (read, plain)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", ["skl", "srkl", "distillm", "distillm2", "fdd"])
def test_a_mixture_of_one_side_is_refused(name: str, alpha: float) -> None:
    with pytest.raises(InputError, match=f"alpha: expected a number between 0 and 1, got {alpha}"):
        base_method(name, alpha=alpha)


@pytest.mark.parametrize("name", ["skl", "distillm", "fdd"])
def test_a_detached_skl_is_refused_as_it_has_no_gradient(name: str) -> None:
    options = {} if name == "skl" else {"loss": "skl"}
    with pytest.raises(InputError, match="detach_mixture: expected False with skl, got True: detached it has no grad"):
        base_method(name, detach_mixture=True, **options)
    base_method(name, **options)
    base_method("srkl" if name == "skl" else name, detach_mixture=True)


def test_fdd_refuses_what_it_cannot_map() -> None:
    with pytest.raises(InputError, match="FDD: expected layer_pairs, got none"):
        FDD().attach(*_models("gpt2"))
    with pytest.raises(InputError, match="expected student layers up to its depth 4, got"):
        FDD([(5, 6)]).attach(*_models("gpt2"))
    with pytest.raises(InputError, match="tau: expected a temperature > 0"):
        FDD(tau=0)
    with pytest.raises(InputError, match="call attach"):
        FDD([(4, 6)])(_out(torch.randn(1, 2, 3)), _out(torch.randn(1, 2, 3)), {"attention_mask": torch.ones(1, 2)})
