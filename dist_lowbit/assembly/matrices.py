"""Matrices of model files as rows to read, however the files hold them: whole, transposed, or expert by expert."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from dist_lowbit.checkpoint import TensorSource

Names = tuple[str, ...]


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix (N, K) of some files: read(start, stop) returns rows of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[int, int], torch.Tensor]


def plain_matrix(source: TensorSource, name: str) -> SourceMatrix:
    """Return a tensor [N, K] as it is; of three dimensions, [E, N, K], as (E N, K)."""
    info = source[name]
    if len(info.shape) != 3:
        return SourceMatrix(tuple(info.shape), info.dtype, lambda start, stop: source.read(name, start, stop))
    experts, rows, k = info.shape

    def read(start: int, stop: int) -> torch.Tensor:
        first = start // rows
        stack = source.read(name, first, -(-stop // rows)).flatten(0, 1)
        return stack[start - first * rows : stop - first * rows]

    return SourceMatrix((experts * rows, k), info.dtype, read)


def transposed_matrix(source: TensorSource, name: str) -> SourceMatrix:
    """Return a tensor [K, N] as (N, K); it is read whole, once."""
    matrix = source.read(name).t()
    return SourceMatrix(tuple(matrix.shape), source[name].dtype, lambda start, stop: matrix[start:stop])


def with_unit_rows(matrix: SourceMatrix) -> SourceMatrix:
    """Return a matrix with its rows brought to length 1, in fp32."""

    def read(start: int, stop: int) -> torch.Tensor:
        return nn.functional.normalize(matrix.read(start, stop).float(), eps=0.0)

    return SourceMatrix(matrix.shape, torch.float32, read)


def joined_matrix(source: TensorSource, names: Names) -> SourceMatrix:
    """Return tensors of one width, one below the other, as one matrix."""
    begins = [0]
    for name in names:
        begins.append(begins[-1] + source[name].shape[0])
    first = source[names[0]]

    def read(start: int, stop: int) -> torch.Tensor:
        parts = []
        for name, begin, end in zip(names, begins, begins[1:], strict=False):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                parts.append(source.read(name, low - begin, high - begin))
        return torch.cat(parts) if parts else source.read(names[0], 0, 0)

    return SourceMatrix((begins[-1], *first.shape[1:]), first.dtype, read)


def other_names(model: nn.Module, source: TensorSource) -> tuple[dict[str, str], dict[str, Names]]:
    """Return what a model's names are in its files, where they differ as transformers changes them on loading.

    First one to one; then the stacks of experts, whose parts (such as gate and up of expert 0, of expert 1, ...) are
    tensors of their own. What transformers joins in another way is left out.
    """
    state = model.state_dict()
    if not isinstance(model, PreTrainedModel) or all(name in source for name in state):
        return {}, {}
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    places = {pattern: place for step in converters for pattern, place in _places(step).items()}
    renamed: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in source:
        if name in state:
            continue
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if own in state and pattern is None:
            renamed[own] = name
        elif own in state and pattern in places:
            number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
            if number is not None:
                parts.setdefault(own, {})[int(number[1]), places[pattern]] = name
    return renamed, {own: tuple(found[place] for place in sorted(found)) for own, found in parts.items()}


def _places(step: WeightConverter) -> dict[str, int]:
    """Return the place of each of a step's patterns among the rows of an expert; none for what is no such stack."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in step.operations]
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return {}
    return {pattern: place for place, pattern in enumerate(step.source_patterns)}
