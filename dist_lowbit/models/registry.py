"""The families that are known: to add one, add an entry."""

from __future__ import annotations

from typing import Any

from .family import Family

_ENDS = {"model.embed_tokens": "embed", "lm_head": "lm_head"}

_LLAMA = _ENDS | {
    "model.layers.*.self_attn.q_proj": "q",
    "model.layers.*.self_attn.k_proj": "kv",
    "model.layers.*.self_attn.v_proj": "kv",
    "model.layers.*.self_attn.o_proj": "o",
    "model.layers.*.mlp.gate_proj": "up",
    "model.layers.*.mlp.up_proj": "up",
    "model.layers.*.mlp.down_proj": "down",
}

_ATTENTION = "model.layers.*.self_attn"

_ENTRIES = (
    Family("llama", _LLAMA, _ATTENTION),
    Family("mistral", _LLAMA, _ATTENTION),
    Family("qwen2", _LLAMA, _ATTENTION),
    Family("qwen3", _LLAMA, _ATTENTION),
    Family(
        "phi3",
        _ENDS
        | {
            "model.layers.*.self_attn.qkv_proj": "qkv",
            "model.layers.*.self_attn.o_proj": "o",
            "model.layers.*.mlp.gate_up_proj": "gate_up",
            "model.layers.*.mlp.down_proj": "down",
        },
        _ATTENTION,
        # HF's forward slices the fused output by these two.
        local_heads={"config.num_attention_heads": "heads", "num_key_value_heads": "kv_heads"},
    ),
)

FAMILIES: dict[str, Family] = {entry.model_type: entry for entry in _ENTRIES}


def family_of(config: Any) -> Family | None:
    """Return the family of a Hugging Face config, looked up by model_type alone; None if it is not known."""
    return FAMILIES.get(getattr(config, "model_type", ""))
