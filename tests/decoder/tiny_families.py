"""Tiny random models of every family: odd numbers of heads, sizes that no group divides, two layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 100
WINDOW = 8  # shorter than the prompts

_LLAMA: dict[str, Any] = {
    "hidden_size": 102,  # transformers wants a multiple of the heads
    "intermediate_size": 349,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
# Families whose head size is hidden / heads.
_DERIVED = {key: value for key, value in _LLAMA.items() if key != "head_dim"} | {"hidden_size": 192}
_PLAIN = {key: value for key, value in _DERIVED.items() if key != "num_key_value_heads"}
_N_EMBD: dict[str, Any] = {"n_embd": 192, "n_layer": 2, "n_head": 6, "n_positions": 128, "n_inner": 349}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 93}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


@dataclass(frozen=True)
class Tiny:
    """One tiny model: its model_type and what its config says. spread: the standard deviation of its weights."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    moe: bool = False


_LONGROPE = {
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "partial_rotary_factor": 0.5,
    "factor": 8.0,
}

TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama linear": Tiny("llama", _LLAMA | _rope("linear", factor=4.0)),
    "llama dynamic": Tiny("llama", _LLAMA | {"max_position_embeddings": 16} | _rope("dynamic", factor=2.0)),
    "llama llama3": Tiny(
        "llama",
        _LLAMA
        | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama yarn": Tiny("llama", _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral": Tiny("mistral", _LLAMA | {"sliding_window": WINDOW}),
    "qwen2": Tiny("qwen2", _DERIVED | {"tie_word_embeddings": True}),
    "qwen2 window": Tiny(
        "qwen2", _DERIVED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Tiny("qwen3", _LLAMA),
    "phi3": Tiny("phi3", _DERIVED | _rope("default", partial_rotary_factor=0.5)),
    "phi3 longrope": Tiny("phi3", _DERIVED | {"original_max_position_embeddings": 16} | _rope("longrope", **_LONGROPE)),
    "gemma": Tiny("gemma", _LLAMA),
    "gemma2": Tiny("gemma2", _LLAMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "glm": Tiny("glm", _LLAMA | {"attention_bias": True} | _rope("default", partial_rotary_factor=0.5)),
    "glm4": Tiny("glm4", _LLAMA | _rope("default", partial_rotary_factor=0.5)),
    "stablelm": Tiny("stablelm", _DERIVED | {"use_qkv_bias": True} | _rope("default", partial_rotary_factor=0.25)),
    "stablelm parallel": Tiny(
        "stablelm",
        _DERIVED | {"use_parallel_residual": True, "qk_layernorm": True} | _rope("default", partial_rotary_factor=0.25),
    ),
    "phi": Tiny("phi", _DERIVED | _rope("default", partial_rotary_factor=0.5)),
    "phi normed": Tiny("phi", _DERIVED | {"qk_layernorm": True} | _rope("default", partial_rotary_factor=0.5)),
    "starcoder2": Tiny("starcoder2", _DERIVED | {"sliding_window": WINDOW}),
    "gptj": Tiny("gptj", _N_EMBD | {"rotary_dim": 16}),
    "gpt_neox": Tiny(
        "gpt_neox", _PLAIN | {"use_parallel_residual": True} | _rope("default", partial_rotary_factor=0.25)
    ),
    "gpt_neox sequential": Tiny("gpt_neox", _PLAIN | {"use_parallel_residual": False}),
    "opt": Tiny(
        "opt",
        {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_dim": 349}
        | {"max_position_embeddings": 128, "word_embed_proj_dim": 192},
    ),
    "opt post": Tiny(
        "opt",
        {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_dim": 349}
        | {"max_position_embeddings": 128, "word_embed_proj_dim": 70, "do_layer_norm_before": False},
    ),
    "bloom": Tiny("bloom", {"hidden_size": 192, "n_layer": 2, "n_head": 6}),
    "bloom post": Tiny(
        "bloom", {"hidden_size": 192, "n_layer": 2, "n_head": 6, "apply_residual_connection_post_layernorm": True}
    ),
    "mpt": Tiny(
        "mpt",
        {"d_model": 192, "n_layers": 2, "n_heads": 6, "max_seq_len": 128, "attn_config": {"clip_qkv": 2.0}},
    ),
    "falcon 7b": Tiny("falcon", {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "bias": False}),
    "falcon 40b": Tiny(
        "falcon",
        {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, "bias": False}
        | {"new_decoder_architecture": True},
    ),
    "falcon 11b": Tiny(
        "falcon",
        {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, "bias": False}
        | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    # Slopes of four heads are powers of two: Hugging Face rounds this family's slopes times positions to bfloat16.
    "falcon rw": Tiny(
        "falcon",
        {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": True}
        | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "gpt_bigcode": Tiny("gpt_bigcode", _N_EMBD),
    "gpt_bigcode heads": Tiny("gpt_bigcode", _N_EMBD | {"multi_query": False}),
    "mixtral": Tiny(
        "mixtral", _LLAMA | {"intermediate_size": 93, "num_local_experts": 5, "num_experts_per_tok": 2}, moe=True
    ),
    "qwen2_moe": Tiny("qwen2_moe", _DERIVED | _MOE | {"shared_expert_intermediate_size": 165}, moe=True),
    "qwen3_moe": Tiny("qwen3_moe", _LLAMA | _MOE | {"mlp_only_layers": [0], "norm_topk_prob": True}, moe=True),
}


def tiny_model(name: str) -> PreTrainedModel:
    """Return a tiny model in fp32 whose weights are fp16 numbers."""
    tiny = TINY[name]
    torch.manual_seed(sum(map(ord, name)))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
    config = AutoConfig.for_model(tiny.model_type, **ends | {"initializer_range": 0.15} | tiny.config)
    # transformers' default for experts wants sizes that are multiples of four.
    more = {"experts_implementation": "eager"} if tiny.moe else {}
    model = AutoModelForCausalLM.from_config(config, **more).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:  # transformers starts biases and norms at 0 and 1, which hides their misuse
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in path or "ln" in path else 0.0))
            elif "gate.weight" in path:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            parameter.copy_(parameter.half().float())
    return model
