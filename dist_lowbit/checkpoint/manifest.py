"""What a checkpoint holds and where: the values behind lowbit.json, which docs/checkpoint.md shows on one screen."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_lowbit.core.errors import CheckpointError

from .pieces import Stored, TensorEntry, WeightEntry, blocks_of, check_cover

MANIFEST = "lowbit.json"
MANIFEST_LIMIT = 1 << 28  # bytes; a model of 700 thousand stored parts has some 60 MB
_FILE_NAME = re.compile(r"lowbit-[0-9a-f]{8}-[0-9]{5}-of-[0-9]{5}\.safetensors")

Checksums = Mapping[str, tuple[str, ...]]  # by part, one for each block


def shard_names(count: int, uid: str | None = None) -> list[str]:
    """Return names for a save's `count` data files, under a uid of their own (8 hex digits) unless one is given."""
    uid = secrets.token_hex(4) if uid is None else uid
    names = [f"lowbit-{uid}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name in names:
        check_file_name(name, "shard_names")
    return names


def check_file_name(name: str, where: str) -> None:
    """Refuse a name that is not one of shard_names: nothing else is ever opened, overwritten or removed."""
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where}: {name!r:.120} is no name of a data file; "
            "expected one like lowbit-01234567-00001-of-00002.safetensors"
        )


def is_data_file(name: str) -> bool:
    """Return whether a file of this name is a data file of some save."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Shard:
    """One stored piece: the range [start, stop) of its tensor, in file number `file`."""

    file: int
    start: int
    stop: int
    checksums: Checksums


@dataclass(frozen=True)
class WeightInfo:
    """A packed weight of a checkpoint: its global shape and where its pieces lie, in ascending order."""

    whole: WeightEntry
    axis: int | None
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Return the weight's name."""
        return self.whole.name

    @property
    def format(self) -> str:
        """Return the format's name."""
        return self.whole.format.name

    @property
    def group_size(self) -> int:
        """Return the group size, -1 for one group per row."""
        return self.whole.group_size

    @property
    def shape(self) -> tuple[int, int]:
        """Return the global shape (N, K)."""
        return self.whole.shape

    @property
    def size(self) -> int:
        """Return the length of the axis that is cut (N where none is)."""
        w = self.whole
        return WeightEntry(w.name, w.format, w.group_size, w.shape, self.axis).size

    def entry(self, shard: Shard) -> WeightEntry:
        """Return the piece that a shard holds."""
        w = self.whole
        return WeightEntry(w.name, w.format, w.group_size, w.shape, self.axis, shard.start, shard.stop)


@dataclass(frozen=True)
class TensorInfo:
    """A plain tensor of a checkpoint: its global shape and where its pieces lie, in ascending order."""

    whole: TensorEntry
    axis: int | None
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Return the tensor's name."""
        return self.whole.name

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype."""
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the global shape."""
        return self.whole.shape

    @property
    def size(self) -> int:
        """Return the rows of the whole tensor; a scalar counts as one."""
        return TensorEntry(self.name, self.dtype, self.shape, self.axis).size

    def entry(self, shard: Shard) -> TensorEntry:
        """Return the piece that a shard holds."""
        w = self.whole
        return TensorEntry(w.name, w.dtype, w.shape, self.axis, shard.start, shard.stop)


Info = WeightInfo | TensorInfo


@dataclass(frozen=True)
class FileInfo:
    """A data file: its name, its size and the checksum of its header."""

    name: str
    bytes: int
    header: str


@dataclass(frozen=True)
class Manifest:
    """All of lowbit.json; building one checks it whole: every range of everything is there exactly once."""

    tp: int
    producer: str
    metadata: dict[str, Any]
    files: tuple[FileInfo, ...]
    weights: dict[str, WeightInfo]
    tensors: dict[str, TensorInfo]
    expected: tuple[dict[str, tuple[Stored, tuple[str, ...]]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for file in self.files:
            check_file_name(file.name, "files")
            if file.name in seen:
                raise CheckpointError(f"the file {file.name} is listed twice")
            seen.add(file.name)
        both = self.weights.keys() & self.tensors.keys()
        if both:
            raise CheckpointError(f"{min(both)} is listed both as a weight and as a tensor")
        object.__setattr__(self, "expected", self._expect())

    def _expect(self) -> tuple[dict[str, tuple[Stored, tuple[str, ...]]], ...]:
        """Return by file and key what the data files must hold, with its checksums."""
        expected: tuple[dict[str, tuple[Stored, tuple[str, ...]]], ...] = tuple({} for _ in self.files)
        infos: list[Info] = [*self.weights.values(), *self.tensors.values()]
        for info in infos:
            entries = [info.entry(shard) for shard in info.shards]  # each checks its own range
            check_cover(info.name, [(e.start, e.stop) for e in entries], info.size)
            for shard, entry in zip(info.shards, entries, strict=True):
                if not 0 <= shard.file < len(self.files):
                    raise CheckpointError(
                        f"{info.name} lies in file number {shard.file}; expected 0 to {len(self.files) - 1}"
                    )
                for tensor, sums in _with_checksums(shard, entry.stored(), info.name):
                    if tensor.key in expected[shard.file]:
                        raise CheckpointError(f"{tensor.key} would be stored twice in {self.files[shard.file].name}")
                    expected[shard.file][tensor.key] = (tensor, sums)
        return expected


def _with_checksums(shard: Shard, stored: Mapping[str, Stored], name: str) -> Iterator[tuple[Stored, tuple[str, ...]]]:
    if stored.keys() != shard.checksums.keys() or not stored:
        raise CheckpointError(
            f"{name} [{shard.start}, {shard.stop}) has checksums of {sorted(shard.checksums)}; "
            f"expected those of {sorted(stored)}"
        )
    for part, tensor in stored.items():
        sums = shard.checksums[part]
        if len(sums) != blocks_of(tensor.nbytes):
            raise CheckpointError(f"{tensor.key} has {len(sums)} checksums; expected {blocks_of(tensor.nbytes)}")
        yield tensor, sums
