"""Linears to split: sizes that divide nothing, cut along N and along K, by every rank's own part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_lowbit.comm import Group, SingleGroup, tree_sum
from dist_lowbit.formats import FORMATS, PackedWeight, quantize
from dist_lowbit.formats.packed import summation_block
from dist_lowbit.parallel import LowBitLinear, Split
from dist_lowbit.parallel.split import whole
from dist_lowbit.parallel.units import rank_ranges

ROWS = 3


@dataclass(frozen=True)
class Case:
    """A Linear of logical shape (n, k), cut along `axis` in pieces of `unit` (0: the summation block)."""

    n: int
    k: int
    axis: int
    group_size: int | None = None
    unit: int = 0

    def named(self) -> str:
        """Return the case as a test's name."""
        return f"{'NK'[self.axis]}-{self.n}x{self.k}-G{self.group_size}-u{self.unit}"


# K = 100 ends within a group; N = 7 leaves ranks idle; K = 576 is 9 units; -1 is one group for the whole row; the unit
# of 192 is that of an attention output with heads of 96.
CASES = (
    Case(7, 100, 0),
    Case(7, 100, 1),
    Case(70, 576, 1),
    Case(70, 1100, 1, group_size=32),
    Case(33, 576, 1, group_size=-1),
    Case(33, 576, 1, unit=192),
    Case(130, 100, 0, group_size=-1),
)


def split_of(case: Case, group_size: int, tp: int) -> Split:
    """Return the split of a case; outputs that are cut are gathered."""
    if tp == 1:
        return whole((case.n, case.k), case.unit or summation_block(group_size), 1)
    unit = case.unit or summation_block(group_size)
    size = case.n if case.axis == 0 else case.k
    ranges = tuple((piece,) for piece in rank_ranges(size, unit if case.axis else 2, tp))
    return Split((case.n, case.k), case.axis, ranges, unit, gather=case.axis == 0)


def operands(case: Case, format: str, seed: int = 0) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    """Return x [3, K], a quantized weight and a bias: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, case.k, generator=generator)
    w = torch.randn(case.n, case.k, generator=generator)
    group_size = case.group_size if FORMATS[format].grouped else None
    return x, quantize(w, format, group_size), torch.randn(case.n, generator=generator)


class PartGroup(SingleGroup):
    """Stands for one rank of several: sums and gathers nothing, so that a Linear gives its own part."""

    def __init__(self, rank: int) -> None:
        self.rank = rank  # no connection, hence nothing to set up

    def all_reduce(self, x: torch.Tensor, timeout: float | None = None) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1, sizes: object = None, timeout: object = None) -> torch.Tensor:
        return x


def part(
    case: Case, weight: PackedWeight, bias: torch.Tensor | None, split: Split, group: Group, compute: str
) -> LowBitLinear:
    """Return a rank's Linear of a split weight."""
    if split.axis is None:
        return LowBitLinear(weight, bias, split, group, compute)
    ((start, stop),) = split.ranges[group.rank]
    local_bias = bias[start:stop] if bias is not None and split.axis == 0 else bias
    return LowBitLinear(weight.split(split.axis, start, stop), local_bias, split, group, compute)


def local_x(x: torch.Tensor, split: Split, rank: int) -> torch.Tensor:
    """Return the columns of x that a rank's part of a K-split Linear takes."""
    if split.axis != 1:
        return x
    ((start, stop),) = split.ranges[rank]
    return x[:, start:stop]


def by_parts(
    case: Case, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tp: int, compute: str
) -> torch.Tensor:
    """Return the split Linear's result, every rank's part computed here and joined as the ranks would."""
    split = split_of(case, weight.group_size, tp)
    parts = []
    for rank in range(tp):
        own = bias if split.axis != 1 else None  # of a K-split Linear it comes after the sum
        parts.append(part(case, weight, own, split, PartGroup(rank), compute)(local_x(x, split, rank)))
    if split.axis == 0:
        return torch.cat(parts, -1)
    total = tree_sum(parts)
    return total + bias if split.axis == 1 and bias is not None else total
