"""What a model offers to be swapped: its matrices by name, and the plan over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd as _Convolution
from transformers.pytorch_utils import Conv1D

from dist_lowbit.core.errors import PlanError
from dist_lowbit.core.log import logger
from dist_lowbit.models import Family, dims_of, family_of
from dist_lowbit.parallel import Plan, make_plan, whole_plan

Shape = tuple[int, int]
_TOLD = 0.01  # of a model's weights left in high precision are worth a line


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a matrix product that LowBitLinear can stand in for."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_shape(module: nn.Module) -> Shape:
    """Return (N, K) of a Linear; Conv1D stores its weight as [K, N]."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def linears(model: nn.Module) -> dict[str, Shape]:
    """Return (N, K) of every Linear of a model, by module name."""
    return {name: linear_shape(module) for name, module in model.named_modules() if is_linear(module)}


def _matrices(model: nn.Module) -> dict[str, Shape]:
    """Return every matrix of a model: Linears, embeddings, and any other parameter of two or more dimensions."""
    found = linears(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2 and name.rpartition(".")[0] not in found:
            found[name] = (math.prod(parameter.shape[:-1]), int(parameter.shape[-1]))  # a stack as one matrix
    return found


def _tell_leftovers(model: nn.Module) -> None:
    """Say which matrices stay in high precision because they are no Linears (stacked experts), where they weigh."""
    owners = {n for n, m in model.named_modules() if is_linear(m) or isinstance(m, (nn.Embedding, _Convolution))}
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2}
    left = {name: size for name, size in sizes.items() if name.rpartition(".")[0] not in owners}
    share = sum(left.values()) / max(1, sum(sizes.values()))
    if share >= _TOLD:
        logger.warning(
            "%d matrices with %.0f%% of the weights are no Linears and stay in high precision, such as %s",
            len(left),
            100 * share,
            next(iter(left)),
        )


@dataclass(frozen=True)
class Target:
    """A model's plan, with the family it came from (None: Linear by Linear, nothing cut)."""

    family: Family | None
    plan: Plan


def family_for(model: nn.Module) -> Family | None:
    """Return the family of a model by its config's model_type, None for models without one or unknown ones."""
    config = getattr(model, "config", None)
    family = family_of(config) if config is not None else None
    # A base model without its head, or a head of another kind, has other module names than the family's.
    return None if family is None or _lacking(model, family) else family


def family_why_not(model: nn.Module) -> str:
    """Return why family_for finds no family, as the beginning of a sentence."""
    config = getattr(model, "config", None)
    family = family_of(config) if config is not None else None
    if family is None:
        return f"{getattr(config, 'model_type', None) or type(model).__name__} is no known family"
    return (
        f"{type(model).__name__} is not built as the causal language models of the family {family.model_type} are (it "
        f"has no {_lacking(model, family)[0]})"
    )


def _lacking(model: nn.Module, family: Family) -> list[str]:
    return [name for name in family.required if not _has(model, name)]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def make_target(model: nn.Module, block_of: Callable[[str], int], tp: int, convert: Callable[[str], bool]) -> Target:
    """Plan a model for tp ranks.

    block_of: the summation block of a module's weight. convert: whether an unplanned Linear is to be swapped.
    A known family is cut by its roles; for an unknown one every rank holds the whole model, and a line says so.
    """
    family = family_for(model)
    if family is not None:
        config: Any = model.config
        dims = dims_of(family, config)
        plan = make_plan(_matrices(model), family.roles, family.keep, dims, block_of, tp)
        return Target(family, plan)
    shapes: Mapping[str, Shape] = {name: shape for name, shape in linears(model).items() if convert(name)}
    if tp > 1:
        logger.warning("%s: each of the %d ranks holds the whole model", family_why_not(model), tp)
    if not shapes and not linears(model):
        raise PlanError(f"{type(model).__name__} has no Linear layer, so there is nothing to quantize")
    _tell_leftovers(model)
    return Target(None, whole_plan(shapes, block_of, tp))
