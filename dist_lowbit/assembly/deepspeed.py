"""Models that DeepSpeed has split: its layers give way to plain ones without weights, and their shards are the source.

So a split model is planned and built as any other. Where DeepSpeed cuts a matrix as the plan does, a rank's shard is
used as it is; else (uneven heads, the head that DeepSpeed cuts along K) the ranks put that one matrix together.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_lowbit.comm import Group, init_group
from dist_lowbit.comm.backends import subgroup_info
from dist_lowbit.core.errors import PlanError, UsageError
from dist_lowbit.core.rank import current
from dist_lowbit.formats import Format, PackedWeight
from dist_lowbit.parallel import Plan, Split
from dist_lowbit.parallel.units import Range
from dist_lowbit.quantize import rtn

from .build import set_submodule
from .weights import FormOf, ModelWeights, cast_row, cut_rows, quantize_part

_LAYERS = "deepspeed.module_inject.layers"
_CLASSES = {"LinearLayer": 0, "LinearAllreduce": 1, "LmHeadLinearAllreduce": 1}  # the axis that each of them cuts


@dataclass(frozen=True)
class Shard:
    """This rank's part of a Linear, and what all ranks hold along the axis that it is cut by."""

    axis: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    ranges: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K) of the whole."""
        size = self.ranges[-1][1]
        return (size, self.weight.shape[1]) if self.axis == 0 else (self.weight.shape[0], size)

    def fits(self, split: Split) -> bool:
        """Return whether every rank holds just what a split gives it."""
        return split.axis == self.axis and split.ranges == tuple((held,) for held in self.ranges)

    def gather(self, local: torch.Tensor, axis: int, group: Group) -> torch.Tensor:
        """Return the parts of all ranks as one. All must call together."""
        return group.all_gather(local.detach().contiguous(), axis, [stop - start for start, stop in self.ranges])


def split_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that DeepSpeed has split, by name; none where DeepSpeed is not in use."""
    layers = sys.modules.get(_LAYERS)
    if layers is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, layers.TensorParallel_Layer)}


def group_of(layers: Mapping[str, nn.Module], group: Group | None) -> Group:
    """Return our group of the ranks that DeepSpeed split over; `group`, where given, must be of as many ranks."""
    groups = {id(m.mp_group): m.mp_group for m in layers.values() if getattr(m, "mp_group", None) is not None}
    if len(groups) != 1:
        raise UsageError(f"DeepSpeed split this model over {len(groups)} groups of ranks; expected one")
    theirs: Any = next(iter(groups.values()))
    ranks = dist.get_process_group_ranks(theirs)
    if group is not None:
        if (group.rank, group.size) != (ranks.index(dist.get_rank()), len(ranks)):
            raise UsageError(
                f"this is rank {group.rank} of {group.size} of the group given, but DeepSpeed split the model over "
                f"ranks {ranks}; leave the group out, or give one of the same ranks in the same order"
            )
        return group
    store = dist.distributed_c10d._get_default_store()
    prefix = "deepspeed/" + ".".join(map(str, ranks))
    return init_group(rank_info=subgroup_info(current(), ranks), prefix=prefix, store=store)


def _axis_of(name: str, module: nn.Module) -> int:
    axis = _CLASSES.get(type(module).__name__)
    if axis is None:
        raise PlanError(
            f"DeepSpeed split {name} in a way of its own ({type(module).__name__}); split the model with "
            f"dist_lowbit.init_inference instead"
        )
    return axis


@contextlib.contextmanager
def stand_ins(model: nn.Module, layers: Mapping[str, nn.Module], group: Group) -> Iterator[dict[str, Shard]]:
    """Put a Linear on meta, of the whole shape, in the place of every split layer; put the layers back on an error.

    Yields their shards. All ranks must call together.
    """
    axes = {name: _axis_of(name, module) for name, module in layers.items()}
    widths = [dict(pair) for pair in group.gather_object([[n, m.weight.shape[axes[n]]] for n, m in layers.items()])]  # type: ignore[index]
    shards = {}
    for name, module in layers.items():
        edges = [0]
        for own in widths:
            edges.append(edges[-1] + own[name])
        weight, bias = module.weight, module.bias
        assert isinstance(weight, torch.Tensor)
        assert bias is None or isinstance(bias, torch.Tensor)
        shards[name] = Shard(axes[name], weight.detach(), bias, tuple(pairwise(edges)))
    try:
        for name, shard in shards.items():
            n, k = shard.shape
            linear = nn.Linear(k, n, bias=shard.bias is not None, device="meta", dtype=shard.weight.dtype)
            set_submodule(model, name, linear)
        yield shards
    except BaseException:
        for name, module in layers.items():
            set_submodule(model, name, module)
        raise


def plan_like(shards: Mapping[str, Shard], plan: Plan, block_of: Callable[[str], int]) -> Plan:
    """Return a plan of whole matrices with DeepSpeed's cuts for its shards: for families that no plan is known of.

    A cut of K inside a summation block is a PlanError.
    """
    splits = dict(plan.splits)
    for name, shard in shards.items():
        unit = block_of(name)
        inside = [start for start, _ in shard.ranges if start % unit]
        if shard.axis == 1 and inside:
            raise PlanError(
                f"DeepSpeed cut K of {name} at {inside[0]}, inside a summation block of {unit}; quantize with a "
                "smaller group_size that divides it"
            )
        splits[name] = Split(shard.shape, shard.axis, tuple((held,) for held in shard.ranges), unit)
    return Plan(plan.tp, splits, plan.heads)


class ShardWeights:
    """The weights of a model that DeepSpeed has split, quantized on the way out. All ranks must ask together."""

    def __init__(self, model: ModelWeights, shards: dict[str, Shard], form_of: FormOf, group: Group) -> None:
        self._model, self._shards, self._form_of, self._group = model, dict(shards), form_of, group
        self._biases: dict[str, Shard] = {}

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, quantized by round-to-nearest."""
        shard = self._shards.pop(module, None)  # its memory is free once it is quantized
        if shard is None:
            return self._model.packed(module, split, rank)
        form: tuple[Format, int | None] = self._form_of(module) or (cast_row(shard.weight.dtype), None)
        name = f"{module}.weight"
        if shard.bias is not None:
            self._biases[f"{module}.bias"] = shard
        whole_rows = shard.axis == 1 and form[1] == -1  # one scale for the row, which no rank sees whole
        if shard.fits(split) and not whole_rows:
            return rtn(shard.weight, *form, name)
        matrix = shard.gather(shard.weight, shard.axis, self._group)
        return quantize_part(lambda start, stop: matrix[start:stop], form, split, rank, name)

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a parameter or buffer of the model."""
        shard = self._biases.pop(name, None)
        if shard is None:
            return self._model.tensor(name, split, rank)
        assert shard.bias is not None
        if shard.axis == 1:
            return cut_rows(shard.bias.detach(), split, rank)
        if split is not None and shard.fits(split):
            return shard.bias.detach()
        return cut_rows(shard.gather(shard.bias, 0, self._group), split, rank)
