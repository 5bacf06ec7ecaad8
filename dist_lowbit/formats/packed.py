"""The packed weight: what a quantized matrix is everywhere between the quantizer and the kernels, and on disk.

Each part keeps its axes in (N, K) order and states its unit, so splitting and merging is arithmetic that knows
no format: for the range [a, b) of an axis take [a / unit, b / unit) of every part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_lowbit.core.errors import FormatError

from .bits import join_planes, packed_width
from .table import Format, check_group_size

BLOCK = 64  # summation block where a format has no groups, or one per row


@dataclass(frozen=True)
class PartLayout:
    """What a part looks like: dtype, stored shape (N axis, K axis) and unit.

    A unit is how many logical elements one stored element covers along each axis; 0 says the part is constant
    along that axis and stored once.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    unit: tuple[int, int]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that a comparison tells -0.0 from 0.0."""
    return tensor.contiguous().view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Part:
    """A stored tensor of a packed weight, with its unit (see PartLayout)."""

    tensor: torch.Tensor
    unit: tuple[int, int]


def part_layout(format: Format, shape: tuple[int, int], group_size: int) -> dict[str, PartLayout]:
    """Return the parts that a weight of this format, logical shape (N, K) and group size has, in storage order."""
    n, k = shape
    if format.dtype is not None:
        return {"values": PartLayout(format.dtype, (n, k), (1, 1))}
    parts = {
        f"plane{i}": PartLayout(torch.uint8, (n, packed_width(k, bits)), (1, 8 // bits))
        for i, bits in enumerate(format.planes)
    }
    per_row = group_size == -1
    groups, unit = (1, 0) if per_row else (-(-k // group_size), group_size)
    parts["scale"] = PartLayout(format.scale_dtype, (n, groups), (1, unit))
    if format.offset == "min":
        parts["min"] = PartLayout(format.scale_dtype, (n, groups), (1, unit))
    if format.offset == "zero_point":
        parts["zero_point"] = PartLayout(torch.uint8, (n, groups), (1, unit))
    return parts


def grain(format: Format, group_size: int, axis: int) -> int:
    """Return the step at which an axis (0 = N, 1 = K) may be cut: the lcm of the parts' units."""
    layout = part_layout(format, (1, 1), group_size)
    return math.lcm(*(part.unit[axis] or 1 for part in layout.values()))


