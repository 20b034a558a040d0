"""PEFT students: what is exported computes what the trained student computes, on tied and on quantised weights too."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from training import make_trainer
from transformers import AutoModelForCausalLM

from mta_fast.distill.training import adapters, checkpoints
from mta_fast.errors import InputError

TOKENS = torch.arange(12)[None]


@cache
def _tied(family: str = "llama") -> Any:
    """A small model whose head is its embedding, of a spread that shows in the logits."""
    import transformers as tf

    torch.manual_seed(3)
    size = len(make_tokenizer())
    if family == "gpt2":
        return make_model("gpt2", 2, vocabulary=size)
    config = tf.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=size,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return tf.LlamaForCausalLM(config)


def _adapted(base: Path, *, name: str = "default", **options: Any) -> Any:
    """A student over a saved base whose every trained weight is another than at its start."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)
    student = peft.get_peft_model(model, config, adapter_name=name)
    if name != "default":
        student.add_adapter("idle", peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        student.set_adapter(name)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return student.eval()


KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tied on purpose": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "every linear": {"target_modules": "all-linear"},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "dora": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "rslora": {"target_modules": ["lm_head", "q_proj"], "use_rslora": True},
    "biases": {"target_modules": ["q_proj", "lm_head"], "bias": "all"},
    "another name": {"target_modules": ["lm_head", "q_proj"], "name": "second"},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*merge the adapter")
@pytest.mark.parametrize(("kind", "family"), [*((kind, "llama") for kind in KINDS), ("both", "gpt2")])
def test_exports_of_tied_models_compute_what_the_student_computes(tmp_path: Path, kind: str, family: str) -> None:
    options = dict(KINDS[kind])
    if family == "gpt2":
        options["target_modules"] = ["wte", "lm_head", "c_attn"]
    base = tmp_path / "base"
    _tied(family).save_pretrained(base)
    student = _adapted(base, **options)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    expected = student(TOKENS).logits
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits, atol=1e-2)

    checkpoints.export_student(student, make_tokenizer(), tmp_path / "live")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    adapters.save_adapter(student, checkpoint)
    make_tokenizer().save_pretrained(checkpoint)
    checkpoints.export_checkpoint(checkpoint, tmp_path / "later")
    for folder in ("live", "later"):
        plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        if kind in ("tied on purpose", "whole, tied", "tokens"):
            assert plain.config.tie_word_embeddings
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    again = _adapted(base, **options)
    with torch.no_grad():
        for p in again.parameters():
            p += p.requires_grad
    checkpoints.load_student(checkpoint, again)
    assert torch.equal(again(TOKENS).logits, expected)


def test_a_run_over_a_tied_head_exports_what_it_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    _tied().save_pretrained(base)
    student = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    )
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 0.3}
    trainer = make_trainer(tmp_path / "run", student=student, mta=None, **saving)
    trainer.train()
    trainer.export_student(tmp_path / "live")
    checkpoints.export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "later")
    live, later = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("live", "later"))
    assert live.dtype == later.dtype == torch.bfloat16
    assert all(torch.equal(value, later.state_dict()[name]) for name, value in live.state_dict().items())
    start = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    change = student.eval()(TOKENS).logits.float() - start
    error = live(TOKENS).logits.float() - start - change
    assert error.norm() < 0.1 * change.norm()  # bfloat16
    changed = _tied()
    changed.model.layers[0].mlp.up_proj.weight.data += 1  # the tied head comes with the adapter
    changed.save_pretrained(base)  # what lies there now is another model
    with pytest.raises(InputError, match="the base model that its adapter was trained on, .* has other weights now"):
        checkpoints.export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "other")


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    student = peft.get_peft_model(_tied(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    adapters.save_adapter(student, checkpoint)
    student.unload()
    config = checkpoint / "adapter_config.json"
    assert not json.loads(config.read_text())["base_model_name_or_path"]
    with pytest.raises(InputError, match="adapter_config.json: expected base_model_name_or_path, it names none"):
        checkpoints.export_checkpoint(checkpoint, tmp_path / "out")


# --- quantised bases ---------------------------------------------------------------------------------------------


class _Rounded(nn.Linear):
    """A linear layer whose weight is kept as small integers: what a quantised layer is, without its kernels."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


class _Quantizer:
    """transformers' interface of a quantised model, for ``_Rounded``."""

    def __init__(self, able: bool) -> None:
        self.able = able

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        if not self.able:
            raise NotImplementedError("rounded has no implementation of `dequantize`")
        for module in model.modules():
            if isinstance(module, _Rounded):
                module.__class__ = nn.Linear
                module.weight.data = module.weight.data * module.scale
        model.is_quantized = False
        del model.hf_quantizer  # as transformers does
        return model


def _rounded(able: bool = True) -> Any:
    model = make_model("llama", 2, vocabulary=len(make_tokenizer()))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.__class__ = _Rounded
            module.scale = module.weight.detach().abs().max() / 7
            module.weight.data = (module.weight.data / module.scale).round()
    model.is_quantized, model.hf_quantizer = True, _Quantizer(able)
    return model


def test_adapters_over_quantised_weights_export_plain(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    student = peft.get_peft_model(_rounded(), config).eval()
    expected = student(TOKENS).logits
    checkpoints.export_student(student, make_tokenizer(), tmp_path / "student")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student(TOKENS).logits, expected)
    with pytest.raises(InputError, match="export: expected quantised weights that transformers can dequantise, got: r"):
        checkpoints.export_student(
            peft.get_peft_model(_rounded(able=False), config), make_tokenizer(), tmp_path / "refused"
        )
    assert not (tmp_path / "refused").exists()


def test_a_checkpoint_knows_how_its_base_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitsAndBytesConfig

    from mta_fast.distill import models

    base = _rounded().to(torch.bfloat16)
    base.config._name_or_path = base.name_or_path = "hub/model"
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapters.save_adapter(student, tmp_path)
    seen: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        return _rounded()

    monkeypatch.setattr(models, "load_model", load)
    adapters.load_adapted(tmp_path)
    assert (seen["name"], seen["dtype"]) == ("hub/model", "bfloat16")
    assert isinstance(seen["quantization_config"], BitsAndBytesConfig)
    assert seen["quantization_config"].load_in_4bit
