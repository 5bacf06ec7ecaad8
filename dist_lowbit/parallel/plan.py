"""The plan: every matrix of a model with its cut, from shapes, roles and sizes. A value; it holds no tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from dist_lowbit.core.errors import PlanError

from .roles import ROLES, WHOLE, Role
from .split import Split, whole
from .units import Range, rank_ranges

# Rows of the vocabulary are dealt out in these steps; a multiple of every kernel's row interleave.
VOCAB_UNIT = 64


class Dims(Protocol):
    """The sizes of a model that its axes have."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab(self) -> int: ...


@dataclass(frozen=True)
class Heads:
    """The attention heads of one rank: local counts, and the local key/value head of every local query head.

    first, first_kv: the first of them among all heads.
    """

    heads: int
    kv_heads: int
    kv_index: tuple[int, ...]
    first: int = 0
    first_kv: int = 0


@dataclass(frozen=True)
class Plan:
    """All cuts of a model: splits by module name, and per attention output the heads of every rank."""

    tp: int
    splits: Mapping[str, Split]
    heads: Mapping[str, tuple[Heads, ...]]


def match_role(name: str, roles: Mapping[str, str], keep: tuple[str, ...] = ()) -> str | None:
    """Return the role of a module name, None for a kept one; no rule or two rules are a PlanError."""
    found = [(glob, role) for glob, role in roles.items() if fnmatchcase(name, glob)]
    kept = [glob for glob in keep if fnmatchcase(name, glob)]
    if len(found) + len(kept) == 1:
        return found[0][1] if found else None
    if not found and not kept:
        raise PlanError(f"matrix {name} is matched by no rule of the plan; give it a role, or list it as kept whole")
    rules = ", ".join([glob for glob, _ in found] + kept)
    raise PlanError(f"matrix {name} is matched by more than one rule of the plan ({rules}); expected exactly one")


def query_unit(block: int, head_dim: int) -> int:
    """Return the unit of an attention output: whole heads and whole summation blocks."""
    return math.lcm(block, head_dim)


def _dimension(name: str, dims: Dims, width: int, unit: int, tp: int) -> tuple[int, list[Range]]:
    """Return the size of a dimension in elements, and each rank's range of it. width: that of "mlp"."""
    if name == "vocab":
        return dims.vocab, rank_ranges(dims.vocab, VOCAB_UNIT, tp)
    if name == "mlp":
        return width, rank_ranges(width, unit, tp)
    query = rank_ranges(dims.heads * dims.head_dim, unit, tp)
    if name == "q":
        return dims.heads * dims.head_dim, query
    ranges = [tuple(head * dims.head_dim for head in _kv_heads(q, dims)) for q in query]
    return dims.kv_heads * dims.head_dim, [(start, stop) for start, stop in ranges]


