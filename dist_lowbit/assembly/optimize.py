"""Quantize a live model in place: the one-line call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_lowbit.comm import Group, SingleGroup
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.core.settings import settings
from dist_lowbit.formats import Format
from dist_lowbit.formats.packed import BLOCK, summation_block
from dist_lowbit.quantize import Recipe

from .attach import attach
from .build import build, state_of
from .target import linears, make_target
from .together import together
from .weights import ModelWeights

_OPTIONS = ("torch_dtype", "group_size", "compute")


def read_options(kwargs: dict[str, Any], caller: str, known: tuple[str, ...] = _OPTIONS) -> dict[str, Any]:
    """Return the further options of a call with defaults filled in; an unknown one is a UsageError listing `known`."""
    unknown = sorted(kwargs.keys() - set(known))
    if unknown:
        raise UsageError(f"{caller} has no argument {unknown[0]!r}; its further arguments are {', '.join(known)}")
    options: dict[str, Any] = dict.fromkeys(_OPTIONS) | kwargs
    options["compute"] = options["compute"] or settings().compute
    if options["compute"] not in ("int8", "fp32"):
        raise UsageError(f"compute is {options['compute']!r}; expected int8 or fp32")
    options["torch_dtype"] = as_dtype(options["torch_dtype"])
    return options


def as_dtype(value: Any) -> torch.dtype:
    """Return a dtype of activations from a dtype, its name, or None / "auto" (fp32, the one all CPUs are fast at)."""
    if value is None or value == "auto":
        return torch.float32
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"torch_dtype is {value!r}; expected float32, float16, bfloat16 or auto")
    assert isinstance(found, torch.dtype)
    return found


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


def excluded(model: nn.Module, recipe: Recipe) -> frozenset[str]:
    """Return the Linears that a recipe leaves in high precision."""
    names = linears(model)
    for pattern in recipe.unused(names):
        logger.warning("modules_to_not_convert: %r matches no Linear of this model", pattern)
    return frozenset(name for name in names if recipe.keeps(name))


def optimize(
    model: nn.Module, recipe: Recipe, group: Group | None, optimize_llm: bool, torch_dtype: torch.dtype, compute: str
) -> nn.Module:
    """Quantize the Linears of a live CPU model by a recipe, in place, split over `group`; return the model."""
    if state_of(model) is not None:
        raise UsageError("this model is already low-bit; start from the original weights to quantize it another way")
    devices = {value.device.type for value in model.parameters()} - {"cpu"}
    if devices == {"meta"}:
        raise UsageError("this model has no weights (device meta); load them first, or use load_low_bit")
    if devices:
        raise UsageError(f"this model is on {', '.join(sorted(devices))}; move it to the cpu before optimize_model")
    group = group or SingleGroup()
    own = embeddings(model)
    kept = excluded(model, recipe)
    weights = ModelWeights(model, lambda name: form_under(recipe, name, name in own), transposed_linears(model))
    with together(group):
        target = make_target(model, lambda name: block_under(recipe, name), group.size, lambda name: name not in kept)
        build(
            model, target, weights, group, recipe, kept, dtype=torch_dtype, compute=compute, optimize_llm=optimize_llm
        )
    return attach(model)
