"""A model of a shape with random weights, made low-bit matrix by matrix: the model itself is nowhere."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lowbit.assembly.attach import attach
from dist_lowbit.assembly.build import build, state_of
from dist_lowbit.assembly.load import load_low_bit
from dist_lowbit.assembly.mode import Mode
from dist_lowbit.assembly.optimize import embeddings, form_under
from dist_lowbit.assembly.skeleton import class_of, empty_model
from dist_lowbit.assembly.source import source_target
from dist_lowbit.assembly.target import Target
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.formats import PackedWeight, lookup
from dist_lowbit.formats.packed import merge
from dist_lowbit.parallel import Split
from dist_lowbit.quantize import Recipe

from .random_weights import generator, random_normal, random_weight
from .shapes import SHAPES, config_of


class RandomWeights:
    """Weights of a model on meta, drawn by the name of each: a rank's part is the same cut of the same whole.

    Linears in the recipe's format, embeddings and what it leaves alone in fp16, norms 1, biases small.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._embeddings = embeddings(model)

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module (see assembly.weights.Weights)."""
        row, group_size = form_under(self._recipe, module, module in self._embeddings) or (lookup("fp16"), -1)
        every = random_weight(row, split.shape, -1 if group_size is None else group_size, generator(module))
        if split.axis is None or split.tp == 1:
            return every
        return merge([every.split(split.axis, start, stop) for start, stop in split.ranges[rank]], split.axis)

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a tensor, or a rank's rows of it (see assembly.weights.Weights)."""
        parent, _, leaf = name.rpartition(".")
        old = getattr(self._model.get_submodule(parent), leaf, None)
        if old is None or not old.is_meta:
            return old  # a buffer: its values are the model's own
        shape = tuple(old.shape)
        if len(shape) > 1:
            value = random_normal(generator(name), shape, 1 / math.sqrt(shape[-1]))
        elif leaf.endswith("bias"):
            value = random_normal(generator(name), shape, 0.02)
        else:
            value = torch.ones(shape)
        if split is None or split.axis != 0 or split.tp == 1:
            return value
        return torch.cat([value[start:stop] for start, stop in split.ranges[rank]])


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its config, format and group size."""

    model: nn.Module
    config: Any
    low_bit: str
    group_size: int


def is_checkpoint(shape: str) -> bool:
    """Return whether a shape is a directory of ours, whose own weights are to be measured."""
    return shape not in SHAPES and (Path(shape) / "lowbit.json").is_file()


def make_model(shape: str, low_bit: str | None, group_size: int | None, group: Group, mode: Mode) -> Subject:
    """Load a checkpoint of ours, or build a shape with random weights. All ranks must call together.

    low_bit, group_size: None is sym_int4, and the format's own; a checkpoint has them already. Cost: a pass over the
    random bytes of every matrix, whole, on every rank; peak memory is this rank's part and one matrix.
    """
    config = config_of(shape)
    model = empty_model(class_of(config), config, Path(shape))
    if is_checkpoint(shape):
        if low_bit is not None or group_size is not None:
            raise UsageError(f"{shape} is a low-bit checkpoint with a format of its own; leave out --low-bit")
        load_low_bit(model, shape, group=group, mode=mode)
    else:
        recipe = Recipe(low_bit or "sym_int4", group_size)
        target, kept = source_target(model, recipe, group.size)
        _check_memory(model, target, recipe, shape)
        build(model, target, RandomWeights(model, recipe), group, recipe, kept, mode)
        attach(model)
    state = state_of(model)
    assert state is not None  # both ways have built it
    return Subject(model, config, state.recipe.format, state.recipe.groups)


def _check_memory(model: nn.Module, target: Target, recipe: Recipe, shape: str) -> None:
    """Refuse a shape whose part of a rank would not fit, before the machine starts to swap."""
    own = embeddings(model)
    bits = 0.0
    for name, split in target.plan.splits.items():
        n, k = split.local_shape(0)
        row, _ = form_under(recipe, name, name in own) or (lookup("fp16"), -1)
        bits += n * k * row.bits
    planned = {f"{name}.weight" for name in target.plan.splits}
    bits += sum(32 * p.numel() for name, p in model.named_parameters() if name not in planned)
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if bits / 8 > held:
        raise UsageError(
            f"{shape} takes {int(bits / 8) >> 20} MiB a rank in {recipe.format}, and this machine has "
            f"{held >> 20} MiB; choose a smaller shape or format"
        )
