"""Look at a whole checkpoint: what it holds, and whether all of it is sound."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_lowbit.core.errors import CheckpointError

from .container import DTYPE_NAMES
from .manifest import TensorInfo, WeightInfo, is_data_file
from .pieces import CHECKSUM_BLOCK
from .reader import CheckpointReader, read_manifest


@dataclass(frozen=True)
class Row:
    """One weight or tensor: format (a dtype for plain tensors), global shape, how it is cut, bytes on disk."""

    name: str
    format: str
    group_size: int | None
    shape: tuple[int, ...]
    axis: int | None
    ranges: tuple[tuple[int, int, int], ...]  # file number, start, stop
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `verify` found: no problem, or a sentence for each. Unlisted files are left by saves that were cut off."""

    files: int
    bytes: int
    blocks: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Return whether every byte is as it was written."""
        return not self.problems


def _row(info: WeightInfo | TensorInfo) -> Row:
    entries = [(shard.file, info.entry(shard)) for shard in info.shards]
    size = sum(stored.nbytes for _, entry in entries for stored in entry.stored().values())
    ranges = tuple((file, entry.start, entry.stop) for file, entry in entries)
    if isinstance(info, WeightInfo):
        return Row(info.name, info.format, info.group_size, info.shape, info.axis, ranges, size)
    return Row(info.name, DTYPE_NAMES[info.dtype], None, info.shape, info.axis, ranges, size)


def describe(directory: str | os.PathLike[str]) -> list[Row]:
    """Return a row for every weight and tensor, in the order of the manifest; reads lowbit.json only."""
    manifest, _ = read_manifest(Path(directory))
    return [*map(_row, manifest.weights.values()), *map(_row, manifest.tensors.values())]


def _unlisted(folder: Path, listed: set[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in os.listdir(folder) if is_data_file(name) and name not in listed))


def verify(directory: str | os.PathLike[str]) -> Report:
    """Read every byte of a checkpoint and check it; what is wrong is in the report, not raised.

    A stored part is given up at its first bad block. Memory: some MiB, whatever the size.
    """
    folder = Path(directory)
    try:
        reader = CheckpointReader(folder, keep_cache=False)
    except CheckpointError as error:
        return Report(0, 0, 0, (str(error),), ())
    problems, size, blocks = [], 0, 0
    with reader:
        for stored in reader.stored():
            try:
                stored.read_all()
            except CheckpointError as error:
                problems.append(str(error))
            size += stored.stored.nbytes
            blocks += -(-stored.stored.nbytes // CHECKSUM_BLOCK)
    listed = {info.name for info in reader.files}
    return Report(len(listed), size, blocks, tuple(problems), _unlisted(folder, listed))
