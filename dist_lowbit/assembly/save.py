"""Write a checkpoint: the same items for a live model (each rank its own file) and for a conversion (all files)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lowbit.checkpoint import FileRecord, ShardWriter, TensorEntry, WeightEntry, commit, discard, shard_names
from dist_lowbit.core.errors import CheckpointError, DistLowbitError, UsageError
from dist_lowbit.core.settings import settings
from dist_lowbit.formats import Format, PackedWeight, cast_name, lookup
from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding, Split, owned_ranges
from dist_lowbit.parallel.experts import ExpertStack
from dist_lowbit.parallel.units import Range

from .build import LowBitState, other_tensors, state_of
from .hf_files import check_target, write_hf_files
from .mode import dtype_name
from .paths import require_path
from .progress import track

Piece = Callable[[int, int], PackedWeight]


@dataclass(frozen=True)
class Item:
    """A tensor to store: a weight (with a format) or a plain tensor (with a dtype), and what each rank writes of it."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    pieces: Sequence[Sequence[Range]]
    format: Format | None = None
    group_size: int = -1
    dtype: torch.dtype = torch.float32

    def entries(self, rank: int) -> list[WeightEntry | TensorEntry]:
        """Return what one rank's file declares of this item."""
        if self.format is None:
            return [TensorEntry(self.name, self.dtype, self.shape, self.axis, a, b) for a, b in self.pieces[rank]]
        shape = (self.shape[0], self.shape[1])
        return [
            WeightEntry(self.name, self.format, self.group_size, shape, self.axis, a, b) for a, b in self.pieces[rank]
        ]


def weight_item(name: str, split: Split, format: Format, group_size: int) -> Item:
    """Return the item of a planned matrix."""
    return Item(f"{name}.weight", split.shape, split.axis, owned_ranges(split.ranges), format, group_size)


def tensor_item(name: str, tensor: torch.Tensor, tp: int, split: Split | None = None) -> Item:
    """Return the item of a plain tensor: rank 0 writes it, unless it is cut along with the rows of a split."""
    if split is not None and split.axis == 0:
        shape = (split.shape[0], *tensor.shape[1:])
        return Item(name, shape, 0, owned_ranges(split.ranges), dtype=tensor.dtype)
    size = int(tensor.shape[0]) if tensor.dim() else 1
    pieces: list[list[Range]] = [[(0, size)]] + [[] for _ in range(tp - 1)]
    return Item(name, tuple(tensor.shape), None, pieces, dtype=tensor.dtype)


def write_items(
    directory: Path,
    names: Sequence[str],
    ranks: Iterable[int],
    items: Sequence[Item],
    packed: Callable[[Item], Piece],
    tensor: Callable[[Item], Callable[[int, int], torch.Tensor]],
) -> list[FileRecord]:
    """Write the files of some ranks, item by item, so that one item is in memory at a time; return their records.

    names: the data file of every rank. packed(item), tensor(item): how to get the pieces [a, b) of an item.
    """
    writers: dict[int, ShardWriter] = {}
    try:
        for rank in ranks:
            entries = [entry for item in items for entry in item.entries(rank)]
            writers[rank] = ShardWriter(directory, names[rank], entries)
        for item in track(items, "writing", min(writers, default=0)):
            mine = [(rank, a, b) for rank in writers for a, b in item.pieces[rank]]
            if not mine:
                continue
            if item.format is not None:
                piece = packed(item)
                for rank, a, b in mine:
                    writers[rank].write_weight(item.name, a, piece(a, b))
            else:
                rows = tensor(item)
                for rank, a, b in mine:
                    writers[rank].write_tensor(item.name, a, rows(a, b))
        return [writer.close() for writer in writers.values()]
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise


def _local_offset(ranges: Sequence[Range], start: int, stop: int) -> int:
    """Return where [start, stop) of the whole axis begins in a rank's joined ranges."""
    base = 0
    for a, b in ranges:
        if a <= start and stop <= b:
            return base + start - a
        base += b - a
    raise AssertionError(f"[{start}, {stop}) is not held by this rank")


