"""From a Program to the structs that the compiled decoder takes, and why one cannot be."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_int32, c_int64

import torch

from dist_lowbit.comm.collective import NativeCollective
from dist_lowbit.ops.library import CExpert
from dist_lowbit.parallel import LowBitLinear

from .native_structs import (
    ABI,
    ACTIVATION_CODES,
    NORM_KINDS,
    CLayer,
    CMatrix,
    CMlp,
    CNorm,
    CProgram,
    CRope,
    CRouted,
    CTable,
    sizes,
)
from .program import Attention, Layer, Mlp, Moe, Norm, Program
from .step import KV_DTYPES

COMPILED = "cpu"  # the name of the kernel whose packed weights the decoder reads
MAX_HEAD_DIM = 1024
MAX_EXPERTS = 1024
_TABLE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _mlps(layer: Layer) -> Iterator[Mlp]:
    if isinstance(layer.mlp, Mlp):
        yield layer.mlp
    elif layer.mlp.shared is not None:
        yield layer.mlp.shared


def _linears(program: Program) -> Iterator[tuple[str, LowBitLinear]]:
    """Name every Linear of a program."""
    for name in ("embed_project", "final_project", "lm_head"):
        linear = getattr(program, name)
        if linear is not None:
            yield name, linear
    for index, layer in enumerate(program.layers):
        at = f"layer {index}"
        yield from ((f"{at} qkv", linear) for linear in layer.attention.qkv)
        yield f"{at} o", layer.attention.o
        for mlp in _mlps(layer):
            yield from ((f"{at} up", linear) for linear in mlp.up)
            yield f"{at} down", mlp.down
        if isinstance(layer.mlp, Moe):
            yield f"{at} router", layer.mlp.router
            if layer.mlp.shared_gate is not None:
                yield f"{at} shared_gate", layer.mlp.shared_gate


def why_not(program: Program, store_dtype: str) -> str | None:
    """Return why the compiled decoder does not take a program, as part of a sentence, or None if it does."""
    if store_dtype not in KV_DTYPES:
        return f"kv_cache_dtype is {store_dtype!r}; it knows {', '.join(KV_DTYPES)}"
    if program.embed.weight.device.type != "cpu":
        return f"it runs on the CPU, and the model is on {program.embed.weight.device.type}"
    if program.embed.weight.dtype not in _TABLE_TYPES:
        return f"the embedding is {program.embed.weight.dtype}; it reads fp32, fp16 and bf16"
    for name, linear in _linears(program):
        if linear.kernel != COMPILED:
            return f"the Linear {name} runs on kernel {linear.kernel!r}, and it reads weights of {COMPILED!r} alone"
        joined = (linear.split.gather and linear.split.tp > 1) or linear.split.reduce
        if joined and name.split()[-1] not in ("o", "down", "lm_head"):
            return f"the results of {name} are joined over the ranks, which it does for o, down and lm_head alone"
    if program.lm_head.split.reduce:
        return "the lm_head is cut along K"
    for index, layer in enumerate(program.layers):
        why = _why_not_layer(layer, program)
        if why is not None:
            return f"layer {index}: {why}"
    return None


def _why_not_layer(layer: Layer, program: Program) -> str | None:
    attention, mlp = layer.attention, layer.mlp
    if not 0 < attention.head_dim <= MAX_HEAD_DIM:
        return f"heads have {attention.head_dim} elements; it takes 1 to {MAX_HEAD_DIM}"
    if layer.norm_after and (layer.parallel or layer.residual_normed):
        return "norms after the sums do not go with a parallel MLP or a normed residual"
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None and norm.weight.shape[-1] != attention.head_dim:
            return f"a norm of {norm.weight.shape[-1]} elements over heads of {attention.head_dim}"
        if norm is not None and norm.weight.dim() == 2 and norm.bias is not None:
            return "a norm of heads that has a weight for each head and a bias"
    if attention.rope >= 0 and program.ropes[attention.rope].dim > attention.head_dim:
        return f"rope turns {program.ropes[attention.rope].dim} of {attention.head_dim} elements"
    names = [one.activation for one in _mlps(layer)]
    if isinstance(mlp, Moe):
        names.append(mlp.experts.activation)
        kernels = {mlp.experts.gate_up_proj.kernel, mlp.experts.down_proj.kernel}
        if kernels != {COMPILED}:
            return f"the experts run on kernel {', '.join(sorted(kernels))}, and it reads weights of {COMPILED!r} alone"
        if mlp.experts.gate_up_proj.experts > MAX_EXPERTS:
            return f"{mlp.experts.gate_up_proj.experts} experts; it takes up to {MAX_EXPERTS}"
        shared = mlp.shared
        if shared is not None and _shared_is_odd(shared, mlp.experts.activation):
            return "a shared expert that has a bias, no gate, another order or another activation than the routed ones"
    unknown = [name for name in names if name not in ACTIVATION_CODES]
    return f"the activation {unknown[0]!r}; it knows {', '.join(ACTIVATION_CODES)}" if unknown else None


def _shared_is_odd(shared: Mlp, activation: str) -> bool:
    biased = any(linear.bias is not None for linear in (*shared.up, shared.down))
    return biased or not shared.gated or shared.up_first or shared.activation != activation


class Structs:
    """The structs of one program, and everything that they point to; keep it as long as the decoder.

    program: what dlb_decoder_create takes.
    """

    def __init__(self, program: Program, collective: NativeCollective | None) -> None:
        self._alive: list[object] = [collective]
        self.program = self._program(program)
        self.program.ranks = collective.address or None if collective is not None else None

    def _keep(self, value: object) -> int:
        """Hold on to a tensor or an array of C and return its address."""
        self._alive.append(value)
        return value.data_ptr() if isinstance(value, torch.Tensor) else ctypes.addressof(value)  # type: ignore[arg-type]

    def _integers(self, values: Sequence[int], kind: type[c_int32] | type[c_int64] = c_int32) -> int:
        return self._keep((kind * max(1, len(values)))(*values))

    def _floats(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self._keep(tensor.detach().float().contiguous())

    def _matrix(self, linear: LowBitLinear | None) -> CMatrix:
        if linear is None:
            return CMatrix()
        split = linear.split
        out = CMatrix(packed=self._keep(linear.packed), bytes=linear.packed.numel(), bias=self._floats(linear.bias))
        out.reduce = int(split.reduce)
        out.gather = int(split.gather and split.tp > 1)
        if out.gather:
            out.widths = self._integers([split.local_shape(rank)[0] for rank in range(split.tp)], c_int64)
        return out

    def _norm(self, norm: Norm | None) -> CNorm:
        if norm is None:
            return CNorm()
        size = norm.weight.shape[-1]
        out = CNorm(NORM_KINDS[norm.kind], norm.eps, self._floats(norm.weight), self._floats(norm.bias), size)
        out.head_stride = size if norm.weight.dim() == 2 else 0
        return out

    def _table(self, rows: torch.Tensor | None) -> CTable:
        if rows is None:
            return CTable()
        tensor = rows.detach().contiguous()
        if tensor.dtype not in _TABLE_TYPES:
            tensor = tensor.float()
        return CTable(self._keep(tensor), tensor.shape[0], tensor.shape[1], _TABLE_TYPES[tensor.dtype])

    def _mlp(self, mlp: Mlp) -> CMlp:
        out = CMlp(down=self._matrix(mlp.down), activation=ACTIVATION_CODES[mlp.activation])
        out.gated, out.up_first = int(mlp.gated), int(mlp.gated and mlp.up_first)
        for index, linear in enumerate(mlp.up):
            out.up[index] = self._matrix(linear)
        return out

    def _routed(self, moe: Moe) -> CRouted:
        up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        rows = [
            CExpert(a.data_ptr(), a.numel(), None, 0, b.data_ptr(), b.numel())
            for a, b in zip(up.packed, down.packed, strict=True)
        ]
        self._alive += [up.packed, down.packed]
        if moe.shared is not None:
            first, *second = [self._matrix(linear) for linear in moe.shared.up]
            last = self._matrix(moe.shared.down)
            rest = second[0] if second else CMatrix()
            rows.append(CExpert(first.packed, first.bytes, rest.packed, rest.bytes, last.packed, last.bytes))
        out = CRouted(router=self._matrix(moe.router), shared_gate=self._matrix(moe.shared_gate))
        out.experts = self._keep((CExpert * len(rows))(*rows))
        out.count, out.top_k = up.experts, moe.top_k
        out.renormalise, out.has_shared = int(moe.renormalise), int(moe.shared is not None)
        out.activation, out.reduce = ACTIVATION_CODES[moe.experts.activation], int(down.split.reduce)
        return out

    def _layer(self, layer: Layer) -> CLayer:
        out = CLayer()
        for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"):
            setattr(out, name, self._norm(getattr(layer, name)))
        for name in ("parallel", "norm_after", "residual_normed"):
            setattr(out, name, int(getattr(layer, name)))
        self._attention(layer.attention, out)
        if isinstance(layer.mlp, Moe):
            out.routed = self._routed(layer.mlp)
        else:
            out.mlp = self._mlp(layer.mlp)
        return out

    def _attention(self, attention: Attention, out: CLayer) -> None:
        for index, linear in enumerate(attention.qkv):
            out.qkv[index] = self._matrix(linear)
        out.o = self._matrix(attention.o)
        for name in ("q_at", "k_at", "v_at"):
            setattr(out, name, self._integers(getattr(attention, name)))
        heads = attention.heads
        out.kv_index = self._integers(heads.kv_index)
        out.heads, out.kv_heads, out.head_dim = heads.heads, heads.kv_heads, attention.head_dim
        if heads.heads:
            out.q_norm, out.k_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
            out.alibi = self._floats(attention.alibi)
        out.rope, out.window, out.scale = attention.rope, attention.window, attention.scale
        out.softcap, out.clip = attention.softcap, attention.clip

    def _program(self, program: Program) -> CProgram:
        out = CProgram(abi=ABI, hidden=program.hidden, vocab=program.vocab)
        out.sizes[:] = sizes()
        out.layer_count, out.rope_count = len(program.layers), len(program.ropes)
        layers = [self._layer(layer) for layer in program.layers]
        out.layers = self._keep((CLayer * max(1, len(layers)))(*layers))
        ropes = [CRope(rope.dim, int(rope.interleaved)) for rope in program.ropes]
        out.ropes = self._keep((CRope * max(1, len(ropes)))(*ropes))
        split = program.embed.split
        out.embed, out.ids = self._table(program.embed.weight), program.embed.num_embeddings
        if split.tp > 1 and split.axis is not None:
            out.embed_begin, out.embed_reduce = split.ranges[program.embed.group.rank][0][0], 1
        out.embed_scale = program.embed_scale
        out.embed_norm, out.final_norm = self._norm(program.embed_norm), self._norm(program.final_norm)
        for name in ("embed_project", "final_project", "lm_head"):
            setattr(out, name, self._matrix(getattr(program, name)))
        out.positions, out.position_offset = self._table(program.positions), program.position_offset
        out.logit_scale, out.logit_softcap = program.logit_scale, program.logit_softcap
        return out
