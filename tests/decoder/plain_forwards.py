"""Plain-torch forwards of the families that transformers does not have, written from their papers and configs.

Each takes a dict of fp32 tensors under the model's own names, the values of config.json, and ids [B, T] (no padding),
and returns logits [B, T, vocab]. Nothing of dist_lowbit is used. Also makes random tensors and configs of tiny models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu

Tensors = Mapping[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def angles(length: int, dim: int, base: float) -> torch.Tensor:
    return torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, dim, 2).float() / dim))


def rotate_halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of x [B, T, H, D]."""
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (2i, 2i + 1) of the first elements of x [B, T, H, D]; the rest stay."""
    dim = 2 * angle.shape[1]
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    even, odd = x[..., :dim:2], x[..., 1:dim:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., dim:]], -1)


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return the slopes of the ALiBi paper, with its rule for counts that are no power of two."""
    near = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / near) for i in range(near)]
    return torch.tensor(slopes + [2 ** (-4 * (i + 1) / near) for i in range(0, 2 * (heads - near), 2)])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Return causal attention of q [B, T, H, D] over k, v [B, T, Hkv, D], as [B, T, H * D]."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    length = q.shape[2]
    at = torch.arange(length)
    if slopes is not None:
        scores = scores + slopes[None, :, None, None] * (at[None, :] - at[:, None])
    scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def qwen(t: Tensors, c: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    heads, dim = c["num_attention_heads"], c["kv_channels"]
    x = t["transformer.wte.weight"][ids]
    angle = angles(ids.shape[1], dim, c["rotary_emb_base"])
    for i in range(c["num_hidden_layers"]):
        at = f"transformer.h.{i}."
        a = rms_norm(x, t[at + "ln_1.weight"], c["layer_norm_epsilon"])
        rows = linear(a, t[at + "attn.c_attn.weight"], t[at + "attn.c_attn.bias"])
        q, k, v = (r.unflatten(-1, (heads, dim)) for r in rows.chunk(3, -1))
        x = x + linear(attend(rotate_halves(q, angle), rotate_halves(k, angle), v), t[at + "attn.c_proj.weight"])
        a = rms_norm(x, t[at + "ln_2.weight"], c["layer_norm_epsilon"])
        up, gate = linear(a, t[at + "mlp.w1.weight"]), linear(a, t[at + "mlp.w2.weight"])
        x = x + linear(up * silu(gate), t[at + "mlp.c_proj.weight"])
    return linear(rms_norm(x, t["transformer.ln_f.weight"], c["layer_norm_epsilon"]), t["lm_head.weight"])


def baichuan(t: Tensors, c: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    heads = c["num_attention_heads"]
    dim = c["hidden_size"] // heads
    x = t["model.embed_tokens.weight"][ids]
    slopes = alibi_slopes(heads) if "max_position_embeddings" not in c else None
    angle = angles(ids.shape[1], dim, 10000.0)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        a = rms_norm(x, t[at + "input_layernorm.weight"], c["rms_norm_eps"])
        rows = linear(a, t[at + "self_attn.W_pack.weight"])
        q, k, v = (r.unflatten(-1, (heads, dim)) for r in rows.chunk(3, -1))
        if slopes is None:
            q, k = rotate_halves(q, angle), rotate_halves(k, angle)
        x = x + linear(attend(q, k, v, slopes), t[at + "self_attn.o_proj.weight"])
        a = rms_norm(x, t[at + "post_attention_layernorm.weight"], c["rms_norm_eps"])
        gated = silu(linear(a, t[at + "mlp.gate_proj.weight"])) * linear(a, t[at + "mlp.up_proj.weight"])
        x = x + linear(gated, t[at + "mlp.down_proj.weight"])
    head = t["lm_head.weight"]
    if c["vocab_size"] == 125696:  # the second generation's head has rows of length 1
        head = head / head.norm(dim=1, keepdim=True)
    return linear(rms_norm(x, t["model.norm.weight"], c["rms_norm_eps"]), head)


def chatglm(t: Tensors, c: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    heads, groups, dim = c["num_attention_heads"], c["multi_query_group_num"], c["kv_channels"]
    x = t["transformer.embedding.word_embeddings.weight"][ids]
    angle = angles(ids.shape[1], dim // 2, 10000.0 * c.get("rope_ratio", 1))
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        a = rms_norm(x, t[at + "input_layernorm.weight"], c["layernorm_epsilon"])
        rows = linear(a, t[at + "self_attention.query_key_value.weight"], t[at + "self_attention.query_key_value.bias"])
        q, k, v = rows.split([heads * dim, groups * dim, groups * dim], -1)
        q, k, v = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (groups, dim)), v.unflatten(-1, (groups, dim))
        o = attend(rotate_pairs(q, angle), rotate_pairs(k, angle), v)
        x = x + linear(o, t[at + "self_attention.dense.weight"])
        a = rms_norm(x, t[at + "post_attention_layernorm.weight"], c["layernorm_epsilon"])
        gate, up = linear(a, t[at + "mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + linear(silu(gate) * up, t[at + "mlp.dense_4h_to_h.weight"])
    x = rms_norm(x, t["transformer.encoder.final_layernorm.weight"], c["layernorm_epsilon"])
    return linear(x, t["transformer.output_layer.weight"])


_HIDDEN, _VOCAB, _FFN, _WIDTH = 192, 131, 349, 32
_QWEN = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": _HIDDEN, "num_hidden_layers": 2,
    "num_attention_heads": 6, "kv_channels": _WIDTH, "intermediate_size": 2 * _FFN, "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 512, "vocab_size": _VOCAB, "no_bias": True,
    "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip
_BAICHUAN_7B = {
    "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_size": _HIDDEN,
    "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": _FFN, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "vocab_size": _VOCAB, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_BAICHUAN_13B = {k: v for k, v in _BAICHUAN_7B.items() if k != "max_position_embeddings"} | {"model_max_length": 512}
_CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": _HIDDEN, "num_layers": 2,
    "num_attention_heads": 6, "kv_channels": _WIDTH, "multi_query_attention": True, "multi_query_group_num": 2,
    "ffn_hidden_size": _FFN, "layernorm_epsilon": 1e-5, "rmsnorm": True, "seq_length": 512,
    "padded_vocab_size": _VOCAB, "add_qkv_bias": True, "add_bias_linear": False, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False, "original_rope": True,
}  # fmt: skip

MODELS: dict[str, tuple[dict[str, Any], Callable[[Tensors, Mapping[str, Any], torch.Tensor], torch.Tensor]]] = {
    "qwen": (_QWEN, qwen),
    "baichuan 7b": (_BAICHUAN_7B, baichuan),
    "baichuan 13b": (_BAICHUAN_13B, baichuan),
    "chatglm3": (_CHATGLM, chatglm),
    "chatglm3 32k": (_CHATGLM | {"rope_ratio": 50}, chatglm),
}


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    h, f = _HIDDEN, _FFN
    if config["model_type"] == "qwen":
        return {
            "ln_1.weight": (h,), "ln_2.weight": (h,), "attn.c_attn.weight": (3 * h, h), "attn.c_attn.bias": (3 * h,),
            "attn.c_proj.weight": (h, h), "mlp.w1.weight": (f, h), "mlp.w2.weight": (f, h),
            "mlp.c_proj.weight": (h, f),
        }  # fmt: skip
    if config["model_type"] == "baichuan":
        return {
            "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
            "self_attn.W_pack.weight": (3 * h, h), "self_attn.o_proj.weight": (h, h), "mlp.gate_proj.weight": (f, h),
            "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f),
        }  # fmt: skip
    rows = h + 2 * 2 * _WIDTH
    return {
        "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
        "self_attention.query_key_value.weight": (rows, h), "self_attention.query_key_value.bias": (rows,),
        "self_attention.dense.weight": (h, h), "mlp.dense_h_to_4h.weight": (2 * f, h),
        "mlp.dense_4h_to_h.weight": (h, f),
    }  # fmt: skip


_ENDS = {
    "qwen": ("transformer.wte.weight", "transformer.h.", "transformer.ln_f.weight", "lm_head.weight"),
    "baichuan": ("model.embed_tokens.weight", "model.layers.", "model.norm.weight", "lm_head.weight"),
    "chatglm": (
        "transformer.embedding.word_embeddings.weight", "transformer.encoder.layers.",
        "transformer.encoder.final_layernorm.weight", "transformer.output_layer.weight",
    ),
}  # fmt: skip


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny model: fp32 numbers that fp16 holds exactly."""
    embed, layers, norm, head = _ENDS[config["model_type"]]
    vocab = config.get("padded_vocab_size", config.get("vocab_size"))
    shapes: dict[str, tuple[int, ...]] = {embed: (vocab, _HIDDEN), norm: (_HIDDEN,), head: (vocab, _HIDDEN)}
    for i in range(2):
        shapes |= {f"{layers}{i}.{name}": shape for name, shape in _layer_shapes(config).items()}
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=draw) * 0.15
        made[name] = (1 + numbers if len(shape) == 1 and name.endswith("weight") else numbers).half().float()
    return made


def write_files(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write a tiny random model as its makers publish it, with the names of code that is not there; return its config
    and tensors."""
    config = MODELS[kind][0] | changes
    tensors = random_tensors(config)
    code = {"auto_map": {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return config, tensors


def plain_logits(kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, vocab] that a kind's forward computes of its random tensors."""
    config, forward = MODELS[kind]
    return forward(random_tensors(config), config, ids)
