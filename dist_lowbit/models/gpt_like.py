"""Families with a plain MLP: norms with a mean, biases, often one fused qkv or attention and MLP side by side."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, Names

_GPT2 = Names(
    base="transformer",
    embed="wte",
    layers="h",
    final_norm="ln_f",
    attn_norm="ln_1",
    mlp_norm="ln_2",
)
_BLOOM = Names(
    base="transformer",
    embed="word_embeddings",
    layers="h",
    final_norm="ln_f",
    qkv=("self_attention.query_key_value",),
    o="self_attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_FALCON_ONE_NORM = replace(_BLOOM, mlp_norm="")
_FALCON_TWO_NORMS = replace(_BLOOM, attn_norm="ln_attn", mlp_norm="ln_mlp")
_OPT = Names(
    base="model.decoder",
    positions="embed_positions",
    project_in="project_in",
    project_out="project_out",
    final_norm="final_layer_norm",
    o="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
    attn_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
)

GPT_LIKE = (
    Family(
        "phi",
        Names(
            final_norm="final_layernorm",
            o="self_attn.dense",
            up=("mlp.fc1",),
            down="mlp.fc2",
            q_norm="self_attn.q_layernorm",
            k_norm="self_attn.k_layernorm",
            mlp_norm="",
        ),
        gated=False,
        parallel=True,
    ),
    Family(
        "starcoder2",
        Names(up=("mlp.c_fc",), down="mlp.c_proj"),
        gated=False,
        window="@sliding_window",
    ),
    Family(
        "gptj",
        replace(
            _GPT2,
            qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            o="attn.out_proj",
            up=("mlp.fc_in",),
            down="mlp.fc_out",
            mlp_norm="",
        ),
        gated=False,
        activation="@activation_function",
        rope="pairs",
        rope_dim="@rotary_dim",
        parallel=True,
        own_decoder=True,
    ),
    Family(
        "gpt_neox",
        Names(
            base="gpt_neox",
            embed="embed_in",
            final_norm="final_layer_norm",
            qkv=("attention.query_key_value",),
            o="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
        qkv_by_head=True,
        gated=False,
        parallel="@use_parallel_residual",
        own_decoder=True,
    ),
    Family(
        "gpt_bigcode",
        replace(
            _GPT2,
            positions="wpe",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
        ),
        qkv_by_head=True,
        gated=False,
        activation="@activation_function",
        rope="",
        own_decoder=True,
        expect={"scale_attn_weights": True, "add_cross_attention": False},
        kinds=(({"multi_query": True}, {"qkv_by_head": False, "sizes": {"kv_heads": 1}}),),
    ),
    Family(
        "opt",
        _OPT,
        gated=False,
        activation="@activation_function",
        rope="",
        position_offset=2,
        mask_positions=True,
        own_decoder=True,
        kinds=(({"do_layer_norm_before": False}, {"norm_after": True}),),
    ),
    Family(
        "bloom",
        replace(_BLOOM, embed_norm="word_embeddings_layernorm"),
        qkv_by_head=True,
        gated=False,
        activation="gelu_tanh",
        rope="",
        alibi=True,
        residual_normed="@apply_residual_connection_post_layernorm",
        own_decoder=True,
    ),
    Family(
        "falcon",
        _BLOOM,
        qkv_by_head=True,
        gated=False,
        activation="@activation",
        alibi="@alibi",
        alibi_scaled=True,
        parallel="@parallel_attn",
        own_decoder=True,
        kinds=(
            (
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},  # 40B, 180B
                {"names": _FALCON_TWO_NORMS, "parallel": True, "sizes": {"kv_heads": "num_kv_heads"}},
            ),
            (
                {"new_decoder_architecture": True},  # Falcon2 11B
                {"names": _FALCON_ONE_NORM, "parallel": True, "sizes": {"kv_heads": "num_kv_heads"}},
            ),
            (
                {"multi_query": True, "parallel_attn": True},  # 7B
                {"names": _FALCON_ONE_NORM, "qkv_by_head": False, "sizes": {"kv_heads": 1}},
            ),
            ({"multi_query": True}, {"qkv_by_head": False, "sizes": {"kv_heads": 1}}),
            ({"parallel_attn": True}, {"names": _FALCON_ONE_NORM}),
        ),
    ),
    Family(
        "mpt",
        replace(
            _GPT2,
            layers="blocks",
            final_norm="norm_f",
            qkv=("attn.Wqkv",),
            o="attn.out_proj",
            up=("ffn.up_proj",),
            down="ffn.down_proj",
            attn_norm="norm_1",
            mlp_norm="norm_2",
        ),
        gated=False,
        activation="gelu",
        rope="",
        alibi=True,
        alibi_max="@attn_config.alibi_bias_max",
        scale="@attn_config.softmax_scale",
        clip="@attn_config.clip_qkv",
        own_decoder=True,
    ),
)
