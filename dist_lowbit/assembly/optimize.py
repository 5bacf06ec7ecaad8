"""Quantize a live model in place: the one-line call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_lowbit.comm import Group, SingleGroup
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.formats import Format
from dist_lowbit.formats.packed import BLOCK, summation_block
from dist_lowbit.quantize import Recipe

from .attach import attach
from .build import build, state_of
from .deepspeed import ShardWeights, group_of, plan_like, split_layers, stand_ins
from .mode import Mode, mode_here
from .ranks import require_group
from .target import linears, make_target
from .together import together
from .weights import ModelWeights

_MODE = ("torch_dtype", "compute", "decoder", "kv_cache_dtype", "device")
OPTIONS = (*_MODE, "group_size")  # of the calls that quantize
_SHOWN = 8  # names of modules in a line that suggests some: a decoder's layer has seven Linears


def read_options(
    kwargs: dict[str, Any], caller: str, known: tuple[str, ...] = OPTIONS, named: tuple[str, ...] = ()
) -> tuple[int | None, Mode]:
    """Return the group size and the mode that the further options of a call ask for.

    An unknown option is a UsageError listing `known`; with `named`, which the caller has taken already, before them.
    """
    unknown = sorted(kwargs.keys() - set(known))
    if unknown:
        which = "arguments" if named else "further arguments"
        raise UsageError(f"{caller} has no argument {unknown[0]!r}; its {which} are {', '.join((*named, *known))}")
    return kwargs.get("group_size"), mode_here(**{name: kwargs.get(name) for name in _MODE})


def mode_options(kwargs: dict[str, Any], caller: str, named: tuple[str, ...] = ()) -> Mode:
    """Return the mode alone, for what is quantized already (see read_options)."""
    return read_options(kwargs, caller, _MODE, named)[1]


def block_under(recipe: Recipe, name: str) -> int:
    """Return the summation block that a recipe gives a module's weight."""
    row = recipe.format_for(name)
    return BLOCK if row is None else summation_block(recipe.groups)


def form_under(recipe: Recipe, name: str, embedding: bool) -> tuple[Format, int | None] | None:
    """Return the format of a module's weight, None for what keeps its own dtype (embeddings, excluded modules)."""
    row = None if embedding else recipe.format_for(name)
    return None if row is None else (row, recipe.groups)


def embeddings(model: nn.Module) -> set[str]:
    """Return the names of a model's embeddings."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def transposed_linears(model: nn.Module) -> set[str]:
    """Return the names of Linears that store their weight as [K, N]."""
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _one_of_each(names: Iterable[str]) -> list[str]:
    """Return the first few names that end differently: layers repeat the same ones."""
    ends: dict[str, str] = {}
    for name in names:
        ends.setdefault(name.rpartition(".")[2], name)
    return [*list(ends.values())[:_SHOWN], *(["..."] if len(ends) > _SHOWN else [])]


def excluded(model: nn.Module, recipe: Recipe) -> frozenset[str]:
    """Return the Linears that a recipe leaves in high precision."""
    names = linears(model)
    # A line and no error: the ancestors take such patterns in silence, and lists are written for several models at once
    # (neural-compressor's own default names the heads of three families).
    for pattern in recipe.unused(names):
        some = ", ".join(_one_of_each(names))
        logger.warning("modules_to_not_convert: %r matches no Linear of this model, which has %s", pattern, some)
    return frozenset(name for name in names if recipe.keeps(name))


def optimize(model: nn.Module, recipe: Recipe, group: Group | None, mode: Mode) -> nn.Module:
    """Quantize the Linears of a live CPU model by a recipe, in place, split over `group`; return the model."""
    group = require_group(group)
    if state_of(model) is not None:
        raise UsageError("this model is already low-bit; start from the original weights to quantize it another way")
    devices = {value.device.type for value in model.parameters()} - {"cpu"}
    if devices == {"meta"}:
        raise UsageError("this model has no weights (device meta); load them first, or use load_low_bit")
    if devices:
        raise UsageError(f"this model is on {', '.join(sorted(devices))}; move it to the cpu before optimize_model")
    layers = split_layers(model)
    if layers:
        return _optimize_split(model, layers, recipe, group_of(layers, group), mode)
    group = group or SingleGroup()
    own = embeddings(model)
    kept = excluded(model, recipe)
    weights = ModelWeights(model, lambda name: form_under(recipe, name, name in own), transposed_linears(model))
    with together(group):
        target = make_target(model, lambda name: block_under(recipe, name), group.size, lambda name: name not in kept)
        build(model, target, weights, group, recipe, kept, mode)
    return attach(model)


def _optimize_split(
    model: nn.Module, layers: Mapping[str, nn.Module], recipe: Recipe, group: Group, mode: Mode
) -> nn.Module:
    """Quantize a model whose Linears DeepSpeed has split over the ranks of `group`."""
    with together(group), stand_ins(model, layers, group) as shards:
        own, kept = embeddings(model), excluded(model, recipe)

        def form_of(name: str) -> tuple[Format, int | None] | None:
            return form_under(recipe, name, name in own)

        def block_of(name: str) -> int:
            return block_under(recipe, name)

        target = make_target(model, block_of, group.size, lambda name: name not in kept)
        if target.family is None:
            target = replace(target, plan=plan_like(shards, target.plan, block_of))
            kept -= shards.keys()
        whole = ModelWeights(model, form_of, transposed_linears(model))
        build(model, target, ShardWeights(whole, shards, form_of, group), group, recipe, kept, mode)
    return attach(model)