def _live_items(model: nn.Module, state: LowBitState) -> list[Item]:
    tp = state.target.plan.tp
    items = []
    for name, split in state.target.plan.splits.items():
        module = model.get_submodule(name)
        if isinstance(module, LowBitLinear):
            items.append(weight_item(name, split, lookup(module.format), module.group_size))
            if module.bias is not None:
                items.append(tensor_item(f"{name}.bias", module.bias, tp, split))
        elif isinstance(module, ExpertStack):
            items.append(weight_item(name, split, lookup(module.format), module.group_size))
        elif isinstance(module, ParallelEmbedding):
            items.append(weight_item(name, split, lookup(cast_name(module.weight.dtype)), -1))
    return items + [tensor_item(name, value, tp) for name, value in other_tensors(model).items()]


def first_weight(state: LowBitState) -> str:
    """Return the name of one of a model's planned weights."""
    return f"{next(iter(state.target.plan.splits))}.weight"


def metadata_of(state: LowBitState, model: nn.Module) -> dict[str, Any]:
    """Return what lowbit.json says beside the tensors: recipe, model, dtype, and the units of K of segments."""
    units = {name: split.unit for name, split in state.target.plan.splits.items() if name not in state.kept}
    return {
        "recipe": state.recipe.to_json(),
        "model_class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "kept": sorted(state.kept),
        "dtype": dtype_name(state.dtype),
        "units": units,
    }


def _write_live(model: nn.Module, state: LowBitState, directory: Path, names: Sequence[str]) -> list[FileRecord]:
    rank = state.group.rank
    splits = state.target.plan.splits
    others = other_tensors(model)

    def packed(item: Item) -> Piece:
        name = item.name.removesuffix(".weight")
        module, split = model.get_submodule(name), splits[name]
        if isinstance(module, (LowBitLinear, ExpertStack)):
            local = _on_cpu(module.unpack())
        else:
            assert isinstance(module, ParallelEmbedding)
            values = module.weight.detach().cpu()
            assert item.format is not None
            local = PackedWeight.from_tensors(item.format, (values.shape[0], values.shape[1]), -1, {"values": values})

        def piece(a: int, b: int) -> PackedWeight:
            if split.axis is None:
                return local
            at = _local_offset(split.ranges[rank], a, b)
            return local.split(split.axis, at, at + b - a)

        return piece

    def tensor(item: Item) -> Callable[[int, int], torch.Tensor]:
        if item.name in others:
            value = others[item.name].detach().cpu()
            return lambda a, b: value
        name = item.name.removesuffix(".bias")
        module, split = model.get_submodule(name), splits[name]
        assert isinstance(module.bias, torch.Tensor)
        bias = module.bias.detach().cpu()
        if split.axis != 0:
            return lambda a, b: bias
        held = split.ranges[rank]
        return lambda a, b: bias[_local_offset(held, a, b) :][: b - a]

    items = _live_items(model, state)
    return write_items(directory, names, [rank], items, packed, tensor)


def _on_cpu(weight: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.cpu() for name, tensor in weight.tensors().items()}
    return PackedWeight.from_tensors(weight.format, weight.shape, weight.group_size, tensors)


def save_low_bit(model: nn.Module, directory: str | Path) -> None:
    """Save a low-bit model: each rank writes one file of what it owns, rank 0 commits. All ranks must call together.

    Works before and after the model has run, at any tp; the directory can be loaded at any other. If one rank
    fails, all raise and the directory keeps what it held before.
    """
    state = state_of(model)
    if state is None:
        raise UsageError("this model is not low-bit; call optimize_model on it first")
    directory = Path(require_path(directory, "save_low_bit", "a directory to write")).expanduser()
    group = state.group
    failure: str | None = None
    records: list[FileRecord] = []
    names = group.broadcast_object(shard_names(state.target.plan.tp), 0)
    try:
        check_target(directory)
        records = _write_live(model, state, directory, names)
    except (DistLowbitError, OSError) as error:
        failure = str(error)
    told = group.gather_object(
        {"failure": failure, "records": [record.to_json() for record in records]}, timeout=settings().load_timeout
    )
    failures = [(rank, item["failure"]) for rank, item in enumerate(told) if item["failure"]]
    if not failures and group.rank == 0:
        try:
            every = [FileRecord.from_json(record) for item in told for record in item["records"]]
            write_hf_files(model, directory, state.recipe, first_weight(state), state.dtype)
            commit(directory, state.target.plan.tp, metadata_of(state, model), every)
        except (DistLowbitError, OSError) as error:
            failures = [(0, str(error))]
    failures = [tuple(item) for item in group.broadcast_object(failures, 0, timeout=settings().load_timeout)]
    if failures:
        discard(directory, records)
        rank, text = failures[0]
        raise CheckpointError(text if group.size == 1 else f"rank {rank}: {text}")
