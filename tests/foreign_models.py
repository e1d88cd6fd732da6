"""Models not written here, small and random: transformers' and PyTorch's own."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

# Nothing here is downloaded; this makes a mistake an error at once instead of a slow one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

transformers.logging.set_verbosity_error()

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 128, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 2, **changes}))


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config)


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **NO_DROPOUT))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, **NO_DROPOUT, image_size=16, patch_size=4, num_labels=8)
    return transformers.ViTForImageClassification(config)


def batch(model: nn.Module) -> dict[str, Tensor]:
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(16, 3, 16, 16), "labels": torch.randint(8, (16,))}
    tokens = torch.randint(128, (8, 32))
    return {"input_ids": tokens, "labels": tokens}


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
