"""Load a low-bit checkpoint into a model, on one rank or many, whatever number of ranks saved it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dist_lowbit.checkpoint import CheckpointReader
from dist_lowbit.comm import Group, SingleGroup
from dist_lowbit.core.errors import CheckpointError, UsageError
from dist_lowbit.formats.packed import BLOCK, summation_block
from dist_lowbit.quantize import Recipe

from .attach import attach
from .build import build, other_tensors, state_of
from .mode import Mode, as_dtype, mode_here
from .paths import require_checkpoint, require_path
from .ranks import require_group
from .target import make_target
from .together import together
from .weights import CheckpointWeights


def load_low_bit(
    model: nn.Module,
    model_path: str | Path | None,
    *,
    group: Group | None = None,
    mode: Mode | None = None,
) -> nn.Module:
    """Load a checkpoint of save_low_bit into a model of the same architecture, in place, and return it.

    model: on meta (see low_memory_init) or loaded the ordinary way; its own weights are dropped. group: the ranks to
    split over (None: one), independent of how many ranks saved. All ranks must call together. Reads this rank's
    bytes only, and verifies their checksums: damage that any rank finds is a CheckpointError naming file and tensor, on
    all ranks. mode: how to run (None: as the settings say); where it leaves the dtype open, that of the saved model.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"load_low_bit takes a model and a directory, and the model is a {type(model).__name__}; make one under "
            "low_memory_init(), or call dist_lowbit.transformers.AutoModelForCausalLM.load_low_bit(directory)"
        )
    group = require_group(group)
    path = require_checkpoint(require_path(model_path, "load_low_bit", "a model and the directory to load into it"))
    if state_of(model) is not None:
        raise UsageError("this model is already low-bit; build a fresh one with low_memory_init to load into")
    group = group or SingleGroup()
    with together(group), CheckpointReader(path) as reader:
        recipe, kept, dtype = _how(reader)
        mode = mode or mode_here()
        mode = replace(mode, dtype=dtype) if mode.dtype_open else mode
        weights = CheckpointWeights(reader)
        target = make_target(model, _blocks(reader), group.size, lambda name: f"{name}.weight" in reader.weights)
        _check_names(model, reader, path)
        build(model, target, weights, group, recipe, kept, mode)
    return attach(model)


def _how(reader: CheckpointReader) -> tuple[Recipe, frozenset[str], torch.dtype]:
    """Return the recipe that a checkpoint was quantized by, the modules that it left alone, and the model's dtype."""
    recipe, kept = reader.metadata.get("recipe"), reader.metadata.get("kept")
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise CheckpointError(
            f"the metadata in {reader.directory} says {kept!r:.200} of the modules kept; expected a list of names"
        )
    try:
        dtype = as_dtype(reader.metadata.get("dtype"))
    except UsageError as error:
        raise CheckpointError(f"the metadata in {reader.directory} cannot be read: {error}") from error
    return Recipe.from_json(recipe), frozenset(kept), dtype


def _blocks(reader: CheckpointReader) -> Callable[[str], int]:
    def block_of(name: str) -> int:
        info = reader.weights.get(f"{name}.weight")
        return BLOCK if info is None else summation_block(info.group_size)

    return block_of


def _check_names(model: nn.Module, reader: CheckpointReader, path: Path) -> None:
    """Refuse a checkpoint of another model: every stored name must be one of the model's."""
    known = set(other_tensors(model)) | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {f"{name}.weight" for name in known}  # a stack of experts is stored as a weight
    strange = sorted(name for name in [*reader.weights, *reader.tensors] if name not in known)
    if strange:
        raise CheckpointError(
            f"{path} holds {strange[0]} and {len(strange) - 1} more that {type(model).__name__} has not; "
            f"it was saved from another model"
        )
