"""Swap the modules of a model for their low-bit, split stand-ins, and give every other tensor its values."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from dist_lowbit import ops
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import CheckpointError, PlanError
from dist_lowbit.core.log import logger
from dist_lowbit.decoder import IdleAttention, use_activation, use_attention
from dist_lowbit.decoder.agree import check_every_call
from dist_lowbit.decoder.build_program import activation_of
from dist_lowbit.models import setting
from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding, Split
from dist_lowbit.parallel.experts import ExpertStack, LowBitExperts
from dist_lowbit.parallel.plan import Heads
from dist_lowbit.quantize import Recipe

from .decode import require_decoder, use_decoder
from .memory import give_back
from .mode import Mode
from .progress import track
from .target import Target
from .weights import Weights

_SWAPPED = (LowBitLinear, ParallelEmbedding, ExpertStack)
STATE = "_dist_lowbit"  # the attribute of a model that holds its LowBitState


@dataclass(frozen=True)
class LowBitState:
    """What a built model remembers: how it was quantized, planned and grouped."""

    recipe: Recipe
    target: Target
    group: Group
    kept: frozenset[str]  # planned modules that were left as they are
    dtype: torch.dtype = torch.float32  # of activations


def state_of(model: nn.Module) -> LowBitState | None:
    """Return what build noted on a model, None for a model it has not built."""
    return getattr(model, STATE, None)


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _swap(
    model: nn.Module, name: str, split: Split, weights: Weights, group: Group, dtype: torch.dtype, compute: str
) -> None:
    packed = weights.packed(name, split, group.rank)
    if isinstance(model.get_submodule(name), nn.Embedding):
        values = packed.parts["values"].tensor
        set_submodule(model, name, ParallelEmbedding(values, split, group, dtype))
        return
    bias = weights.tensor(f"{name}.bias", split, group.rank)
    bias = bias if bias is None else bias.to(dtype)
    set_submodule(model, name, LowBitLinear(packed, bias, split, group, compute))


def _swap_experts(model: nn.Module, target: Target, weights: Weights, group: Group, compute: str) -> None:
    """Put LowBitExperts in the place of each module whose matrices are stacks of experts."""
    family = target.family
    if family is None or not family.names.experts:
        return
    config: Any = model.config
    top_k, activation = int(setting(config, family.top_k)), activation_of(config, family)
    for up_name in [name for name in target.plan.splits if name.endswith(f"{family.names.experts}.gate_up_proj")]:
        parent = up_name.rpartition(".")[0]
        stacks = []
        for name in (up_name, f"{parent}.down_proj"):
            experts = int(getattr(model.get_submodule(parent), name.rpartition(".")[2]).shape[0])
            split = target.plan.splits[name]
            stacks.append(ExpertStack(weights.packed(name, split, group.rank), experts, split, group, compute))
        set_submodule(model, parent, LowBitExperts(stacks[0], stacks[1], activation, top_k))
        give_back()


def other_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers that lie outside the swapped modules."""
    swapped = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, _SWAPPED))
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(swapped)}


