"""LM heads taken apart: the base losses of states and heads are those of the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES as PLAIN
from models import SCALED, make_model, make_tokenizer
from torch import nn
from training import make_pairs, make_rows, make_trainer

from mta_fast import SpanExtractor
from mta_fast.distill.heads import HeadStates, LMHead, deferring_logits, take_apart

pytestmark = pytest.mark.filterwarnings("ignore:labels:UserWarning")

FAMILIES = [*PLAIN, *SCALED]
METHODS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("srkl", "skl", "forward_kl", "reverse_kl", "jsd", "cross_entropy")),
    ("srkl", {"detach_mixture": True, "alpha": 0.3}),
    ("distillm", {"loss": "skl", "threshold": 0.0, "increase": 0.0}),
    ("distillm2", {}),
    ("distillm2", {"growing_beta": True, "detach_mixture": False}),
    ("distillm2", {"adaptive_alpha": True, "anchor_steps": 1}),
    ("fdd", {}),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_makes_the_models_logits(family: str) -> None:
    model = make_model(family).eval()
    head = take_apart(model)
    assert isinstance(head, LMHead), head
    assert (head.softcap, head.scale) == {"gemma2": (3.0, 1.0), "cohere": (None, 0.25), "granite": (None, 0.25)}.get(
        family, (None, 1.0)
    )
    ids = torch.randint(0, 64, (2, 9))
    expected = model(ids).logits
    with deferring_logits(head, 60) as read:
        assert model(ids).logits.shape == (2, 1, 64)
    torch.testing.assert_close(read.logits(), expected[..., :60])
    torch.testing.assert_close(model(ids).logits, expected)  # the head is called again


def _losses(trainer: Any, batches: int = 2) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The loss of some batches and the gradient of their sum."""
    made = []
    trainer.model.train()
    for batch, _ in zip(trainer.get_train_dataloader(), range(batches), strict=False):
        output = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        output.backward()
        made.append(output.detach())
    named = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return made, named


