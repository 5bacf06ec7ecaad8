"""How one matrix is cut: an axis, and per rank the ranges it holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .units import Range, segment_cuts


@dataclass(frozen=True)
class Split:
    """The cut of a matrix of global shape (N, K) over tp ranks.

    axis: 0 cuts N (colwise), 1 cuts K (rowwise; partial sums are added over the ranks), None leaves it whole on
    every rank. ranges[r]: what rank r holds along that axis, in order (several for fused matrices; the same range
    on several ranks where key/value heads are shared). unit: the unit of K, for the segments.
    gather: whether the outputs of all ranks are joined after a colwise product.
    """

    shape: tuple[int, int]
    axis: int | None
    ranges: tuple[tuple[Range, ...], ...]
    unit: int
    gather: bool = False

    @property
    def tp(self) -> int:
        """Return the number of ranks."""
        return len(self.ranges)

    @property
    def reduce(self) -> bool:
        """Return whether the outputs of the ranks are partial sums."""
        return self.axis == 1 and self.tp > 1

    def local_shape(self, rank: int) -> tuple[int, int]:
        """Return the (N, K) that a rank holds."""
        if self.axis is None:
            return self.shape
        size = sum(stop - start for start, stop in self.ranges[rank])
        return (size, self.shape[1]) if self.axis == 0 else (self.shape[0], size)

    def cuts(self, rank: int) -> tuple[int, ...]:
        """Return the segment ends of a rank's K (see units.segment_cuts)."""
        held = self.ranges[rank][0] if self.axis == 1 else None
        return segment_cuts(self.shape[1], self.unit, held)


def whole(shape: tuple[int, int], unit: int, tp: int) -> Split:
    """Return the split that leaves a matrix whole on each of tp ranks."""
    return Split(shape, None, (((0, shape[0]),),) * tp, unit)


def owned_ranges(ranges: Sequence[Sequence[Range]]) -> list[list[Range]]:
    """Return for each rank the parts of its ranges that no lower rank holds: every element has one owner."""
    taken: list[Range] = []
    owned: list[list[Range]] = []
    for held in ranges:
        mine: list[Range] = []
        for piece in held:
            free = [piece]
            for start, stop in taken:
                free = [part for a, b in free for part in ((a, min(b, start)), (max(a, stop), b)) if part[0] < part[1]]
            mine += free
            taken += free
        owned.append(mine)
    return owned
