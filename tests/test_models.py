"""Loading models, what two vocabularies share, and students cut from a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, make_model, make_tokenizer

pytest.importorskip("transformers")

from mta_fast.distill.models import (
    common_vocabulary,
    cut_layers,
    load_model,
    load_tokenizer,
    model_files,
    parse_layers,
    same_vocabulary,
)
from mta_fast.distill.training.checkpoints import export_student
from mta_fast.errors import InputError, MissingPackageError

TOKENS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_layers(family: str) -> None:
    teacher = make_model(family).eval()
    whole = cut_layers(teacher, LAYERS).eval()
    assert torch.equal(whole(TOKENS).logits, teacher(TOKENS).logits)
    two = cut_layers(teacher, [0, 3]).eval()
    assert two.config.num_hidden_layers == 2
    names = [name for name, _ in teacher.named_modules() if name.endswith(".3")]
    (last,) = [name for name in names if name.count(".") == min(n.count(".") for n in names)]
    moved = two.get_submodule(f"{last.rpartition('.')[0]}.1").state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in teacher.get_submodule(last).state_dict().items())
    with torch.no_grad():  # no memory is shared
        for parameter in two.parameters():
            parameter.zero_()
    assert teacher(TOKENS).logits.abs().max() > 0
    assert two(TOKENS).logits.shape == teacher(TOKENS).logits.shape


def test_a_cut_student_is_saved_and_loaded(tmp_path: Path) -> None:
    make_model("qwen2", layers=6).save_pretrained(tmp_path / "teacher")
    teacher = load_model(str(tmp_path / "teacher"), dtype="bfloat16")
    before = torch.get_rng_state()
    student = cut_layers(teacher, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert len(student.config.layer_types) == 3
    export_student(student, make_tokenizer(), tmp_path / "student")
    loaded = load_model(str(tmp_path / "student"), dtype="bfloat16")
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(TOKENS).logits, student(TOKENS).logits)
    assert load_tokenizer(str(tmp_path / "student")).get_vocab() == make_tokenizer().get_vocab()


def _uneven(family: str) -> Any:
    """A random model of six blocks that are not alike."""
    import transformers as tf

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    wide = {"intermediate_size": 64, "num_key_value_heads": 2}
    experts = wide | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    if family == "gemma2":
        kinds = ["sliding_attention", "full_attention", "full_attention"] * 2
        config: Any = tf.Gemma2Config(**sizes, **wide, head_dim=16, sliding_window=3, layer_types=kinds)
        return tf.Gemma2ForCausalLM(config).eval()
    if family == "gpt_neo":
        del sizes["num_hidden_layers"], sizes["num_attention_heads"]
        kinds = [[["global", "local"], 3]]
        return tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(**sizes, num_layers=6, num_heads=2, window_size=3, attention_types=kinds)
        ).eval()
    if family == "deepseek_v3":
        ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3}
        return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes, **experts, **ranks, **groups)).eval()
    if family in ("qwen2_moe", "qwen2_moe every second"):
        dense = {"mlp_only_layers": [1, 2]} if family == "qwen2_moe" else {"decoder_sparse_step": 2}
        config = tf.Qwen2MoeConfig(**sizes, **experts, **dense, num_experts=4, shared_expert_intermediate_size=16)
        return tf.Qwen2MoeForCausalLM(config).eval()
    if family == "diffllama":
        return tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**sizes, **wide)).eval()
    config = tf.GPT2Config(n_layer=6, n_embd=32, n_head=2, vocab_size=64, scale_attn_by_inverse_layer_idx=True)
    return tf.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("family", "field", "cut"),
    [
        ("gemma2", "layer_types", ["sliding_attention", "full_attention", "full_attention"]),
        ("gpt_neo", "attention_layers", ["global", "global", "local"]),
        ("deepseek_v3", "first_k_dense_replace", 2),
        ("qwen2_moe", "mlp_only_layers", [1]),
    ],
)
def test_blocks_that_differ_are_cut_with_what_the_config_says_of_them(
    family: str, field: str, cut: Any, tmp_path: Path
) -> None:
    teacher = _uneven(family)
    student = cut_layers(teacher, [0, 2, 5]).eval()
    assert getattr(student.config, field) == cut
    student.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(TOKENS).logits, student(TOKENS).logits)
    # all blocks: the teacher
    assert torch.equal(cut_layers(teacher, 6).eval()(TOKENS).logits, teacher(TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_moe every second", "blocks of another kind would stand in their places"),
        ("diffllama", "block 2 would be built otherwise as block 1"),
        ("gpt2 by number", "block 2 "),
    ],
)
def test_blocks_that_their_number_makes_are_refused(family: str, reason: str) -> None:
    teacher = _uneven(family)
    with pytest.raises(
        InputError, match=rf"layers: expected blocks that .* can be made of, got 0, 2, 5 of 6: {reason}"
    ):
        cut_layers(teacher, [0, 2, 5])
    first = cut_layers(teacher, [0, 1, 2])
    assert first.config.num_hidden_layers == 3


def test_the_depth_of_a_decoder() -> None:
    import transformers as tf

    from mta_fast.layers import depth_of

    assert depth_of(tf.T5Config(num_layers=2, num_decoder_layers=5)) == 5
    assert depth_of(tf.BartConfig(encoder_layers=2, decoder_layers=3)) == 3
    assert depth_of(tf.GPT2Config(n_layer=7)) == 7


def test_models_of_another_kind_are_refused_by_their_config(tmp_path: Path) -> None:
    import transformers as tf

    for config, words in (
        (tf.T5Config(), r"got an encoder-decoder \(T5Config\)"),
        (tf.ViTConfig(), r"got one of another kind \(ViTConfig\)"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"expected a causal language model, {words}"):
            load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("count", "depth", "kept"), [(10, 30, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (1, 4, [3]), (3, 4, [0, 2, 3])]
)
def test_layers_are_spread_with_both_ends(count: int, depth: int, kept: list[int]) -> None:
    teacher = make_model("gpt2", layers=depth)
    blocks = [block.mlp.c_fc.weight for block in cut_layers(teacher, count).transformer.h]
    assert all(torch.equal(a, teacher.transformer.h[i].mlp.c_fc.weight) for a, i in zip(blocks, kept, strict=True))
    assert len(blocks) == count


@pytest.mark.parametrize("layers", [0, 5, [], [1, 1], [3, 1], [4], [-1]])
def test_layers_that_are_none(layers: int | list[int]) -> None:
    with pytest.raises(InputError, match="layers: expected 1 to 4"):
        cut_layers(make_model("gpt2"), layers)


def test_layers_from_the_command_line() -> None:
    assert parse_layers("10") == 10
    assert parse_layers("0,4, 9") == [0, 4, 9]
    with pytest.raises(InputError, match="layers: expected a number or numbers such as 0,4,9, got 'ten'"):
        parse_layers("ten")


def _write_gguf(path: Path, model: Any) -> None:
    """A small Llama as a GGUF file, its square matrices quantised."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        array = value.detach().numpy()
        kept = array.ndim == 2 and "layers" in name
        data = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0) if kept else array
        raw = gguf.GGMLQuantizationType.Q8_0 if kept else None
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_inside_a_package_is_a_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_model("llama")
    package = tmp_path / "gguf_models_for_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    _write_gguf(package / "small.gguf", original)
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = load_model("package:gguf_models_for_tests")
    assert len(teacher.model.layers) == LAYERS
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    norm = teacher.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(norm, original.model.layers[0].input_layernorm.weight)
    # neither it nor a student cut from it is marked as quantised: both can be saved, loaded and saved again
    cut_layers(teacher, 2).save_pretrained(tmp_path / "student")
    student = load_model(str(tmp_path / "student"))
    student.save_pretrained(tmp_path / "again")
    teacher.save_pretrained(tmp_path / "teacher")
    assert "quantization_config" not in (tmp_path / "student/config.json").read_text()


