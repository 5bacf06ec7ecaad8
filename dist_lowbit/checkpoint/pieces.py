"""Pieces of weights and tensors, and the arithmetic of cutting them. No files here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import Format
from dist_lowbit.formats.packed import grain, part_layout

from .container import DIM_LIMIT, DTYPE_NAMES, RANK_LIMIT

CHECKSUM_BLOCK = 1 << 20  # bytes of a stored part that one checksum covers
Range = tuple[int, int]


def blocks_of(nbytes: int) -> int:
    """Return how many checksum blocks so many bytes have."""
    return -(-nbytes // CHECKSUM_BLOCK)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: its key there, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def pitch(self) -> int:
        """Return the bytes of one step along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _check(name: str, shape: tuple[int, ...], axis: int | None, start: int, stop: int, size: int, step: int) -> None:
    if not name or len(name) > 512 or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(f"{name!r:.80} is no name of a tensor; expected 1 to 512 printable characters")
    if len(shape) > RANK_LIMIT or math.prod(max(1, d) for d in shape) > DIM_LIMIT:
        raise CheckpointError(f"{name} has shape {list(shape)}, which is beyond any file")
    if not 0 <= start <= stop <= size:
        raise CheckpointError(f"{name} has a piece [{start}, {stop}); expected a range within [0, {size})")
    if axis is None and (start, stop) != (0, size):
        raise CheckpointError(f"{name} is not cut along any axis, but has a piece [{start}, {stop}) of {size}")
    for edge in (start, stop):
        if edge % step and edge != size:
            raise CheckpointError(
                f"{name} is cut at {edge} along axis {axis}; expected a multiple of {step} or the end {size}"
            )


@dataclass(frozen=True)
class WeightEntry:
    """The piece [start, stop) along `axis` (0 = N, 1 = K, None = whole) of a packed weight of global shape (N, K).

    A stop of -1 is the end of the axis. Cuts along K must be multiples of the format's grain, else CheckpointError.
    """

    name: str
    format: Format
    group_size: int
    shape: tuple[int, int]
    axis: int | None = None
    start: int = 0
    stop: int = -1

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise CheckpointError(f"{self.name!r:.80} has shape {list(self.shape)}; expected N and K of 1 or more")
        if self.axis not in (None, 0, 1):
            raise CheckpointError(f"{self.name!r:.80} is cut along axis {self.axis}; expected 0, 1 or none")
        if self.stop == -1:
            object.__setattr__(self, "stop", self.size)
        step = 1 if self.axis is None else grain(self.format, self.group_size, self.axis)
        _check(self.name, self.shape, self.axis, self.start, self.stop, self.size, step)

    @property
    def size(self) -> int:
        """Return the length of the axis that is cut (N where none is)."""
        return self.shape[self.axis or 0]

    @property
    def local_shape(self) -> tuple[int, int]:
        """Return the shape of the piece."""
        n, k = self.shape
        return (n, self.stop - self.start) if self.axis == 1 else (self.stop - self.start, k)

    def stored(self) -> dict[str, Stored]:
        """Return what the piece's file holds, by part.

        A part that is constant along the cut axis belongs to the piece that starts at 0; an empty piece has nothing.
        """
        if self.start == self.stop:
            return {}
        whole = (self.start, self.stop) == (0, self.size)
        result = {}
        for part, layout in part_layout(self.format, self.local_shape, self.group_size).items():
            constant = self.axis is not None and layout.unit[self.axis] == 0
            if constant and self.start:
                continue
            suffix = "" if whole or constant else f"@{self.start}:{self.stop}"
            result[part] = Stored(f"{self.name}.{part}{suffix}", layout.dtype, layout.shape)
        return result


@dataclass(frozen=True)
class TensorEntry:
    """The rows [start, stop) of a plain tensor (axis 0), or all of it (axis None). A stop of -1 is the end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    stop: int = -1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{self.name!r:.80} has dtype {self.dtype}; expected one of {', '.join(DTYPE_NAMES.values())}"
            )
        if self.axis not in (None, 0) or (self.axis == 0 and not self.shape):
            raise CheckpointError(f"{self.name!r:.80} of shape {list(self.shape)} is cut along axis {self.axis}")
        if self.stop == -1:
            object.__setattr__(self, "stop", self.size)
        _check(self.name, self.shape, self.axis, self.start, self.stop, self.size, 1)

    @property
    def size(self) -> int:
        """Return the rows of the whole tensor; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of the piece."""
        return (self.stop - self.start, *self.shape[1:]) if self.shape else ()

    def stored(self) -> dict[str, Stored]:
        """Return what the piece's file holds: one part named "data"; nothing for an empty piece."""
        if self.start == self.stop:
            return {}
        suffix = "" if (self.start, self.stop) == (0, self.size) else f"@{self.start}:{self.stop}"
        return {"data": Stored(f"{self.name}{suffix}", self.dtype, self.local_shape)}


Entry = WeightEntry | TensorEntry


def check_cover(name: str, ranges: Sequence[Range], size: int) -> None:
    """Refuse ranges that do not cover [0, size) exactly once."""
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            raise CheckpointError(f"{name} lacks the range [{at}, {start}) of {size}")
        if start < at:
            raise CheckpointError(f"{name} has the range [{start}, {min(at, stop)}) of {size} twice")
        at = stop
    if at != size:
        raise CheckpointError(f"{name} lacks the range [{at}, {size}) of {size}")


@dataclass(frozen=True)
class Copy:
    """A rectangle to copy: from piece `piece`, its [start, stop) along (N, K), to (N, K) position `to`."""

    piece: int
    start: tuple[int, int]
    stop: tuple[int, int]
    to: tuple[int, int]


def copies(
    wanted: Sequence[Range], axis: int, pieces: Sequence[Range], cut: int, sizes: tuple[int, int]
) -> Iterator[Copy]:
    """Yield the rectangles that put the ranges `wanted` along `axis`, joined in order, together.

    `pieces` are the stored ranges along the axis `cut`; `sizes` is the whole matrix. All in stored elements.
    """
    at = 0
    for start, stop in wanted:
        for index, (low, high) in enumerate(pieces):
            if axis == cut:
                a, b = max(start, low), min(stop, high)
                along, across = (a - low, b - low, at + a - start), (0, sizes[1 - axis], 0)
            else:
                along, across = (start, stop, at), (0, high - low, low)
            if along[0] >= along[1] or across[0] >= across[1]:
                continue
            n, k = (along, across) if axis == 0 else (across, along)
            yield Copy(index, (n[0], k[0]), (n[1], k[1]), (n[2], k[2]))
        at += stop - start
