"""Where the parts of a model come from: a live model, its source files, or a low-bit checkpoint.

All three answer the same two questions, for one rank at a time and touching only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from dist_lowbit.checkpoint import CheckpointReader, TensorSource
from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import Format, PackedWeight, dequantize, lookup
from dist_lowbit.parallel import Split
from dist_lowbit.quantize import rtn

# The format and group size of a module's weight, or None for the cast that keeps its own dtype.
FormOf = Callable[[str], tuple[Format, int | None] | None]


class Weights(Protocol):
    """A source of weights and tensors."""

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module."""
        ...

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a tensor, or a rank's rows of it under a split of axis 0; None where there is none."""
        ...


def quantize_part(
    read: Callable[[int, int], torch.Tensor], form: tuple[Format, int | None], split: Split, rank: int, name: str
) -> PackedWeight:
    """Quantize a rank's part of a matrix. read(start, stop) returns rows of it, [stop - start, K].

    Rows are independent in every format, and groups lie inside a cut of K, so cutting before quantizing gives the
    same codes; only a group that spans the whole row is quantized first and cut after.
    """
    row, group_size = form
    n, _ = split.shape
    if split.axis is None:
        return rtn(read(0, n), row, group_size, name)
    if split.axis == 0:
        rows = torch.cat([read(start, stop) for start, stop in split.ranges[rank]])
        return rtn(rows, row, group_size, name)
    ((start, stop),) = split.ranges[rank]
    if group_size == -1:
        return rtn(read(0, n), row, group_size, name).split(1, start, stop)
    return rtn(read(0, n)[:, start:stop], row, group_size, name)


def cut_rows(tensor: torch.Tensor, split: Split | None, rank: int) -> torch.Tensor:
    """Return a rank's rows of a tensor under a split of axis 0; all of them under any other."""
    if split is None or split.axis != 0 or split.tp == 1:
        return tensor
    return torch.cat([tensor[start:stop] for start, stop in split.ranges[rank]])


_CASTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def cast_name(dtype: torch.dtype | None) -> str:
    """Return the format that stores values of a dtype as they are (fp32 for wider or stranger ones)."""
    return _CASTS.get(dtype, "fp32") if dtype is not None else "fp32"


class ModelWeights:
    """The weights of a live model, quantized on the way out."""

    def __init__(self, model: nn.Module, form_of: FormOf, transposed: set[str]) -> None:
        self._model, self._form_of, self._transposed = model, form_of, transposed

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, quantized by round-to-nearest."""
        weight = self._model.get_submodule(module).weight
        assert isinstance(weight, torch.Tensor)
        matrix = weight.detach().t() if module in self._transposed else weight.detach()
        form = self._form_of(module) or (cast_row(matrix.dtype), None)
        return quantize_part(lambda start, stop: matrix[start:stop], form, split, rank, f"{module}.weight")

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a parameter or buffer of the model."""
        parent, _, leaf = name.rpartition(".")
        value = getattr(self._model.get_submodule(parent), leaf, None)
        return None if value is None else cut_rows(value.detach(), split, rank)


def cast_row(dtype: torch.dtype | None) -> Format:
    """Return the format that keeps values of a dtype as they are."""
    return lookup(cast_name(dtype))


class SourceWeights:
    """The weights of ordinary model files, read piece by piece and quantized on the way."""

    def __init__(self, source: TensorSource, form_of: FormOf, transposed: set[str], aliases: dict[str, str]) -> None:
        """aliases: name -> the name that holds its values where it is missing (tied weights)."""
        self._source, self._form_of = source, form_of
        self._transposed, self._aliases = transposed, aliases

    def has(self, name: str) -> bool:
        """Return whether the files hold a tensor, under its own or its tied name."""
        return self._find(name) is not None

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype in which the files hold a tensor; None for one that torch does not know."""
        found = self._find(name)
        return None if found is None else self._source[found].dtype

    def _find(self, name: str) -> str | None:
        for candidate in (name, self._aliases.get(name)):
            if candidate is not None and candidate in self._source:
                return candidate
        return None

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, quantized by round-to-nearest."""
        name = self._find(f"{module}.weight")
        if name is None:
            raise CheckpointError(f"{self._source.directory} holds no tensor {module}.weight; expected {split.shape}")
        if module in self._transposed:
            matrix = self._source.read(name).t()

            def read(start: int, stop: int) -> torch.Tensor:
                return matrix[start:stop]
        else:

            def read(start: int, stop: int) -> torch.Tensor:
                return self._source.read(name, start, stop)

        info = self._source[name]
        shape = tuple(reversed(info.shape)) if module in self._transposed else tuple(info.shape)
        if shape != split.shape:
            raise CheckpointError(
                f"{name} in {self._source.directory} has shape {shape}; the model expects {split.shape}"
            )
        form = self._form_of(module) or (cast_row(info.dtype), None)
        return quantize_part(read, form, split, rank, name)

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a tensor of the files."""
        found = self._find(name)
        return None if found is None else cut_rows(self._source.read(found), split, rank)


class CheckpointWeights:
    """The weights of a low-bit checkpoint, as they are."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, merged from whatever shards hold it."""
        name = f"{module}.weight"
        info = self._reader.weights.get(name)
        if info is None and name in self._reader.tensors:  # a Linear that was left as it was, now to be cut
            matrix = self._reader.read_tensor(name)
            form = (cast_row(matrix.dtype), None)
            return quantize_part(lambda start, stop: matrix[start:stop], form, split, rank, name)
        if info is None:
            raise CheckpointError(f"{self._reader.directory} holds no weight {name}; it is of another model")
        if tuple(info.shape) != split.shape:
            raise CheckpointError(
                f"weight {name} in {self._reader.directory} has shape {tuple(info.shape)}; "
                f"the model expects {split.shape}"
            )
        if split.axis is None or split.tp == 1:
            return self._reader.read_weight(name)
        return self._reader.read_weight(name, split.axis, list(split.ranges[rank]))

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a tensor of the checkpoint."""
        if name in self._reader.weights:  # a Linear that was stored as a cast, now left as it is
            return cut_rows(dequantize(self._reader.read_weight(name)), split, rank)
        if name not in self._reader.tensors:
            return None
        return cut_rows(self._reader.read_tensor(name), split, rank)
