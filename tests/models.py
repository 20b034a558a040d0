"""Small random language models of every family, and tokenizers trained on the bundled sample."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from mta_fast.distill.data import load_sample

VOCABULARY, LAYERS, WIDTH = 64, 4, 32
SCALED = {  # logits that are capped or scaled
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
FAMILIES = ("gpt2", "opt", "opt-350m", "llama", "qwen2", "mistral", "gptj")


def make_model(family: str, layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY) -> Any:
    """A random model; "opt-350m" has that model's shape: post-norm, embeddings narrower than the blocks."""
    import transformers as tf

    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    common = {"vocab_size": vocabulary, **ends}
    if family in ("gpt2", "gptj"):
        config_class, model_class = {
            "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel),
            "gptj": (tf.GPTJConfig, tf.GPTJForCausalLM),
        }[family]
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        rotary = {"rotary_dim": 4} if family == "gptj" else {}
        config = config_class(n_layer=layers, n_embd=width, n_head=2, **dropout, **rotary, **common)
    elif family.startswith("opt"):
        model_class = tf.OPTForCausalLM
        narrow = family == "opt-350m"
        config = tf.OPTConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            ffn_dim=2 * width,
            num_attention_heads=2,
            word_embed_proj_dim=width // 2 if narrow else width,
            do_layer_norm_before=not narrow,
            dropout=0.0,
            **common,
        )
    else:
        config_class, model_class = {
            "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
            "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
            "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
            "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM),
            "cohere": (tf.CohereConfig, tf.CohereForCausalLM),
            "granite": (tf.GraniteConfig, tf.GraniteForCausalLM),
        }[family]
        config = config_class(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=2,
            num_key_value_heads=2,
            **common,
            **SCALED.get(family, {}),
        )
    model: nn.Module = model_class(config)
    return model


@cache
def make_tokenizer(vocabulary: int = 512) -> Any:
    """A byte-level BPE tokenizer of the bundled sample."""
    from mta_fast.demo import train_tokenizer

    return train_tokenizer([row["prompt"] + row["output"] for row in load_sample()], vocabulary)
