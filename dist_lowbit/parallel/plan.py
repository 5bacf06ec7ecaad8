"""The plan: every matrix of a model with its cut, from shapes, roles and sizes. A value; it holds no tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from dist_lowbit.core.errors import PlanError

from .roles import ROLES, WHOLE
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
    def intermediate(self) -> int: ...
    @property
    def vocab(self) -> int: ...


@dataclass(frozen=True)
class Heads:
    """The attention heads of one rank: local counts, and the local key/value head of every local query head."""

    heads: int
    kv_heads: int
    kv_index: tuple[int, ...]


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


def _dimension(name: str, dims: Dims, unit: int, tp: int) -> tuple[int, list[Range]]:
    """Return the size of a dimension in elements, and each rank's range of it."""
    if name == "vocab":
        return dims.vocab, rank_ranges(dims.vocab, VOCAB_UNIT, tp)
    if name == "mlp":
        return dims.intermediate, rank_ranges(dims.intermediate, unit, tp)
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
        result.append(Heads(last - first, high - low, index))
    return tuple(result)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _check_size(name: str, axis: int, shape: tuple[int, int], expected: int) -> None:
    if shape[axis] != expected:
        raise PlanError(f"matrix {name} has {'NK'[axis]} = {shape[axis]}; its config says {expected}")


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    roles: Mapping[str, str],
    keep: tuple[str, ...],
    dims: Dims,
    block_of: Callable[[str], int],
    tp: int,
) -> Plan:
    """Cut every matrix of a model.

    shapes: (N, K) by module name, all matrices of the model. block_of: the summation block of a module's weight.
    Sibling matrices (the same parent module) are cut at the same places: a producer's N at its consumer's units.
    A matrix that no rule or two rules match, or whose size is not the config's, is a PlanError. Pure; no tensor.
    """
    named = {name: match_role(name, roles, keep) for name in shapes}
    consumers = {_parent(name): name for name, role in named.items() if role in ROLES and ROLES[role].side == "in"}

    def unit_of(name: str, piece: str) -> int:
        consumer = consumers.get(_parent(name))
        if piece == "vocab":
            return VOCAB_UNIT
        if consumer is None:
            raise PlanError(f"matrix {name} is cut by {piece}, but no sibling sums over {piece}")
        block = block_of(consumer)
        return query_unit(block, dims.head_dim) if piece in ("q", "kv") else block

    splits: dict[str, Split] = {}
    for name, shape in shapes.items():
        role = named[name]
        if role is None:
            continue
        if role == WHOLE:
            splits[name] = whole(shape, block_of(name), tp)
            continue
        cut = ROLES[role]
        axis = 0 if cut.side == "out" else 1
        base, per_rank = 0, [[] for _ in range(tp)]  # type: tuple[int, list[list[Range]]]
        for piece in cut.pieces:
            size, ranges = _dimension(piece, dims, unit_of(name, piece), tp)
            for rank, (start, stop) in enumerate(ranges):
                per_rank[rank].append((base + start, base + stop))
            base += size
        _check_size(name, axis, shape, base)
        unit = unit_of(name, cut.pieces[0]) if axis == 1 else block_of(name)
        splits[name] = Split(shape, axis, tuple(map(tuple, per_rank)), unit, cut.gather)
    heads = {
        parent: _heads(dims, unit_of(name, "q"), tp)
        for parent, name in consumers.items()
        if ROLES[str(named[name])].pieces == ("q",)
    }
    return Plan(tp, splits, heads)


def whole_plan(shapes: Mapping[str, tuple[int, int]], block_of: Callable[[str], int], tp: int = 1) -> Plan:
    """Return the plan that leaves every matrix whole on each of tp ranks."""
    return Plan(tp, {name: whole(shape, block_of(name), tp) for name, shape in shapes.items()}, {})
