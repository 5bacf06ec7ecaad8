"""Write one data file: the header first, then pieces in any order, each with pwrite at its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EINVAL, EOPNOTSUPP
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import PackedWeight

from .container import DTYPE_NAMES, build_header, bytes_of, checksum, reason
from .manifest import Checksums, check_file_name
from .pieces import CHECKSUM_BLOCK, Entry, TensorEntry, WeightEntry
from .schema import read_checksums, read_whole
from .strict import Fields


@dataclass(frozen=True)
class PieceRecord:
    """What became of one piece: its checksums, and those of the parts that another piece stores for it."""

    entry: Entry
    checksums: Checksums
    replicas: Checksums

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        e = self.entry
        if isinstance(e, WeightEntry):
            what: dict[str, Any] = {"format": e.format.name, "group_size": e.group_size}
        else:
            what = {"dtype": DTYPE_NAMES[e.dtype]}
        return {
            "name": e.name,
            **what,
            "shape": list(e.shape),
            "axis": e.axis,
            "start": e.start,
            "stop": e.stop,
            "checksums": {part: list(sums) for part, sums in self.checksums.items()},
            "replicas": {part: list(sums) for part, sums in self.replicas.items()},
        }

    @classmethod
    def from_json(cls, value: object) -> PieceRecord:
        """Return the record that `to_json` gave."""
        fields = Fields(value, "a piece's record")
        name = fields.text("name")
        whole = read_whole(name, fields, "weights" if isinstance(value, dict) and "format" in value else "tensors")
        axis = fields.optional("axis", 0, 1)
        start, stop = fields.integer("start", 0, 1 << 62), fields.integer("stop", 0, 1 << 62)
        checksums, replicas = (read_checksums(fields.object(key), name) for key in ("checksums", "replicas"))
        fields.done()
        entry: Entry
        if isinstance(whole, WeightEntry):
            entry = WeightEntry(name, whole.format, whole.group_size, whole.shape, axis, start, stop)
        else:
            entry = TensorEntry(name, whole.dtype, whole.shape, axis, start, stop)
        return cls(entry, checksums, replicas)


@dataclass(frozen=True)
class FileRecord:
    """What a closed data file holds; ranks gather these (as JSON) and one of them commits."""

    name: str
    bytes: int
    header: str
    pieces: tuple[PieceRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        pieces = [piece.to_json() for piece in self.pieces]
        return {"name": self.name, "bytes": self.bytes, "header": self.header, "pieces": pieces}

    @classmethod
    def from_json(cls, value: object) -> FileRecord:
        """Return the record that `to_json` gave; anything else is a CheckpointError."""
        fields = Fields(value, "a file's record")
        name, size, header = fields.text("name"), fields.integer("bytes", 8, 1 << 62), fields.text("header")
        pieces = tuple(PieceRecord.from_json(piece) for piece in fields.array("pieces"))
        fields.done()
        return cls(name, size, header, pieces)


def _checksums(data: memoryview) -> tuple[str, ...]:
    return tuple(checksum(data[at : at + CHECKSUM_BLOCK]) for at in range(0, len(data), CHECKSUM_BLOCK))


class ShardWriter:
    """Write the data file `file_name` (one of shard_names) that holds the pieces `entries` declare.

    The file is made at once and its space reserved, so a full disk is known before any work is done. Pieces come in
    any order; empty ones (a rank of zero width) take no place. Memory: nothing beyond the piece being written, which
    is not copied where it is contiguous and on the CPU. As a context manager it removes the file on an exception;
    until `commit` nobody sees the file. Every failure is a CheckpointError.
    """

    def __init__(self, directory: str | os.PathLike[str], file_name: str, entries: Sequence[Entry]) -> None:
        check_file_name(file_name, "ShardWriter")
        self.path = Path(directory) / file_name
        self._empty = [PieceRecord(e, {}, {}) for e in entries if e.start == e.stop]
        self._entries = {(e.name, e.start): e for e in entries if e.start != e.stop}
        if len(self._entries) + len(self._empty) != len(entries):
            raise CheckpointError(f"{self.path}: two pieces of one tensor begin at the same place")
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for entry in self._entries.values():
            for stored in entry.stored().values():
                if stored.key in tensors:
                    raise CheckpointError(f"{self.path} would hold {stored.key!r} twice")
                tensors[stored.key] = (stored.dtype, stored.shape)
        header, self._begins, self._size = build_header(tensors)
        self._header = checksum(header)
        self._done: dict[tuple[str, int], PieceRecord] = {}
        self._fd = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._reserve()
            self._write(memoryview(header), 0)
        except OSError as error:
            raise self._failed(error) from error

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._fd, 0, self._size)
        except OSError as error:
            if error.errno not in (EINVAL, EOPNOTSUPP):
                raise
            os.ftruncate(self._fd, self._size)  # a filesystem that cannot reserve

    def _failed(self, error: OSError) -> CheckpointError:
        self.abort()
        return CheckpointError(f"cannot write {self.path} ({self._size} bytes): {reason(error)}; nothing of it is kept")

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def _entry(self, name: str, start: int) -> Entry:
        if self._fd < 0:
            raise CheckpointError(f"{self.path} is closed; {name} can no longer be written")
        entry = self._entries.get((name, start))
        if entry is None:
            raise CheckpointError(f"{self.path} was not declared to hold a piece of {name} that begins at {start}")
        if (name, start) in self._done:
            raise CheckpointError(f"{self.path}: the piece of {name} that begins at {start} is written twice")
        return entry

    def _store(self, entry: Entry, tensors: dict[str, torch.Tensor]) -> None:
        stored = entry.stored()
        sums: dict[str, tuple[str, ...]] = {}
        for part, tensor in tensors.items():
            if tensor.is_meta:
                raise CheckpointError(f"{entry.name} has no values: it is on the meta device")
            data = bytes_of(tensor.detach().cpu().contiguous())
            sums[part] = _checksums(data)
            if part in stored:
                try:
                    self._write(data, self._begins[stored[part].key])
                except OSError as error:
                    raise self._failed(error) from error
        mine = {part: sums[part] for part in stored}
        others = {part: found for part, found in sums.items() if part not in stored}
        self._done[entry.name, entry.start] = PieceRecord(entry, mine, others)

    def write_weight(self, name: str, start: int, weight: PackedWeight) -> None:
        """Write the declared piece of the weight `name` that begins at `start` along its axis."""
        if 0 in weight.shape:
            return
        entry = self._entry(name, start)
        if not isinstance(entry, WeightEntry):
            raise CheckpointError(f"{self.path}: {name} was declared as a tensor, not as a weight")
        have = (weight.format.name, weight.group_size, weight.shape)
        want = (entry.format.name, entry.group_size, entry.local_shape)
        if have != want:
            raise CheckpointError(f"{self.path}: the piece of {name} at {start} is {have}; declared was {want}")
        self._store(entry, weight.tensors())

    def write_tensor(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Write the declared rows of the plain tensor `name` that begin at row `start` (0 for a whole one)."""
        if tensor.ndim and tensor.shape[0] == 0:
            return
        entry = self._entry(name, start)
        if not isinstance(entry, TensorEntry):
            raise CheckpointError(f"{self.path}: {name} was declared as a weight, not as a tensor")
        have, want = (tensor.dtype, tuple(tensor.shape)), (entry.dtype, entry.local_shape)
        if have != want:
            raise CheckpointError(f"{self.path}: the piece of {name} at {start} is {have}; declared was {want}")
        self._store(entry, {"data": tensor})

    def close(self) -> FileRecord:
        """Put the file on the disk (fsync) and return its record; a piece never written is a CheckpointError."""
        missing = [entry for key, entry in self._entries.items() if key not in self._done]
        if missing:
            self.abort()
            first = f"{missing[0].name} [{missing[0].start}, {missing[0].stop})"
            raise CheckpointError(f"{self.path}: {len(missing)} declared pieces were never written, first {first}")
        if self._fd < 0:
            raise CheckpointError(f"{self.path} is closed already")
        try:
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
        except OSError as error:
            raise self._failed(error) from error
        return FileRecord(self.path.name, self._size, self._header, (*self._done.values(), *self._empty))

    def abort(self) -> None:
        """Close and remove the file; after `close` this does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
