"""LM heads taken apart: the base losses of states and heads are those of the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from torch import nn
from training import make_pairs, make_rows, make_trainer

from mta_fast import SpanExtractor
from mta_fast.distill.heads import LMHead, deferring_logits, take_apart

pytestmark = pytest.mark.filterwarnings("ignore:labels:UserWarning")

FAMILIES = ["gpt2", "opt", "opt-350m", "llama", "qwen2", "mistral", "gptj", "gemma2", "cohere", "granite"]
METHODS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("srkl", "skl", "forward_kl", "reverse_kl", "jsd", "cross_entropy")),
    ("srkl", {"detach_mixture": True, "alpha": 0.3}),
    ("distillm", {"loss": "skl"}),
    ("distillm2", {}),
    ("distillm2", {"growing_beta": True, "detach_mixture": False}),
    ("distillm2", {"adaptive_alpha": True, "anchor_steps": 1}),
    ("fdd", {}),
]


def _model(family: str, vocabulary: int) -> Any:
    import transformers as tf

    kinds = {
        "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "head_dim": 16}),
        "cohere": (tf.CohereConfig, tf.CohereForCausalLM, {"logit_scale": 0.25}),
        "granite": (tf.GraniteConfig, tf.GraniteForCausalLM, {"logits_scaling": 4.0}),
    }
    if family not in kinds:
        return make_model(family, vocabulary=vocabulary)
    config, model, own = kinds[family]
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return model(config(vocab_size=vocabulary, num_key_value_heads=2, **sizes, **ends, **own))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_makes_the_models_logits(family: str) -> None:
    model = _model(family, 64).eval()
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
    torch.testing.assert_close(model(ids).logits, expected)  # the hooks are gone


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
    assert fused._module.head is not None
    assert plain._module.head is None
    monkeypatch.setattr(LMHead, "logits", lambda *_: pytest.fail("the logits were made"))
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert (left - right).norm() <= 5e-5 * right.norm() + 1e-6


def _flat(found: tuple[list[torch.Tensor], dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [*found[0], *(found[1][name] for name in sorted(found[1]))]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    size = len(make_tokenizer())
    models = {"student": _model(family, size), "teacher": _model("gemma2", size), "mta": None}
    fused, plain = _both(tmp_path, **models)
    assert fused._module.head is not None
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert (left - right).norm() <= 5e-5 * right.norm() + 1e-6


def test_padded_vocabularies(tmp_path: Path) -> None:
    size = len(make_tokenizer())
    models = {"student": make_model("gpt2", vocabulary=size + 8), "teacher": make_model("llama", vocabulary=size + 3)}
    fused, plain = _both(tmp_path, mta=None, **models)
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert (left - right).norm() <= 5e-5 * right.norm() + 1e-6


def test_mta_alone_makes_no_logits(tmp_path: Path) -> None:
    fused, plain = _both(tmp_path, method=lambda: None)
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert torch.equal(left, right)


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


@pytest.mark.parametrize(
    ("change", "why"),
    [(_cut, "its logits are not its head's"), (_with_own_head, "its head is a _OwnHead, not a Linear")],
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
    for left, right in zip(*(_flat(_losses(trainer)) for trainer in (fused, plain)), strict=True):
        assert (left - right).norm() <= 5e-5 * right.norm() + 1e-6