def summation_block(group_size: int) -> int:
    """Return the elements of K that are summed exactly before anything is rounded."""
    return BLOCK if group_size == -1 else group_size


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix of logical shape (N, K) in a format: named parts, and no layout of any machine."""

    format: Format
    shape: tuple[int, int]
    group_size: int
    parts: dict[str, Part]

    def __post_init__(self) -> None:
        if check_group_size(self.format, self.group_size) != self.group_size:
            raise FormatError(
                f"a {self.format.name} weight has no groups; its group_size is {self.group_size}, expected -1"
            )
        layout = part_layout(self.format, self.shape, self.group_size)
        for name, want in layout.items():
            have = self.parts.get(name)
            found = f"{have.tensor.dtype} {tuple(have.tensor.shape)} of unit {have.unit}" if have else "missing"
            expected = f"{want.dtype} {want.shape} of unit {want.unit}"
            if found != expected:
                raise FormatError(
                    f"part {name} of a {self.format.name} weight {self.shape} is {found}; expected {expected}"
                )
        if self.parts.keys() != layout.keys():
            extra = ", ".join(sorted(self.parts.keys() - layout.keys()))
            raise FormatError(f"a {self.format.name} weight has no part named {extra}; expected {', '.join(layout)}")

    @classmethod
    def from_tensors(
        cls, format: Format, shape: tuple[int, int], group_size: int, tensors: dict[str, torch.Tensor]
    ) -> PackedWeight:
        """Build a weight from its parts' tensors, named as in part_layout."""
        layout = part_layout(format, shape, group_size)
        parts = {name: Part(t, layout[name].unit if name in layout else (1, 1)) for name, t in tensors.items()}
        return cls(format, shape, group_size, parts)

    @property
    def block(self) -> int:
        """Return the summation block of this weight."""
        return summation_block(self.group_size)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all parts."""
        return sum(part.tensor.nbytes for part in self.parts.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parts' tensors by name."""
        return {name: part.tensor for name, part in self.parts.items()}

    def equal(self, other: PackedWeight) -> bool:
        """Return whether both have the same format, shape and group size, and every part the same bits."""
        mine, theirs = self.tensors(), other.tensors()
        same = (self.format, self.shape, self.group_size) == (other.format, other.shape, other.group_size)
        return same and all(torch.equal(_bits(mine[name]), _bits(theirs[name])) for name in mine)

    def codes(self) -> torch.Tensor:
        """Return the codes, uint8 [N, K]; casts have none."""
        planes = [self.parts[f"plane{i}"].tensor for i in range(len(self.format.planes))]
        return join_planes(planes, self.format.planes, self.shape[1])

    def split(self, axis: int, start: int, stop: int) -> PackedWeight:
        """Return the part [start, stop) along an axis (0 = N, 1 = K), as contiguous copies (no views of this weight).

        Legal where start and stop are multiples of `grain` or the end of the axis; else a FormatError.
        """
        size = self.shape[axis]
        step = grain(self.format, self.group_size, axis)
        for edge in (start, stop):
            if not 0 <= start <= stop <= size or (edge % step and edge != size):
                raise FormatError(
                    f"cannot cut {'NK'[axis]} = {size} of a {self.format.name} weight at [{start}, {stop}); "
                    f"expected multiples of {step} or the end"
                )
        shape = (stop - start, self.shape[1]) if axis == 0 else (self.shape[0], stop - start)
        parts = {}
        for name, part in self.parts.items():
            unit = part.unit[axis]
            tensor = part.tensor
            if unit:
                first, last = -(-start // unit), -(-stop // unit)
                tensor = tensor.narrow(axis, first, last - first)
            parts[name] = Part(tensor.clone(memory_format=torch.contiguous_format), part.unit)
        return PackedWeight(self.format, shape, self.group_size, parts)


def merge(weights: Sequence[PackedWeight], axis: int) -> PackedWeight:
    """Join weights along an axis (0 = N, 1 = K): the inverse of cutting with split, bit for bit.

    All but the last non-empty one must end on a multiple of `grain`; constant parts must be equal. Else a FormatError.
    """
    if not weights:
        raise FormatError("cannot merge no weights; expected at least one")
    first = weights[0]
    step = grain(first.format, first.group_size, axis)
    total = 0
    for weight in weights:
        same = weight.format == first.format and weight.group_size == first.group_size
        if not same or weight.shape[1 - axis] != first.shape[1 - axis]:
            raise FormatError(
                f"cannot merge a {weight.format.name} weight {weight.shape} of group size {weight.group_size} "
                f"with a {first.format.name} weight {first.shape} of group size {first.group_size}"
            )
        if total % step and weight.shape[axis]:
            raise FormatError(f"cannot merge at {'NK'[axis]} = {total}; expected a multiple of {step}")
        total += weight.shape[axis]
    parts = {}
    for name, part in first.parts.items():
        tensors = [weight.parts[name].tensor for weight in weights]
        if part.unit[axis]:
            tensor = torch.cat(tensors, axis)
        else:
            tensor = tensors[0]
            if any(not torch.equal(_bits(tensor), _bits(other)) for other in tensors[1:]):
                raise FormatError(f"cannot merge: part {name}, constant along {'NK'[axis]}, differs between shards")
        parts[name] = Part(tensor, part.unit)
    shape = (total, first.shape[1]) if axis == 0 else (first.shape[0], total)
    return PackedWeight(first.format, shape, first.group_size, parts)
