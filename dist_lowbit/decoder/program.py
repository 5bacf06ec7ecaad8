"""The program of a decoder: what a step computes, as data that every executor runs.

One `Program` is one rank's model: modules by reference (so no weight is held twice), numbers, no names of models. Two
executors run it, `NativeDecoder` (C++, one call per step) and `TorchDecoder` (torch operations on any device), and
neither knows a family. All activations are fp32 unless a field says otherwise.

A step takes rows of many sequences, packed one after the other without padding:

    x = embed(ids) * embed_scale [+ positions[position + offset]] [embed_norm] [embed_project]
    for each layer:
        a = attn_norm(x)                                    or x where attn_norm is None
        q, k, v = qkv(a)                                    clipped to +-clip; q_norm, k_norm per head (or whole row)
        q, k = rope(q, k, position); k, v go to the cache as it stores them
        o = o_proj(attention(q, cache))                     summed over the ranks, then bias, then attn_post_norm
        parallel:    x = x + (o + mlp_post_norm(mlp(mlp_norm(x))))       mlp_norm None: the MLP reads a; two sums over
                                                            the ranks, which one call may make
        sequential:  x = x + o; x = x + mlp_post_norm(mlp(mlp_norm(x)))
        norm_after:  x = attn_norm(x + o); x = mlp_norm(x + mlp(x))      (the norms stand after the sums)
        residual_normed: the residual of each sum is the normed input instead of x
    logits = softcap(lm_head(final_norm(x[rows])) * logit_scale)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding
from dist_lowbit.parallel.experts import LowBitExperts
from dist_lowbit.parallel.plan import Heads

# From the highest position of a step to (inv_freq, scaling).
RopeOfLength = Callable[[int], tuple[torch.Tensor, float]]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")


@dataclass(frozen=True)
class Norm:
    """kind "rms": x / sqrt(mean(x^2) + eps) * weight; "layer": (x - mean) / sqrt(var + eps) * weight + bias.

    weight: fp32 [size], with the 1 of a (1 + weight) norm already added; bias: fp32 [size] or None. A norm of heads may
    have a weight for each local head: fp32 [heads, size].
    """

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the first `dim` elements of a head, pairs (i, i + dim/2), or (2i, 2i + 1) where interleaved.

    inv_freq: fp32 [dim / 2]. scaling: factor of cos and sin. dynamic: None, or a function from the highest position of
    a step to (inv_freq, scaling), for kinds whose frequencies depend on the length (dynamic NTK, longrope).
    """

    dim: int
    interleaved: bool
    inv_freq: torch.Tensor
    scaling: float = 1.0
    dynamic: RopeOfLength | None = None


@dataclass(frozen=True)
class Attention:
    """qkv: one fused Linear or three; their local outputs lie side by side in one row, in this order.

    heads: this rank's heads (possibly none: then o adds nothing to the sum). q_at, k_at, v_at: where a local head
    begins in that row, in elements (any fused layout).
    """

    qkv: tuple[LowBitLinear, ...]
    o: LowBitLinear
    heads: Heads
    head_dim: int
    q_at: tuple[int, ...]
    k_at: tuple[int, ...]
    v_at: tuple[int, ...]
    scale: float
    q_norm: Norm | None = None  # over each head
    k_norm: Norm | None = None
    clip: float = 0.0  # 0: none
    rope: int = -1  # index into Program.ropes; -1: none
    window: int = 0  # 0: none, else how many tokens back a row sees, itself included
    softcap: float = 0.0
    alibi: torch.Tensor | None = None  # fp32 [local heads]: slopes


@dataclass(frozen=True)
class Mlp:
    """up: (gate, up), one fused gate_up (gate rows first, or `up_first`), or (up,) alone where not gated."""

    up: tuple[LowBitLinear, ...]
    down: LowBitLinear
    activation: str
    gated: bool
    up_first: bool = False


@dataclass(frozen=True)
class Moe:
    """Routed experts: softmax over all logits, the top_k largest (ties: lower index), renormalised or not.

    router: whole on every rank, fp32 compute. shared: an MLP that every token passes, times sigmoid(shared_gate) where
    there is a gate: the last expert. The weighted sum is formed inside each segment, ascending expert index.
    """

    router: LowBitLinear
    experts: LowBitExperts
    top_k: int
    renormalise: bool
    shared: Mlp | None = None
    shared_gate: LowBitLinear | None = None


@dataclass(frozen=True)
class Layer:
    """One block (see the module's formula)."""

    attention: Attention
    mlp: Mlp | Moe
    attn_norm: Norm | None
    mlp_norm: Norm | None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    parallel: bool = False
    norm_after: bool = False
    residual_normed: bool = False


@dataclass(frozen=True)
class Program:
    """A rank's whole model."""

    hidden: int
    vocab: int
    embed: ParallelEmbedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    lm_head: LowBitLinear
    ropes: tuple[Rope, ...] = ()
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    embed_project: LowBitLinear | None = None  # opt-350m: the embedding is narrower than the model
    final_project: LowBitLinear | None = None
    positions: torch.Tensor | None = None  # learned position embeddings [P, hidden]
    position_offset: int = 0
    mask_positions: bool = False  # HF counts positions from the padding mask where none are given (else from slot 0)
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