def test_vocabularies() -> None:
    one, other = make_tokenizer(), make_tokenizer(300)
    assert same_vocabulary(one, one)
    assert not same_vocabulary(one, other)
    size = len(one)
    student, teacher = make_model("gpt2", vocabulary=size + 3), make_model("llama", vocabulary=size + 5)
    assert common_vocabulary(student, teacher, one) == size + 3
    with pytest.raises(
        InputError, match=f"student: expected logits for the tokenizer's {size} tokens, it has {size - 1}"
    ):
        common_vocabulary(make_model("gpt2", vocabulary=size - 1), teacher, one)


def test_errors_name_expected_and_received(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        load_model("x", dtype="int8")
    with pytest.raises(
        MissingPackageError, match="expected the Python package 'no_such_models' .*pip install no-such-models"
    ):
        load_model("package:no_such_models")
    with pytest.raises(InputError, match="expected config.json or one .gguf file in .* got 0 of them"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="expected a causal language model"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="tokenizer of .*expected one beside the model"):
        load_tokenizer(str(tmp_path))


def test_files_tell_a_model_only_where_its_weights_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_files(str(tmp_path)) == []
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    assert [file.name for file in model_files(str(tmp_path))] == ["config.json", "model-1.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_files(str(tmp_path)) == []
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    assert len(model_files(str(tmp_path))) == 4
