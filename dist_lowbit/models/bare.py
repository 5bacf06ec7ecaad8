"""Families that transformers has no code for: run from config.json and their tensors, without remote code."""

from __future__ import annotations

from .family import Family, Names

_BAICHUAN_13B = {"max_position_embeddings": None}  # its config names a tokenizer's limit only
_BAICHUAN_2 = {"vocab_size": 125696}

BARE = (
    Family(
        "qwen",
        Names(
            base="transformer",
            embed="wte",
            layers="h",
            final_norm="ln_f",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            up=("mlp.w2", "mlp.w1"),
            down="mlp.c_proj",
            attn_norm="ln_1",
            mlp_norm="ln_2",
        ),
        activation="silu",
        rope_base="@rotary_emb_base",
        longest="@seq_length",  # then its frequencies and queries are scaled by the length
        sizes={"kv_heads": "num_attention_heads", "head_dim": "kv_channels"},
        expect={"rotary_pct": 1.0},
        own_decoder=True,
        bare={"rms_norm_eps": "layer_norm_epsilon"},
    ),
    Family(
        "baichuan",
        Names(qkv=("self_attn.W_pack",)),
        rope_base=10000.0,
        own_decoder=True,
        bare={},
        kinds=(
            (_BAICHUAN_13B | _BAICHUAN_2, {"alibi": True, "normalise_head": True}),
            (_BAICHUAN_13B, {"alibi": True}),
            (_BAICHUAN_2, {"normalise_head": True}),
        ),
    ),
    Family(  # ChatGLM 2 and 3, GLM-4 in its first files
        "chatglm",
        Names(
            base="transformer",
            embed="embedding.word_embeddings",
            layers="encoder.layers",
            final_norm="encoder.final_layernorm",
            lm_head="transformer.output_layer",
            qkv=("self_attention.query_key_value",),
            o="self_attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
        activation="silu",
        rope="pairs",
        rope_base=10000.0,
        rope_ratio="@rope_ratio",
        rope_share=0.5,
        sizes={"kv_heads": "multi_query_group_num", "head_dim": "kv_channels", "vocab": "padded_vocab_size"},
        expect={
            "multi_query_attention": True,
            "rmsnorm": True,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
        },
        own_decoder=True,
        bare={
            "num_hidden_layers": "num_layers",
            "rms_norm_eps": "layernorm_epsilon",
            "vocab_size": "padded_vocab_size",
        },
    ),
)
