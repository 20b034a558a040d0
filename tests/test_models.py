"""Loading models, and what two vocabularies share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, make_model, make_tokenizer

pytest.importorskip("transformers")

from mta_fast.distill.models import (
    common_vocabulary,
    cut_layers,
    load_model,
    load_tokenizer,
    model_files,
    same_vocabulary,
)
from mta_fast.errors import InputError, MissingPackageError


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