def _both(tmp_path: Path, method: Callable[[], Any] = lambda: "srkl", **options: Any) -> tuple[Any, Any]:
    made = [
        make_trainer(tmp_path / str(fused), fused_head=fused, base_loss=method(), **options) for fused in (True, False)
    ]
    return made[0], made[1]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_a_methods_loss_and_gradient_are_those_of_the_logits(
    tmp_path: Path, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mta_fast.distill.methods.registry import base_method

    rows = make_pairs(make_rows()) if method == "distillm2" else make_rows()
    fused, plain = _both(
        tmp_path, method=lambda: base_method(method, **options), rows=rows, span_extractor=SpanExtractor()
    )
    monkeypatch.setattr(HeadStates, "logits", lambda *_: pytest.fail("the logits were made"))
    _assert_alike(fused, plain)


def _flat(found: tuple[list[torch.Tensor], dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [*found[0], *(found[1][name] for name in sorted(found[1]))]


def _assert_alike(fused: Any, plain: Any) -> None:
    assert fused._module.head is not None
    assert plain._module.head is None
    found, expected = (_losses(trainer) for trainer in (fused, plain))
    assert found[1].keys() == expected[1].keys()
    for left, right in zip(_flat(found), _flat(expected), strict=True):
        assert (left - right).norm() <= 5e-5 * right.norm() + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    size = len(make_tokenizer())
    models = {
        "student": make_model(family, vocabulary=size),
        "teacher": make_model("gemma2", vocabulary=size),
        "mta": None,
    }
    fused, plain = _both(tmp_path, **models)
    _assert_alike(fused, plain)


def test_padded_vocabularies(tmp_path: Path) -> None:
    size = len(make_tokenizer())
    models = {"student": make_model("gpt2", vocabulary=size + 8), "teacher": make_model("llama", vocabulary=size + 3)}
    fused, plain = _both(tmp_path, mta=None, **models)
    _assert_alike(fused, plain)


def test_mta_alone_makes_no_logits(tmp_path: Path) -> None:
    fused, plain = _both(tmp_path, method=lambda: None)
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert torch.equal(left, right)


# --- adapters on the head ----------------------------------------------------------------------------------------


def _adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = make_model("llama", vocabulary=len(make_tokenizer()))
    targets = {} if "modules_to_save" in options else {"target_modules": ["q_proj", "lm_head"]}
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets, **options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # 0 at the start
            torch.nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data *= 1.3
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    fused, plain = (
        make_trainer(tmp_path / str(fused), fused_head=fused, student=_adapted(**options)) for fused in (True, False)
    )
    _assert_alike(fused, plain)
    learnt = [name for name in _losses(fused)[1] if "lm_head" in name]
    assert learnt


def test_two_adapters_and_none(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _adapted()
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "more"])
    ids = torch.randint(0, 64, (2, 5))
    head = take_apart(model)
    assert isinstance(head, LMHead), head
    for context in (nullcontext, model.disable_adapter):
        with context():
            states = model.get_base_model().model(ids).last_hidden_state
            made = head.call(states, torch.nn.functional.linear)
            torch.testing.assert_close(made, model(ids).logits, rtol=1e-5, atol=1e-5)


# --- heads that stay whole ---------------------------------------------------------------------------------------


def _cut(model: Any) -> Any:
    """A head that something else is done to."""
    inner = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = inner(*args, **options)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward
    return model


class _OwnHead(nn.Linear):
    """A Linear of one's own."""


def _with_own_head(model: Any) -> Any:
    model.lm_head = _OwnHead(32, model.config.vocab_size, bias=False)
    return model


def _without_a_call(model: Any) -> Any:
    """A head whose weight is read past its module."""
    inner = model.model.forward

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        output = inner(input_ids=input_ids, attention_mask=options.get("attention_mask"))
        logits = torch.nn.functional.linear(output.last_hidden_state, model.lm_head.weight)
        return type("Output", (), {"logits": logits})()

    model.forward = forward
    return model


def _with_dropout(_model: Any) -> Any:
    return _adapted(lora_dropout=0.1)


def _capped(model: Any) -> Any:
    """A softcap that no config names, far above the logits of a model at its start."""
    inner = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = inner(*args, **options)
        output.logits = 50 * (output.logits / 50).tanh()
        return output

    model.forward = forward
    return model


def _with_forward(model: Any) -> Any:
    inner = model.lm_head.forward
    model.lm_head.forward = lambda states: inner(states)
    return model


def _failing(model: Any) -> Any:
    """A model that refuses the probe's few tokens."""
    inner = model.forward

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[1] < 8:
            raise ValueError("too few tokens")
        return inner(input_ids=input_ids, **options)

    model.forward = forward
    return model


def _with_hook(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda _module, _args, output: output)
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_cut, "its logits are not its head's"),
        (_capped, "its logits are not its head's"),
        (_with_own_head, "its head is a _OwnHead, not a Linear"),
        (_without_a_call, "its pass does not call its head"),
        (_with_dropout, "its head has an adapter with dropout"),
        (_with_hook, "its head has hooks"),
        (_failing, "a pass over 4 tokens raised ValueError: too few tokens"),
        (_with_forward, "its head has a forward of its own"),
    ],
)
def test_heads_that_stay_whole_are_told(tmp_path: Path, change: Any, why: str) -> None:
    student = change(make_model("llama", vocabulary=len(make_tokenizer())))
    with pytest.warns(UserWarning, match=f"fused_head: the base loss is made of logits, as student: {why}"):
        trainer = make_trainer(tmp_path, student=student, mta=None)
    assert trainer._module.head is None
    trainer.train()


def test_entropy_weights_read_the_teachers_logits(tmp_path: Path) -> None:
    from dataclasses import replace

    from training import CONFIG

    fused, plain = _both(tmp_path, mta=replace(CONFIG, weighting="entropy"))
    _assert_alike(fused, plain)


# --- half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocasts_gradient_error_is_at_most_twice_that_of_the_logits(tmp_path: Path, dtype: str) -> None:
    """Against the same in float32; fp16 with the factor of a GradScaler, which is divided out again."""
    kinds = {"bf16": (torch.bfloat16, 1.0), "fp16": (torch.float16, 2.0**10)}
    autocast, factor = kinds[dtype]
    fused, plain = _both(tmp_path, mta=None, family="llama")
    exact = torch.cat([gradient.flatten() for gradient in _losses(plain)[1].values()])
    errors = []
    for trainer in (fused, plain):
        trainer.model.train()
        for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False):
            with torch.autocast("cpu", autocast):
                loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
            (loss * factor).backward()
        made = torch.cat([p.grad.flatten() / factor for p in trainer.model.parameters() if p.grad is not None])
        errors.append(float((made - exact).norm() / exact.norm()))
    assert 0 < errors[0] <= 2 * errors[1]
