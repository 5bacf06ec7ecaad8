"""Where the parts of a model come from: a live model, its source files, or a low-bit checkpoint.

All three answer the same two questions, for one rank at a time and touching only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Protocol

import torch
from torch import nn

from dist_lowbit.checkpoint import CheckpointReader, TensorSource
from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import Format, PackedWeight, cast_name, dequantize, lookup
from dist_lowbit.formats.packed import merge
from dist_lowbit.parallel import Split
from dist_lowbit.quantize import rtn

from .matrices import SourceMatrix, joined_matrix, plain_matrix, transposed_matrix, with_unit_rows

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


# Elements of a matrix that are quantized at a time: rows are independent, so a stack of experts is never widened whole.
_AT_ONCE = 1 << 26


def quantize_part(
    read: Callable[[int, int], torch.Tensor], form: tuple[Format, int | None], split: Split, rank: int, name: str
) -> PackedWeight:
    """Quantize a rank's part of a matrix. read(start, stop) returns rows of it, [stop - start, K].

    Rows are independent in every format, and groups lie inside a cut of K, so cutting before quantizing gives the
    same codes; only a group that spans the whole row is quantized first and cut after.
    """
    row, group_size = form
    n, k = split.shape
    held = split.ranges[rank] if split.axis == 0 else ((0, n),)
    step = max(1, _AT_ONCE // max(k, 1))
    pieces = [(at, min(at + step, stop)) for start, stop in held for at in range(start, stop, step)] or [held[0]]
    if split.axis != 1:
        return _joined(rtn(rows, row, group_size, name) for rows in _gathered(read, pieces, step))
    ((start, stop),) = split.ranges[rank]
    if group_size == -1:
        return _joined(rtn(read(a, b), row, group_size, name).split(1, start, stop) for a, b in pieces)
    return _joined(rtn(read(a, b)[:, start:stop], row, group_size, name) for a, b in pieces)


def _gathered(
    read: Callable[[int, int], torch.Tensor], pieces: Sequence[tuple[int, int]], step: int
) -> Iterator[torch.Tensor]:
    """Yield the rows of all pieces in order, about `step` rows at a time."""
    waiting: list[torch.Tensor] = []
    count = 0
    for start, stop in pieces:
        waiting.append(read(start, stop))
        count += stop - start
        if count >= step:
            yield torch.cat(waiting)
            waiting, count = [], 0
    if waiting:
        yield torch.cat(waiting)


def _joined(weights: Iterable[PackedWeight]) -> PackedWeight:
    parts = list(weights)
    return parts[0] if len(parts) == 1 else merge(parts, 0)


def matrix_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return the weight of a module as its model has it; of a stack of experts, which is a parameter itself, the stack.

    A stack [E, N, K] comes as [E N, K].
    """
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    weight = found if isinstance(found, torch.Tensor) else found.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().flatten(0, -2) if weight.dim() > 2 else weight.detach()


def cut_rows(tensor: torch.Tensor, split: Split | None, rank: int) -> torch.Tensor:
    """Return a rank's rows of a tensor under a split of axis 0; all of them under any other."""
    if split is None or split.axis != 0 or split.tp == 1:
        return tensor
    return torch.cat([tensor[start:stop] for start, stop in split.ranges[rank]])


class ModelWeights:
    """The weights of a live model, quantized on the way out."""

    def __init__(self, model: nn.Module, form_of: FormOf, transposed: set[str]) -> None:
        self._model, self._form_of, self._transposed = model, form_of, transposed

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, quantized by round-to-nearest."""
        weight = matrix_of(self._model, module)
        matrix = weight.t() if module in self._transposed else weight
        form = self._form_of(module) or (cast_row(matrix.dtype), None)
        return quantize_part(lambda start, stop: matrix[start:stop], form, split, rank, f"{module}.weight")

    def tensor(self, name: str, split: Split | None = None, rank: int = 0) -> torch.Tensor | None:
        """Return a parameter or buffer of the model."""
        parent, _, leaf = name.rpartition(".")
        try:
            value = getattr(self._model.get_submodule(parent), leaf, None)
        except AttributeError:  # a stack of experts is a parameter: there is no module, and no bias
            value = None
        return None if value is None else cut_rows(value.detach(), split, rank)


def cast_row(dtype: torch.dtype | None) -> Format:
    """Return the format that keeps values of a dtype as they are."""
    return lookup(cast_name(dtype))


class SourceWeights:
    """The weights of ordinary model files, read piece by piece and quantized on the way."""

    def __init__(
        self,
        source: TensorSource,
        form_of: FormOf,
        transposed: set[str],
        aliases: dict[str, str],
        stacks: dict[str, tuple[str, ...]] | None = None,
        unit_rows: Set[str] = frozenset(),
    ) -> None:
        """aliases: name -> the name that holds its values where it is missing (tied weights).

        stacks: name of a stack of experts -> the tensors whose rows are its rows, one after the other.
        unit_rows: modules whose rows are brought to length 1, as their model does at each forward.
        """
        self._source, self._form_of, self._unit_rows = source, form_of, unit_rows
        self._transposed, self._aliases, self._stacks = transposed, aliases, stacks or {}

    def has(self, name: str) -> bool:
        """Return whether the files hold a tensor, under its own or its tied name, or in parts."""
        return name in self._stacks or self._find(name) is not None

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype in which the files hold a tensor; None for one that torch does not know."""
        parts = self._stacks.get(name.removesuffix(".weight"))
        found = parts[0] if parts else self._find(name)
        return None if found is None else self._source[found].dtype

    def _find(self, name: str) -> str | None:
        # A stack of experts is a parameter of its own name; elsewhere a weight is a module's.
        for candidate in (name, self._aliases.get(name), name.removesuffix(".weight")):
            if candidate is not None and candidate in self._source:
                return candidate
        return None

    def _matrix(self, module: str, split: Split) -> SourceMatrix:
        if module in self._stacks:
            return joined_matrix(self._source, self._stacks[module])
        name = self._find(f"{module}.weight")
        if name is None:
            raise CheckpointError(f"{self._source.directory} holds no tensor {module}.weight; expected {split.shape}")
        make = transposed_matrix if module in self._transposed else plain_matrix
        matrix = make(self._source, name)
        return with_unit_rows(matrix) if module in self._unit_rows else matrix

    def packed(self, module: str, split: Split, rank: int) -> PackedWeight:
        """Return a rank's part of the matrix of a module, quantized by round-to-nearest."""
        matrix = self._matrix(module, split)
        if matrix.shape != split.shape:
            raise CheckpointError(
                f"{module} in {self._source.directory} has shape {matrix.shape}; the model expects {split.shape}"
            )
        form = self._form_of(module) or (cast_row(matrix.dtype), None)
        return quantize_part(matrix.read, form, split, rank, module)

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
