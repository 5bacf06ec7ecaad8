"""The steps of a decoder layer that are no Linear, as torch operations: what TorchDecoder is made of.

On the cpu they call dist_lowbit.ops, whose bits depend on a row alone. On other devices they are torch's own, in fp32,
and agree within rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from dist_lowbit.ops.arithmetic import tanh_poly
from dist_lowbit.ops.attention import attention
from dist_lowbit.ops.elementwise import activation, gated, layer_norm, rms_norm

from .program import Attention, Norm
from .step import BLOCK_SLOTS, KvStore


def normed(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """Return norm(x) along the last axis; x itself where there is no norm. A weight for each head is [heads, size]."""
    if norm is None:
        return x
    weight, bias = norm.weight, norm.bias
    if weight.dim() == 2:  # without a weight, then times it: the same roundings
        return normed(Norm(norm.kind, weight.new_ones(x.shape[-1]), None, norm.eps), x) * weight
    if x.device.type != "cpu":
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
    return layer_norm(x, weight, bias, norm.eps) if norm.kind == "layer" else rms_norm(x, weight, norm.eps)


def activated(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return an activation (program.ACTIVATIONS) of x."""
    return activation(x, name) if x.device.type == "cpu" else _ACTIVATIONS[name](x)


def activated_gate(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return an activation of gate, times up."""
    return gated(gate, up, name) if gate.device.type == "cpu" else _ACTIVATIONS[name](gate) * up


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def softcapped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap tanh(x / cap), x where cap is 0."""
    return cap * tanh_poly(x / torch.full_like(x, cap)) if cap > 0 else x


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return heads [R, H, D] with their first 2 * cos.shape[1] elements turned: (a cos - b sin, b cos + a sin)."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    turned = x[..., : 2 * half]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    first, second = a * cos - b * sin, b * cos + a * sin
    joined = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((joined, x[..., 2 * half :]), -1)


def heads_of(row: torch.Tensor, places: tuple[int, ...], size: int) -> torch.Tensor:
    """Return the heads that begin at some places of qkv rows [R, W], as [R, heads, size]."""
    if not places:
        return row.new_zeros(row.shape[0], 0, size)
    return torch.stack([row[:, at : at + size] for at in places], 1)


def write_rows(
    store: KvStore, layer: int, table: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Put keys and values [n, heads, D] of one sequence into its slots first, first + 1 ...; table: its blocks."""
    at = torch.arange(first, first + keys.shape[0], device=table.device)
    block, slot = table[at // BLOCK_SLOTS].long(), at % BLOCK_SLOTS
    for numbers, into, scales in (
        (keys, store.keys[layer], store.key_scales),
        (values, store.values[layer], store.value_scales),
    ):
        if store.dtype == "int8":
            codes, scale = quantized(numbers)
            into[block, :, slot], scales[layer][block, :, slot] = codes, scale
        else:
            into[block, :, slot] = numbers.to(into.dtype)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes and the fp16 scale of each last axis: scale = fp16(max|x| / 127), code = rne(x / scale)."""
    peak = x.abs().amax(-1)
    scale = (peak / torch.full_like(peak, 127.0)).half()
    wide = scale.float()[..., None]
    codes = torch.where(wide > 0, torch.round(x / torch.where(wide > 0, wide, torch.ones_like(wide))), 0.0)
    return codes.clamp(-127, 127).to(torch.int8), scale


def read_rows(store: KvStore, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of one sequence as [1, heads, length, D], in the store's dtype (int8: as fp32)."""
    result = []
    for source, scales in ((store.keys[layer], store.key_scales), (store.values[layer], store.value_scales)):
        blocks = table[: -(-length // BLOCK_SLOTS)].long()
        numbers = source[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
        if scales:
            numbers = numbers.float() * scales[layer][blocks].transpose(0, 1).flatten(1, 2)[:, :length, None].float()
        result.append(numbers[None])
    return result[0], result[1]


def attended(a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the attention of one sequence's last rows: q [n, H, D], k and v [1, kv heads, S, D] -> [n, H * D]."""
    rows, slots = q.shape[0], k.shape[2]
    if q.device.type == "cpu":
        out = attention(
            q.transpose(0, 1)[None], k, v, index, scale=a.scale, causal_offset=slots - rows, window=a.window,
            softcap=a.softcap, alibi=a.alibi,
        )  # fmt: skip
        return out[0].flatten(1)
    return _plain_attention(a, q.transpose(0, 1), k[0].float()[index], v[0].float()[index])


def _plain_attention(a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows, slots = q.shape[1], k.shape[1]
    scores = q @ k.mT * a.scale
    if a.softcap > 0:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    own = torch.arange(slots - rows, slots, device=q.device)[:, None]
    distance = torch.arange(slots, device=q.device)[None, :] - own
    if a.alibi is not None:
        scores = scores + a.alibi.to(q.device)[:, None, None] * distance
    seen = (distance <= 0) & (distance > -a.window) if a.window else distance <= 0
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)
