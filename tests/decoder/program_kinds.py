"""The kinds of program that the executors are tested with: every field of program.py is set by one of them."""

from __future__ import annotations

from typing import Any

from tests.decoder.tiny_programs import Kind

PAIRS = {"dim": 16, "interleaved": True}
PARALLEL: dict[str, Any] = {"parallel": True}

KINDS = (
    Kind("plain"),
    Kind("fused", fused=True, heads=6, kv_heads=3, hidden=96, bias=True, up_first=True),
    Kind("wide", format="sym_int8", heads=5, kv_heads=1, head_dim=48, rope={"dim": 48, "interleaved": False}),
    Kind("asym", format="asym_int4", layers=3, inner=100),
    Kind("window", window=5, attention={"softcap": 3.0}, program={"logit_softcap": 5.0, "embed_scale": 8.0},
         norms=("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"), activation="gelu_tanh"),
    Kind("post", norms=("attn_post_norm", "mlp_post_norm"), bias=True),
    Kind("heads one", head_norms="one", rope=PAIRS, program={"logit_scale": 0.5}),
    Kind("heads each", head_norms="each", norm="layer", rope={"dim": 16, "interleaved": False}),
    Kind("parallel", norm="layer", bias=True, gated=False, activation="quick_gelu", norms=("attn_norm",),
         layer=PARALLEL),
    Kind("parallel own", norm="layer", bias=True, gated=False, activation="relu", fused=True, layer=PARALLEL),
    Kind("parallel post", norms=("attn_norm", "mlp_post_norm", "attn_post_norm"), layer=PARALLEL),
    Kind("after", norm="layer", bias=True, gated=False, activation="relu", rope=None, positions=True, embed_width=48,
         layer={"norm_after": True}, program={"position_offset": 2}),
    Kind("alibi", norm="layer", bias=True, gated=False, activation="gelu_tanh", rope=None, alibi=True, embed_norm=True,
         layer={"residual_normed": True}),
    Kind("clip", attention={"clip": 0.5}, norms=("attn_norm", "mlp_norm", "final")),
)  # fmt: skip
ROUTED = (
    Kind("routed", experts=4, inner=64),
    Kind("shared", experts=6, inner=64, shared=96, shared_gate=True, top_k=3),
    Kind("shared always", experts=4, inner=64, shared=64, fused=True, norms=("attn_norm", "mlp_norm", "mlp_post_norm")),
    Kind("routed parallel", experts=4, inner=64, norms=("attn_norm",), layer=PARALLEL),
)
# Wide enough for every product to be dealt out to several threads as several tasks.
LARGE = (
    Kind("large parallel", hidden=256, heads=8, kv_heads=4, inner=512, norm="layer", bias=True, gated=False,
         activation="gelu_tanh", norms=("attn_norm",), layer=PARALLEL),
    Kind("large routed parallel", hidden=256, heads=8, kv_heads=4, inner=256, experts=4, norms=("attn_norm",),
         layer=PARALLEL),
)  # fmt: skip
ELEMENTS = (
    Kind("fp16", format="fp16"),
    Kind("bf16", format="bf16"),
    Kind("fp8", format="fp8_e4m3", bias=True),
    Kind("fp32 compute", compute="fp32"),
)
