"""A model split over ranks by the call that DeepSpeed's users write, without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lowbit.checkpoint import TensorSource, is_checkpoint
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.formats import cast_name
from dist_lowbit.quantize import Recipe

from .attach import attach
from .build import build
from .hub import resolve_together
from .load import load_low_bit
from .mode import Mode
from .optimize import optimize
from .ranks import join_ranks
from .save import save_low_bit
from .source import missing, source_target, source_weights
from .together import together


class InferenceEngine(nn.Module):
    """What init_inference returns: `module` is the model, and calls, generate and every other name go to it."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__()
        self.module = model
        self.group = group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def read_tensor_parallel(value: Any) -> int | str | Group:
    """Return what "tensor_parallel" asks for, in join_ranks' words: a dict with tp_size or tp_group, or those alone."""
    if value is None:
        return "auto"
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]
    unknown = sorted(value.keys() - {"tp_size", "tp_group", "enabled", "tp_grain_size", "mpu"})
    if unknown:
        raise UsageError(f"tensor_parallel has no entry {unknown[0]!r}; expected tp_size, or tp_group with a Group")
    if value.get("tp_group") is not None:
        if not isinstance(value["tp_group"], Group):
            raise UsageError(f"tp_group is a {type(value['tp_group']).__name__}; expected a Group of init_group")
        return value["tp_group"]
    return int(value.get("tp_size", 1)) if value.get("enabled", True) else 1


def checkpoint_path(value: str | Path | Mapping[str, Any], base_dir: str | None) -> str:
    """Return the directory or hub id of a checkpoint: itself, or where the files of DeepSpeed's description lie.

    The description is a dict, or a .json file, with "checkpoints" (a list of files) and perhaps "base_dir".
    """
    if not isinstance(value, Mapping):
        if not str(value).endswith(".json"):
            return str(value)
        try:
            loaded = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"the checkpoint description {value} cannot be read: {error}") from error
        if not isinstance(loaded, dict):
            raise UsageError(f"the checkpoint description {value} holds a {type(loaded).__name__}; expected an object")
        value = loaded
    files = value.get("checkpoints")
    if not isinstance(files, list) or not files or not all(isinstance(name, str) for name in files):
        raise UsageError("the checkpoint description has no list of files under 'checkpoints'; give a model directory")
    base = Path(value.get("base_dir") or base_dir or ".")
    folders = {(base / name).parent for name in files}
    if len(folders) != 1:
        raise UsageError(f"the checkpoint's files lie in {len(folders)} folders; expected one model directory")
    return str(folders.pop())


def split_model(
    model: nn.Module,
    tensor_parallel: Any,
    low_bit: str | None,
    group_size: int | None,
    mode: Mode,
    *,
    keep: tuple[str, ...] = (),
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    base_dir: str | None = None,
    save_path: str | Path | None = None,
) -> InferenceEngine:
    """Split and quantize a live model, or one on meta from a checkpoint; save it where asked. All ranks together."""
    group, local_rank = join_ranks(read_tensor_parallel(tensor_parallel), mode.device)
    empty = any(value.is_meta for value in model.parameters())
    if checkpoint is not None:
        directory = resolve_together(checkpoint_path(checkpoint, base_dir), group, local_rank)
        if is_checkpoint(directory):
            if low_bit is not None:
                raise UsageError(f"{directory} is a low-bit checkpoint already; drop low_bit, or give the original")
            load_low_bit(model, directory, group=group, mode=mode)
        else:
            recipe = Recipe(low_bit or _own_format(model), group_size, keep)
            _from_files(model, directory, recipe, group, mode)
    elif empty:
        raise UsageError("this model has no weights (device meta); name them by checkpoint=")
    else:
        optimize(model, Recipe(low_bit or _own_format(model), group_size, keep), group, mode)
    if save_path is not None:
        save_low_bit(model, save_path)
    return InferenceEngine(model, group)


def _from_files(model: nn.Module, directory: Path, recipe: Recipe, group: Group, mode: Mode) -> None:
    """Quantize a model from ordinary files, this rank's part only, whatever its own parameters hold."""
    with together(group), TensorSource(directory) as source:
        weights = source_weights(model, source, recipe)
        absent = missing(model, weights)
        if absent:
            raise UsageError(
                f"{directory} holds no tensor {absent[0]} of this {type(model).__name__}; it is of another model, or "
                "its names differ: load it by from_pretrained, and leave checkpoint out"
            )
        target, kept = source_target(model, recipe, group.size)
        build(model, target, weights, group, recipe, kept, mode)
    attach(model)


def _own_format(model: nn.Module) -> str:
    """Return the cast that keeps the dtype of a model's weights."""
    return cast_name(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