def _fill(model: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
    """Give each remaining tensor its values in `dtype` (integers keep theirs)."""
    filled: dict[int, nn.Parameter] = {}  # a parameter that several names share stays one
    for name, old in other_tensors(model).items():
        value = weights.tensor(name)
        if value is None:
            raise CheckpointError(
                f"no tensor {name} is there to load; the model expects one of shape {tuple(old.shape)}"
            )
        if value.shape != old.shape:
            raise CheckpointError(f"tensor {name} has shape {tuple(value.shape)}; the model expects {tuple(old.shape)}")
        if value.is_floating_point():
            value = value.to(dtype)
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(old, nn.Parameter):
            new = filled.setdefault(id(old), nn.Parameter(value, requires_grad=False))
            owner.register_parameter(leaf, new)
        else:
            owner.register_buffer(leaf, value)
    for module in model.modules():  # buffers that no file holds: positions, masks
        if isinstance(module, _SWAPPED):
            continue
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf in module._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta:
                module.register_buffer(leaf, buffer.to(torch.promote_types(dtype, buffer.dtype)), persistent=False)


def _use_own_steps(model: nn.Module, cut: bool, own_decoder: bool) -> None:
    """Switch a model to the project's attention and silu; where heads are cut it must take them."""
    if not use_attention(model) and not own_decoder:
        what = f"{type(model).__name__} does not take another attention function"
        if cut:
            raise PlanError(f"{what}, which it needs to hold a part of its heads; run it on one rank")
        logger.warning("%s; it keeps its own", what)
    use_activation(model)


def _localize_attention(model: nn.Module, target: Target, rank: int) -> None:
    """Tell each attention module which heads it holds; one without any gives way to IdleAttention."""
    family = target.family
    if family is None or family.own_decoder:
        return
    for name, per_rank in target.plan.heads.items():
        heads: Heads = per_rank[rank]
        module = model.get_submodule(name)
        if heads.heads == 0:
            set_submodule(model, name, IdleAttention(module))
            continue
        module.kv_index = heads.kv_index  # type: ignore[assignment]
        for attribute, field in family.local_heads.items():
            value = getattr(heads, field)
            owner, _, leaf = attribute.rpartition(".")
            if owner:  # the config is shared with all other modules: this one gets its own
                setattr(module, owner, copy.copy(getattr(module, owner)))
                setattr(getattr(module, owner), leaf, value)
            else:
                setattr(module, leaf, value)


def build(
    model: nn.Module,
    target: Target,
    weights: Weights,
    group: Group,
    recipe: Recipe,
    kept: frozenset[str],
    mode: Mode,
) -> nn.Module:
    """Turn a model, live or on meta, into this rank's low-bit one, in place, and return it.

    kept: planned Linears to leave as they are; where the plan cuts them, or the decoder reads them, they become casts
    of their own dtype: held once, in the layout of the kernels.
    mode: how it runs; the project's attention and silu are always used where heads are cut. Peak memory: this rank's
    part, plus one matrix.
    """
    require_decoder(model, target, mode)
    cut = target.plan.tp > 1 and target.family is not None
    if cut and target.family is not None and target.family.own_decoder and not mode.optimize_llm:
        raise PlanError(
            f"Hugging Face's forward of {target.family.model_type} cannot run on a part of the heads; "
            f"leave the decoder (and optimize_llm) on, or run on one rank"
        )
    left = frozenset() if cut or (target.family is not None and mode.optimize_llm) else kept
    experts = f"{target.family.names.experts}." if target.family is not None and target.family.names.experts else None
    todo = [
        (name, split)
        for name, split in target.plan.splits.items()
        if name not in left and (experts is None or experts not in name)
    ]
    for name, split in track(todo, "loading", group.rank):
        _swap(model, name, split, weights, group, mode.dtype, mode.compute)
        give_back()
    _swap_experts(model, target, weights, group, mode.compute)
    _fill(model, weights, mode.dtype)
    if target.family is not None:
        embedding = model.get_submodule(target.family.required[0])
        embedding.scale = target.family.embedding_scale(model.config)  # type: ignore[assignment]
        if (mode.optimize_llm or cut) and target.family.bare is None:
            _use_own_steps(model, cut, target.family.own_decoder)
    if cut:
        _localize_attention(model, target, group.rank)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # head and embedding are two tensors from here on
    if isinstance(config, PreTrainedConfig):
        config.dtype = mode.dtype
    fused = target.family is not None and mode.optimize_llm and use_decoder(model, target, group, mode)
    if not fused and any(split.axis is not None for split in target.plan.splits.values()):
        check_every_call(model if target.family is None else model.get_submodule(target.family.names.base), group)
    if any(isinstance(module, LowBitLinear) and module.kernel == "cpu" for module in model.modules()):
        ops.limit_torch()
    setattr(model, STATE, LowBitState(recipe, target, group, left, mode.dtype))
    return model.eval().requires_grad_(False)
