"""Units and segments: where an axis may be cut so that every degree of parallelism adds in the same order.

A dot product over K is summed in blocks; a *unit* is the smallest piece of K that a rank may hold (a block, or
for an attention output the lcm of block and head size). The units lie in eight *segments*, cut at floor(i U / 8):
each is summed in sequence, then a balanced tree adds the segments. Rank r of tp ranks holds the units
[floor(r U / tp), floor((r + 1) U / tp)), so for tp = 2, 4, 8 ranks hold whole segments and the sum over ranks is
the top of the same tree: the same bits as with one rank.
"""

from __future__ import annotations

from dist_lowbit.ops import whole_cuts

Range = tuple[int, int]


def count(size: int, unit: int) -> int:
    """Return how many units an axis has; the last may be short."""
    return -(-size // unit)


def rank_ranges(size: int, unit: int, tp: int) -> list[Range]:
    """Return the elements [start, stop) that each of tp ranks holds of an axis; some may be empty."""
    units = count(size, unit)
    edges = [min(size, rank * units // tp * unit) for rank in range(tp + 1)]
    return [(edges[rank], edges[rank + 1]) for rank in range(tp)]


def segment_cuts(size: int, unit: int, held: Range | None = None) -> tuple[int, ...]:
    """Return the nine ends of the eight segments, in elements from the start of the held range.

    `held` is the rank's [start, stop) of the axis (None: all of it). A segment outside it is empty: equal ends.
    """
    start, stop = held if held is not None else (0, size)
    return tuple(min(max(edge, start), stop) - start for edge in whole_cuts(size, unit))
