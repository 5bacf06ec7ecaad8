"""From a built model and its family's data to the program that executors run: modules found by name, none copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_lowbit.comm import Group
from dist_lowbit.core.errors import PlanError
from dist_lowbit.formats import cast_name, quantize
from dist_lowbit.formats.packed import BLOCK
from dist_lowbit.models import Family, ModelDims, dims_of, lookup, setting
from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding, Plan
from dist_lowbit.parallel.experts import LowBitExperts
from dist_lowbit.parallel.plan import Heads
from dist_lowbit.parallel.split import whole

from .program import Attention, Layer, Mlp, Moe, Norm, Program, Rope
from .rope import alibi_slopes, limited, make_rope, plain_rope

# transformers' names of activations -> this project's (program.ACTIVATIONS).
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}


def build_program(model: nn.Module, family: Family, plan: Plan, group: Group) -> Program:
    """Return this rank's program of a model whose matrices have been swapped by `plan`.

    Weights are shared with the model; norms, biases of norms and position tables are widened to fp32. A config that
    asks for what the family's data does not say, a module with parameters that no step uses, and an activation or
    position encoding that is not known are PlanErrors: the model then keeps Hugging Face's forward.
    """
    return _Builder(model, family, plan, group).program()


class _Builder:
    def __init__(self, model: nn.Module, family: Family, plan: Plan, group: Group) -> None:
        self.model, self.family, self.plan, self.group = model, family, plan, group
        self.config: Any = model.config
        self.dims: ModelDims = dims_of(family, self.config)
        self.used: set[int] = set()
        for name, expected in family.expect.items():
            found = lookup(self.config, name)
            if found != expected:
                raise PlanError(f"config.{name} is {found!r}; the decoder of {family.model_type} expects {expected!r}")

    def program(self) -> Program:
        """Return the whole program."""
        names, base = self.family.names, self.family.names.base
        embed = self.module(f"{base}.{names.embed}")
        if not isinstance(embed, ParallelEmbedding):
            raise PlanError(f"{base}.{names.embed} is {type(embed).__name__}; expected an embedding that was swapped")
        ropes = self._ropes()
        count = len(self.model.get_submodule(f"{base}.{names.layers}"))  # type: ignore[arg-type]
        positions = self.find(f"{base}.{names.positions}") if names.positions else None
        program = Program(
            hidden=int(self.config.hidden_size),
            vocab=self.dims.vocab,
            # The rows as they are stored, widened: the model's own may give another dtype, or scale them.
            embed=ParallelEmbedding(embed.weight, embed.split, embed.group, torch.float32),
            layers=tuple(self._layer(i, len(ropes)) for i in range(count)),
            final_norm=self.norm(f"{base}.{names.final_norm}"),
            lm_head=self.linear(names.lm_head),
            ropes=ropes,
            embed_scale=self.family.embedding_scale(self.config),
            embed_norm=self.norm(f"{base}.{names.embed_norm}") if names.embed_norm else None,
            embed_project=self._optional_linear(f"{base}.{names.project_in}") if names.project_in else None,
            final_project=self._optional_linear(f"{base}.{names.project_out}") if names.project_out else None,
            positions=None if positions is None else positions.weight.detach().float(),  # type: ignore[operator]
            position_offset=self.family.position_offset,
            mask_positions=self.family.mask_positions,
            logit_softcap=float(self.value("logit_softcap")),
        )
        self._check_all_used()
        return program

    def value(self, field: str) -> Any:
        """Return a Setting of the family for this config."""
        return setting(self.config, getattr(self.family, field))

    def find(self, name: str) -> nn.Module | None:
        """Return a module by dotted name and note that it is used; None where it is absent or None."""
        found: Any = self.model
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                return None
        self.used |= {id(module) for module in found.modules()}
        return found  # type: ignore[no-any-return]

    def module(self, name: str) -> nn.Module:
        """Return a module that has to be there."""
        found = self.find(name)
        if found is None:
            raise PlanError(f"this {self.family.model_type} model has no module {name}")
        return found

    def _optional_linear(self, name: str) -> LowBitLinear | None:
        return None if self.find(name) is None else self.linear(name)

    def linear(self, name: str, whole_in_fp32: bool = False) -> LowBitLinear:
        """Return a Linear of the program; one that was left as it is becomes a cast of its own dtype, on every rank."""
        module = self.module(name)
        if isinstance(module, LowBitLinear):
            return module
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise PlanError(f"{name} is {type(module).__name__}; the decoder expects a Linear there")
        matrix = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
        form = "fp32" if whole_in_fp32 else cast_name(matrix.dtype)
        split = whole((int(matrix.shape[0]), int(matrix.shape[1])), BLOCK, self.plan.tp)
        bias = getattr(module, "bias", None)
        compute = "fp32" if whole_in_fp32 else "int8"
        return LowBitLinear(quantize(matrix.contiguous().float(), form), bias, split, self.group, compute)

    def norm(self, name: str, first: int = 0, heads: int = 0) -> Norm | None:
        """Return a norm, None where there is none. heads: how many there are where each head has its own."""
        module = self.find(name)
        if module is None:
            return None
        own: list[Any] = list(getattr(module, "norms", ()))  # one norm for each head
        one: Any = own[0] if own else module
        if own and getattr(one, "bias", None) is not None:
            raise PlanError(f"{name} has a bias for each head, which the decoder does not add")
        weight = _wide(torch.stack([norm.weight for norm in own])[first : first + heads] if own else one.weight)
        bias = None if own else getattr(one, "bias", None)
        eps = getattr(one, "variance_epsilon", None) or getattr(one, "eps", None)
        if eps is None:
            raise PlanError(f"{name} ({type(one).__name__}) does not say its eps")
        kind = "layer" if isinstance(one, nn.LayerNorm) else "rms"
        return Norm(kind, weight + self.family.norm_offset, None if bias is None else _wide(bias), float(eps))

    def _ropes(self) -> tuple[Rope, ...]:
        if not self.family.rope or self.value("alibi"):
            return ()
        pairs, dim = self.family.rope == "pairs", int(self.value("rope_dim"))
        base = float(self.value("rope_base"))
        if not base:
            return (make_rope(self.config, self.dims.head_dim, pairs, dim),)
        turned = int(self.dims.head_dim * self.family.rope_share)
        rope = plain_rope(turned, pairs, base * float(self.value("rope_ratio") or 1))
        return (limited(rope, int(self.value("longest"))),)

    def _layer(self, index: int, ropes: int) -> Layer:
        names = self.family.names
        at = f"{names.base}.{names.layers}.{index}"

        def norm(name: str) -> Norm | None:
            return self.norm(f"{at}.{name}") if name else None

        parallel = bool(self.value("parallel"))
        layer = Layer(
            attention=self._attention(at, index, 0 if ropes else -1),
            mlp=self._mlp(at),
            attn_norm=norm(names.attn_norm),
            mlp_norm=norm(names.mlp_norm),
            attn_post_norm=norm(names.attn_post_norm),
            mlp_post_norm=norm(names.mlp_post_norm),
            parallel=parallel,
            norm_after=self.family.norm_after,
            residual_normed=bool(self.value("residual_normed")),
        )
        if layer.attn_norm is None or (layer.mlp_norm is None and not parallel):
            raise PlanError(f"{at} of this {self.family.model_type} model has no norm before attention or MLP")
        return layer

    def _attention(self, at: str, index: int, rope: int) -> Attention:
        names, dims = self.family.names, self.dims
        o_name = f"{at}.{names.o}"
        parent = o_name.rpartition(".")[0]
        heads = self.plan.heads[parent][self.group.rank]
        qkv = tuple(self.linear(f"{at}.{name}") for name in names.qkv)
        q_at, k_at, v_at = head_places(qkv, heads, dims, self.family.qkv_by_head, self.group.rank)
        scale = float(self.value("scale")) or float(self.value("query_scalar") or dims.head_dim) ** -0.5
        q_norm = self.norm(f"{at}.{names.q_norm}", heads.first, heads.heads) if names.q_norm else None
        k_norm = self.norm(f"{at}.{names.k_norm}", heads.first_kv, heads.kv_heads) if names.k_norm else None
        return Attention(
            qkv=qkv,
            o=self.linear(o_name),
            heads=heads,
            head_dim=dims.head_dim,
            q_at=q_at,
            k_at=k_at,
            v_at=v_at,
            scale=scale,
            q_norm=q_norm,
            k_norm=k_norm,
            clip=float(self.value("clip")),
            rope=rope,
            window=self._window(index),
            softcap=float(self.value("attn_softcap")),
            alibi=self._alibi(heads, scale),
        )

    def _window(self, index: int) -> int:
        window = int(self.value("window"))
        kinds = getattr(self.config, "layer_types", None)
        return window if not kinds or kinds[index] == "sliding_attention" else 0

    def _alibi(self, heads: Heads, scale: float) -> torch.Tensor | None:
        if not self.value("alibi"):
            return None
        slopes = alibi_slopes(self.dims.heads, float(self.value("alibi_max")))
        if self.family.alibi_scaled:
            slopes = slopes.bfloat16().float() * scale
        return slopes[heads.first : heads.first + heads.heads].clone()

    def _mlp(self, at: str) -> Mlp | Moe:
        names = self.family.names
        experts = self.find(f"{at}.{names.experts}") if names.experts else None
        if experts is None:
            return self._plain_mlp(at, names.up, names.down)
        if not isinstance(experts, LowBitExperts):
            raise PlanError(f"{at}.{names.experts} is {type(experts).__name__}; expected experts that were swapped")
        shared = self._plain_mlp(at, names.shared_up, names.shared_down) if names.shared_down else None
        gate = self.linear(f"{at}.{names.shared_gate}", whole_in_fp32=True) if names.shared_gate else None
        router = self.linear(f"{at}.{names.router}", whole_in_fp32=True)
        return Moe(router, experts, int(self.value("top_k")), bool(self.value("renormalise")), shared, gate)

    def _plain_mlp(self, at: str, up: tuple[str, ...], down: str) -> Mlp:
        return Mlp(
            up=tuple(self.linear(f"{at}.{name}") for name in up),
            down=self.linear(f"{at}.{down}"),
            activation=activation_of(self.config, self.family),
            gated=self.family.gated,
            up_first=self.family.up_first,
        )

    def _check_all_used(self) -> None:
        """Refuse a model with a parameter that no step of the program reads: it would be left out in silence."""
        for name, module in self.model.named_modules():
            if id(module) not in self.used and any(True for _ in module.parameters(recurse=False)):
                raise PlanError(f"no step of the decoder of {self.family.model_type} uses {name}")


def activation_of(config: Any, family: Family) -> str:
    """Return the activation of a family's MLP by this project's name."""
    told = setting(config, family.activation)
    if told not in _ACTIVATIONS:
        raise PlanError(f"the activation of this model is {told!r}; expected one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[told]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().contiguous()


Places = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def head_places(qkv: tuple[LowBitLinear, ...], heads: Heads, dims: ModelDims, by_head: bool, rank: int) -> Places:
    """Return where each local query, key and value head begins in the local row of qkv outputs, in elements."""
    size = dims.head_dim
    queries = range(heads.first, heads.first + heads.heads)
    keys = range(heads.first_kv, heads.first_kv + heads.kv_heads)
    if len(qkv) == 3:
        k_base = qkv[0].out_features
        v_base = k_base + qkv[1].out_features
        own = range(heads.kv_heads)
        return (
            tuple(i * size for i in range(heads.heads)),
            tuple(k_base + i * size for i in own),
            tuple(v_base + i * size for i in own),
        )
    group = dims.heads // dims.kv_heads
    stride = (group + 2) * size
    k_base, v_base = dims.heads * size, (dims.heads + dims.kv_heads) * size
    if by_head:
        q = [head // group * stride + head % group * size for head in queries]
        k = [head * stride + group * size for head in keys]
        v = [head * stride + (group + 1) * size for head in keys]
    else:
        q = [head * size for head in queries]
        k, v = [k_base + head * size for head in keys], [v_base + head * size for head in keys]
    ranges = qkv[0].split.ranges[rank] if qkv[0].split.axis == 0 else ((0, qkv[0].out_features),)

    def local(place: int) -> int:
        before = 0
        for start, stop in ranges:
            if start <= place < stop:
                return before + place - start
            before += stop - start
        raise PlanError(f"row {place} of the fused qkv is not on rank {rank}, whose head it belongs to")

    return tuple(map(local, q)), tuple(map(local, k)), tuple(map(local, v))
