"""Tiny random models of every family, of sizes that divide nothing: 6 heads over 2 KV heads, an intermediate size that
no number of ranks or vector register divides, a vocabulary of 100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 100
WINDOW = 8  # mistral's, shorter than the prompts
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 102,  # transformers wants a multiple of the heads
    "intermediate_size": 349,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # so that the logits spread, as a trained model's do
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}


def _randomize(model: PreTrainedModel) -> None:
    """Give biases and norms values of their own: transformers starts them at 0 and 1, which hides their misuse."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))


def write_tiny(directory: Path, family: str, dtype: torch.dtype = torch.float16) -> Path:
    """Save a tiny model of a family as ordinary files, in fp16, and return its directory."""
    config_cls, model_cls, changes = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    model = model_cls(config_cls(**COMMON | changes)).eval()
    _randomize(model)
    model.to(dtype).save_pretrained(directory / family)
    return directory / family


def write_stranger(directory: Path) -> Path:
    """Save a tiny model of a family that is not known (its Linears are Conv1D), in fp32."""
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=96, n_layer=2, n_head=3, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    _randomize(model)
    model.save_pretrained(directory / "gpt2")
    return directory / "gpt2"