def _kv_heads(query: Range, dims: Dims) -> Range:
    """Return the key/value heads [first, last + 1) that a range of query elements reads; equal ends if it is empty."""
    first, last = query[0] // dims.head_dim, query[1] // dims.head_dim
    group = dims.heads // dims.kv_heads
    return (first // group, (last - 1) // group + 1) if last > first else (0, 0)


def _heads(dims: Dims, unit: int, tp: int) -> tuple[Heads, ...]:
    group = dims.heads // dims.kv_heads
    result = []
    for query in rank_ranges(dims.heads * dims.head_dim, unit, tp):
        first, last = query[0] // dims.head_dim, query[1] // dims.head_dim
        low, high = _kv_heads(query, dims)
        index = tuple(head // group - low for head in range(first, last))
        result.append(Heads(last - first, high - low, index, first, low))
    return tuple(result)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Return ranges in order, those that touch as one, empty ones left out; one empty range where nothing is held."""
    result: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result) or ((0, 0),)


def _by_head(dims: Dims, unit: int, tp: int) -> tuple[int, list[tuple[Range, ...]]]:
    """Return the rows of a fused qkv that comes per key/value head, and what each rank holds of them."""
    group, size = dims.heads // dims.kv_heads, dims.head_dim
    stride = (group + 2) * size
    result = []
    for heads in _heads(dims, unit, tp):
        held: list[Range] = []
        for kv in range(heads.first_kv, heads.first_kv + heads.kv_heads):
            first, last = max(heads.first, kv * group), min(heads.first + heads.heads, (kv + 1) * group)
            base = kv * stride
            held.append((base + (first - kv * group) * size, base + (last - kv * group) * size))
            held.append((base + group * size, base + stride))
        result.append(_joined(held))
    return dims.kv_heads * stride, result


class _Cutter:
    """Cuts the matrices of one model; consumers: the matrix that sums over what a module's other matrices make."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        named: Mapping[str, str | None],
        dims: Dims,
        block_of: Callable[[str], int],
        tp: int,
    ) -> None:
        self.shapes, self.named, self.dims, self.block_of, self.tp = shapes, named, dims, block_of, tp
        self.consumers = {
            _parent(name): name for name, role in named.items() if role in ROLES and ROLES[role].side == "in"
        }

    def unit_of(self, name: str, piece: str) -> int:
        consumer = self.consumers.get(_parent(name))
        if piece == "vocab":
            return VOCAB_UNIT
        if consumer is None:
            raise PlanError(f"matrix {name} is cut by {piece}, but no sibling sums over {piece}")
        block = self.block_of(consumer)
        return query_unit(block, self.dims.head_dim) if piece in ("q", "kv") else block

    def split(self, name: str) -> Split:
        shape, cut = self.shapes[name], ROLES[str(self.named[name])]
        axis = 0 if cut.side == "out" else 1
        unit = self.unit_of(name, cut.pieces[0])
        if cut.by_head:
            size, ranges = _by_head(self.dims, unit, self.tp)
        else:
            size, ranges = self._ranges(name, cut)
        if shape[axis] != size:
            raise PlanError(f"matrix {name} has {'NK'[axis]} = {shape[axis]}; its config says {size}")
        return Split(shape, axis, tuple(ranges), unit if axis == 1 else self.block_of(name), cut.gather)

    def _ranges(self, name: str, cut: Role) -> tuple[int, list[tuple[Range, ...]]]:
        """Return the size of the cut axis, and what each rank holds of it."""
        consumer = self.consumers.get(_parent(name), name)
        base, per_rank = 0, [[] for _ in range(self.tp)]  # type: tuple[int, list[list[Range]]]
        for piece in cut.pieces:
            unit = self.unit_of(name, piece)
            size, ranges = _dimension(piece, self.dims, self.shapes[consumer][1], unit, self.tp)
            for rank, (start, stop) in enumerate(ranges):
                per_rank[rank].append((base + start, base + stop))
            base += size
        if not (cut.stacked and cut.side == "out"):
            return base, [tuple(held) for held in per_rank]
        experts = self.shapes[name][0] // base
        stacked = [[(e * base + a, e * base + b) for e in range(experts) for a, b in held] for held in per_rank]
        return experts * base, [_joined(held) for held in stacked]


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    roles: Mapping[str, str],
    keep: tuple[str, ...],
    dims: Dims,
    block_of: Callable[[str], int],
    tp: int,
) -> Plan:
    """Cut every matrix of a model.

    shapes: (N, K) by module name, all matrices of the model; of stacked experts (E N, K). block_of: the summation block
    of a module's weight. Sibling matrices (the same parent module) are cut at the same places: a producer's N at its
    consumer's units. A matrix that no rule or two rules match, or whose size is not the config's or its consumer's, is
    a PlanError. Pure; no tensor.
    """
    named = {name: match_role(name, roles, keep) for name in shapes}
    cutter = _Cutter(shapes, named, dims, block_of, tp)
    splits: dict[str, Split] = {}
    for name, shape in shapes.items():
        if named[name] == WHOLE:
            splits[name] = whole(shape, block_of(name), tp)
        elif named[name] is not None:
            splits[name] = cutter.split(name)
    heads = {
        parent: _heads(dims, cutter.unit_of(name, "q"), tp)
        for parent, name in cutter.consumers.items()
        if ROLES[str(named[name])].pieces == ("q",)
    }
    return Plan(tp, splits, heads)


def whole_plan(shapes: Mapping[str, tuple[int, int]], block_of: Callable[[str], int], tp: int = 1) -> Plan:
    """Return the plan that leaves every matrix whole on each of tp ranks."""
    return Plan(tp, {name: whole(shape, block_of(name), tp) for name, shape in shapes.items()}, {})
