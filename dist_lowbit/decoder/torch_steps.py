"""The steps of a decoder layer that are no Linear, as torch operations: what TorchDecoder is made of.

What has two definitions is in FixedSteps and PlainSteps; what moves numbers about, or rounds each of them once, is here
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from dist_lowbit.ops.arithmetic import tanh_poly
from dist_lowbit.ops.attention import attention
from dist_lowbit.ops.elementwise import activation, gated, layer_norm, rms_norm, route
from dist_lowbit.parallel import LowBitLinear
from dist_lowbit.parallel.experts import LowBitExperts

from .program import Attention, Moe, Norm
from .step import BLOCK_SLOTS, KvStore


class Steps(Protocol):
    """What a decoder takes from FixedSteps or PlainSteps."""

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Return norm(x) along the last axis, with one weight for all rows."""
        ...

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return an activation (program.ACTIVATIONS, or sigmoid) of x."""
        ...

    def gated(self, name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return an activation of gate, times up."""
        ...

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """Return cap tanh(x / cap)."""
        ...

    def attend(
        self, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Return the attention of one sequence's last rows: q [n, H, D], k and v [1, kv heads, S, D] -> [n, H * D]."""
        ...

    def experts(
        self,
        experts: LowBitExperts,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        last: Sequence[LowBitLinear],
    ) -> torch.Tensor:
        """Return the weighted sum of each row's experts (LowBitExperts.weighted_sum)."""
        ...


class FixedSteps:
    """The operations of dist_lowbit.ops, whose bits depend on a row (and the keys it sees) alone. On the cpu."""

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        if norm.kind == "layer":
            return layer_norm(x, norm.weight, norm.bias, norm.eps)
        return rms_norm(x, norm.weight, norm.eps)

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        return activation(x, name)

    def gated(self, name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        return gated(gate, up, name)

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See Steps."""
        return cap * tanh_poly(x / torch.full_like(x, cap))

    def attend(
        self, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """See Steps."""
        out = attention(
            q.transpose(0, 1)[None], k, v, index, scale=a.scale, causal_offset=k.shape[2] - q.shape[0],
            window=a.window, softcap=a.softcap, alibi=a.alibi,
        )  # fmt: skip
        return out[0].flatten(1)

    def experts(
        self,
        experts: LowBitExperts,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        last: Sequence[LowBitLinear],
    ) -> torch.Tensor:
        """See Steps."""
        return experts.weighted_sum(x, ids, weights, last)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


class PlainSteps:
    """torch's own operations in fp32, on any device: the same numbers within rounding."""

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        return _ACTIVATIONS[name](x)

    def gated(self, name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See Steps."""
        return _ACTIVATIONS[name](gate) * up

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See Steps."""
        return cap * torch.tanh(x / cap)

    def attend(
        self, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """See Steps."""
        rows, slots, which = q.shape[0], k.shape[2], index.long()
        scores = q.transpose(0, 1) @ k[0].float()[which].mT * a.scale
        if a.softcap > 0:
            scores = self.softcap(scores, a.softcap)
        own = torch.arange(slots - rows, slots, device=q.device)[:, None]
        distance = torch.arange(slots, device=q.device)[None, :] - own
        if a.alibi is not None:
            scores = scores + a.alibi[:, None, None] * distance
        seen = (distance <= 0) & (distance > -a.window) if a.window else distance <= 0
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ v[0].float()[which]).transpose(0, 1).flatten(1)

    def experts(
        self,
        experts: LowBitExperts,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        last: Sequence[LowBitLinear],
    ) -> torch.Tensor:
        """See Steps."""
        y = x.new_zeros(x.shape[0], experts.down_proj.spec.n)
        for number in sorted(set(ids.flatten().tolist())):
            row, slot = (ids == number).nonzero(as_tuple=True)
            routed_to = number < experts.down_proj.experts
            if routed_to:
                up = experts.gate_up_proj.product(number, x[row])
            else:
                up = torch.cat([linear.product(x[row]) for linear in last[:-1]], -1)
            inner = self.gated(experts.activation, *up.chunk(2, -1))
            down = experts.down_proj.product(number, inner) if routed_to else last[-1].product(inner)
            y.index_add_(0, row, down * weights[row, slot, None])
        return experts.summed(y)


def normed(steps: Steps, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """Return norm(x) along the last axis; x itself where there is no norm. A weight for each head is [heads, size]."""
    if norm is None:
        return x
    if norm.weight.dim() == 2:  # without a weight, then times it: the same roundings
        return steps.norm(Norm(norm.kind, norm.weight.new_ones(x.shape[-1]), None, norm.eps), x) * norm.weight
    return steps.norm(norm, x)


def routed(steps: Steps, moe: Moe, x: torch.Tensor) -> torch.Tensor:
    """Return what routed experts make of rows x, a shared expert as the last one, in a slot of its own."""
    ids, weights = route(moe.router(x), moe.top_k, moe.renormalise)
    if moe.shared is None:
        return steps.experts(moe.experts, x, ids, weights, ())
    own = ids.new_full((len(x), 1), moe.experts.down_proj.experts)
    factor = weights.new_ones(len(x), 1)
    if moe.shared_gate is not None:
        factor = steps.activation("sigmoid", moe.shared_gate(x))
    ids, weights = torch.cat((ids, own), 1), torch.cat((weights, factor), 1)
    return steps.experts(moe.experts, x, ids, weights, (*moe.shared.up, moe.shared.down))


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
