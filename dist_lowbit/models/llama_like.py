"""Families with llama's modules: q, k, v (or one fused), a gated MLP, norms before both."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, Names

_FUSED_GATE = ("mlp.gate_up_proj",)
_HEAD_NORMS = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")

_QWEN3 = Family("qwen3", _HEAD_NORMS, window="@sliding_window")
_GEMMA2 = Names(
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_GEMMA = Family("gemma", norm_offset=1.0, embed_scale="sqrt_hidden")
_GLM = Family("glm", Names(up=_FUSED_GATE), rope="pairs")
_EXPERTS = Names(router="mlp.gate", experts="mlp.experts")
_SHARED = replace(
    _EXPERTS,
    shared_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    shared_down="mlp.shared_expert.down_proj",
    shared_gate="mlp.shared_expert_gate",
)
_TOP_K = "@num_experts_per_tok"

LLAMA_LIKE = (
    Family("llama"),
    Family("mistral", window="@sliding_window"),
    Family("qwen2", window="@sliding_window"),
    _QWEN3,
    Family(
        "phi3",
        Names(qkv=("self_attn.qkv_proj",), up=_FUSED_GATE),
        window="@sliding_window",
        # HF's forward slices the fused output by these two.
        local_heads={"config.num_attention_heads": "heads", "num_key_value_heads": "kv_heads"},
    ),
    _GEMMA,
    replace(
        _GEMMA,
        model_type="gemma2",
        names=_GEMMA2,
        activation="@hidden_activation",
        window="@sliding_window",
        query_scalar="@query_pre_attn_scalar",
        attn_softcap="@attn_logit_softcapping",
        logit_softcap="@final_logit_softcapping",
    ),
    _GLM,
    replace(
        _GLM,
        model_type="glm4",
        names=replace(_GLM.names, attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    ),
    Family(
        "stablelm",
        Names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
        parallel="@use_parallel_residual",
        own_decoder=True,
    ),
    Family("mixtral", _EXPERTS, window="@sliding_window", top_k=_TOP_K),
    Family("qwen2_moe", _SHARED, window="@sliding_window", top_k=_TOP_K, renormalise="@norm_topk_prob"),
    Family(
        "qwen3_moe",
        replace(_EXPERTS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
        window="@sliding_window",
        top_k=_TOP_K,
        renormalise="@norm_topk_prob",
    ),
)
