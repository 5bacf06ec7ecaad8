"""What the checkpoint tests share: weights made of random bits, and a save of them at any tp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dist_lowbit.checkpoint import FileRecord, Manifest, ShardWriter, TensorEntry, WeightEntry, commit, shard_names
from dist_lowbit.formats import PackedWeight, lookup
from dist_lowbit.formats.packed import grain, part_layout


def random_weight(format: str, shape: tuple[int, int], group_size: int, seed: int = 0) -> PackedWeight:
    """Return a weight whose parts are random bits: a checkpoint must keep any."""
    row = lookup(format)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part, layout in part_layout(row, shape, group_size).items():
        size = layout.shape[0] * layout.shape[1] * layout.dtype.itemsize
        bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        tensors[part] = bits.view(layout.dtype).reshape(layout.shape)
    return PackedWeight.from_tensors(row, shape, group_size, tensors)


def even_cuts(size: int, step: int, tp: int) -> list[tuple[int, int]]:
    """Return the ranges of tp ranks over whole steps; ranks may be empty."""
    units = -(-size // step)
    edges = [min(size, i * units // tp * step) for i in range(tp + 1)]
    return list(pairwise(edges))


def weight_cuts(weight: PackedWeight, axis: int, tp: int) -> list[tuple[int, int]]:
    """Return even_cuts on the grain of a weight."""
    return even_cuts(weight.shape[axis], grain(weight.format, weight.group_size, axis), tp)


def same(a: PackedWeight, b: PackedWeight) -> bool:
    """Return whether two weights are equal byte for byte."""
    if (a.format, a.shape, a.group_size) != (b.format, b.shape, b.group_size):
        return False
    return all(same_bits(t, b.tensors()[part]) for part, t in a.tensors().items())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal byte for byte (NaN included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def write_records(
    directory: Path,
    tp: int,
    weights: Mapping[str, tuple[PackedWeight, int | None]],
    tensors: Mapping[str, torch.Tensor] | None = None,
    cuts: Callable[[PackedWeight, int, int], list[tuple[int, int]]] = weight_cuts,
) -> list[FileRecord]:
    """Write one file for each of tp ranks; weights by name with the axis to cut; tensors go to rank 0."""
    records = []
    ranges = {name: None if axis is None else cuts(w, axis, tp) for name, (w, axis) in weights.items()}
    for rank, file_name in enumerate(shard_names(tp)):
        entries: list[WeightEntry | TensorEntry] = []
        pieces: list[tuple[str, int, PackedWeight]] = []
        for name, (weight, axis) in weights.items():
            mine = ranges[name]
            if axis is None or mine is None:
                if rank == 0:
                    entries.append(WeightEntry(name, weight.format, weight.group_size, weight.shape))
                    pieces.append((name, 0, weight))
                continue
            start, stop = mine[rank]
            entries.append(WeightEntry(name, weight.format, weight.group_size, weight.shape, axis, start, stop))
            pieces.append((name, start, weight.split(axis, start, stop)))
        plain = dict(tensors or {}) if rank == 0 else {}
        entries += [TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in plain.items()]
        with ShardWriter(directory, file_name, entries) as writer:
            for name, tensor in plain.items():
                writer.write_tensor(name, 0, tensor)
            for name, start, piece in reversed(pieces):  # any order will do
                writer.write_weight(name, start, piece)
            records.append(writer.close())
    return records


def save(
    directory: Path,
    tp: int,
    weights: Mapping[str, tuple[PackedWeight, int | None]],
    tensors: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    cuts: Callable[[PackedWeight, int, int], list[tuple[int, int]]] = weight_cuts,
) -> Manifest:
    """Write and commit, the records passed as JSON as ranks do."""
    records = write_records(directory, tp, weights, tensors, cuts)
    return commit(directory, tp, metadata or {}, [FileRecord.from_json(r.to_json()) for r in records])
