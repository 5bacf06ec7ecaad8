"""Read ranges of weights and tensors from a checkpoint of any tp, touching only the blocks that they lie in."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dist_lowbit.core.errors import CheckpointError, FormatError
from dist_lowbit.formats import PackedWeight
from dist_lowbit.formats.packed import PartLayout, grain, part_layout

from .blocks import StoredBytes
from .container import DTYPE_NAMES, DTYPES, DataFile, bytes_of, checksum, reason
from .manifest import MANIFEST, MANIFEST_LIMIT, FileInfo, Info, Manifest, TensorInfo, WeightInfo
from .pieces import Range, Stored, copies
from .schema import decode


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds a lowbit.json."""
    return (Path(path) / MANIFEST).is_file()


def _missing(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is no directory; expected one with {MANIFEST}")
    hint = ""
    if (folder / "config.json").is_file():
        hint = "; it looks like a model in its original precision: convert it first"
    return CheckpointError(f"{folder} has no {MANIFEST}; expected a low-bit checkpoint{hint}")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest of a checkpoint and the checksum of its text; no data file is opened."""
    path = folder / MANIFEST
    try:
        # O_NONBLOCK: opening a fifo must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size > MANIFEST_LIMIT:
                kind = "a file" if stat.S_ISREG(info.st_mode) else "no regular file"
                raise CheckpointError(
                    f"{path} is {kind} of {info.st_size} bytes; expected a file of at most {MANIFEST_LIMIT}"
                )
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(info.st_size)  # as much as there is: read allocates what it is asked for
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(folder) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
    return decode(data, str(path)), checksum(data)


def open_file(folder: Path, manifest: Manifest, index: int) -> DataFile:
    """Open a data file and check that its header says what the manifest says."""
    info = manifest.files[index]
    path = folder / info.name
    try:
        file = DataFile(path, info.bytes)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; {MANIFEST} lists {len(manifest.files)} data files, of which all are needed"
        ) from None
    try:
        _check_header(file, info.header, {key: stored for key, (stored, _) in manifest.expected[index].items()})
    except BaseException:
        file.close()
        raise
    return file


def _check_header(file: DataFile, header: str, expected: Mapping[str, Stored]) -> None:
    for key, stored in expected.items():
        entry = file.entries.get(key)
        if entry is None:
            raise CheckpointError(f"{file.path} lacks {key!r}, which {MANIFEST} says it holds")
        if DTYPES.get(entry.dtype) != stored.dtype or entry.shape != stored.shape:
            raise CheckpointError(
                f"{file.path} holds {key!r} as {entry.dtype} {list(entry.shape)}; "
                f"expected {DTYPE_NAMES[stored.dtype]} {list(stored.shape)}"
            )
    extra = file.entries.keys() - expected.keys()
    if extra:
        raise CheckpointError(f"{file.path} holds {min(extra)!r:.200}, which {MANIFEST} does not list")
    if file.header_checksum != header:
        raise CheckpointError(
            f"{file.path} has a header of checksum {file.header_checksum}; expected {header:.40}: it is damaged"
        )


@dataclass(frozen=True)
class _Part:
    """A part of a weight being read: its layout whole and as wanted."""

    name: str
    whole: PartLayout
    wanted: PartLayout

    def along(self, ranges: Sequence[Range], axis: int) -> list[Range]:
        """Return ranges of an axis in stored elements; one element where the part is constant along it."""
        unit = self.whole.unit[axis]
        return [(-(-a // unit), -(-b // unit)) for a, b in ranges] if unit else [(0, 1)]


class CheckpointReader:
    """Read a checkpoint: any range of anything, whatever tp it was saved with.

    All data files are opened at once (a later save into the directory does not disturb the reader), nothing is mapped
    and no data is read before it is asked for. With `verify` every checksum block that is touched is read whole and
    checked. With `keep_cache=False` the kernel is advised to drop from its cache what was read; the default keeps it,
    for the other ranks of the host and for a restart. Reads keep no state, so threads may share a reader. `identity`
    is the checksum of lowbit.json: ranks whose identities are equal read the same save. Raises CheckpointError.
    """

    def __init__(self, directory: str | os.PathLike[str], verify: bool = True, keep_cache: bool = True) -> None:
        self.directory = Path(directory)
        self._verify = verify
        self._keep_cache = keep_cache
        self._files: list[DataFile] = []
        while True:
            self._manifest, self.identity = read_manifest(self.directory)
            try:
                for index in range(len(self._manifest.files)):
                    self._files.append(open_file(self.directory, self._manifest, index))
                return
            except CheckpointError:
                self.close()
                if read_manifest(self.directory)[1] == self.identity:
                    raise  # else a save was committed in between: take the new one
            except BaseException:
                self.close()
                raise

    @property
    def tp(self) -> int:
        """Return the tp that the checkpoint was saved with."""
        return self._manifest.tp

    @property
    def producer(self) -> str:
        """Return what wrote the checkpoint."""
        return self._manifest.producer

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """Return the data files."""
        return self._manifest.files

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what the saver put beside the data."""
        return self._manifest.metadata

    @property
    def weights(self) -> Mapping[str, WeightInfo]:
        """Return the packed weights by name."""
        return self._manifest.weights

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return the plain tensors by name."""
        return self._manifest.tensors

    def read_weight(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> PackedWeight:
        """Read a weight, or the ranges [start, stop) of it along an axis (0 = N, 1 = K), joined in the order given.

        Edges must be multiples of the format's grain or the end of the axis, and a range that ends off the grain must
        be the last: else a FormatError. No ranges, or empty ones, give a weight of zero width. Cost: the blocks that
        the ranges touch; along K of a weight stored whole, or cut along N, these are all blocks.
        """
        info = self.weights.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} holds no weight {name!r}; it holds {_some(self.weights)}")
        if axis is None:
            if ranges is not None:
                raise FormatError(f"ranges of {name} were given without their axis")
            axis = 0
        wanted = [(0, info.shape[axis])] if ranges is None else [(int(a), int(b)) for a, b in ranges]
        total = _check_ranges(info, axis, wanted)
        shape = (total, info.shape[1]) if axis == 0 else (info.shape[0], total)
        format = info.whole.format
        layouts = part_layout(format, info.shape, info.group_size)
        tensors = {}
        for part, layout in part_layout(format, shape, info.group_size).items():
            tensors[part] = self._read_part(info, _Part(part, layouts[part], layout), wanted, axis)
        return PackedWeight.from_tensors(format, shape, info.group_size, tensors)

    def _read_part(self, info: WeightInfo, part: _Part, ranges: Sequence[Range], axis: int) -> torch.Tensor:
        out = torch.empty(part.wanted.shape, dtype=part.wanted.dtype)
        item = out.element_size()
        cut = info.axis or 0
        holders = [shard for shard in info.shards if part.name in shard.checksums]
        pieces = [part.along([(shard.start, shard.stop)], cut)[0] for shard in holders]
        for copy in copies(part.along(ranges, axis), axis, pieces, cut, part.whole.shape):
            shard = holders[copy.piece]
            source = self._stored(info, shard.file, info.entry(shard).stored()[part.name])
            columns = (copy.start[1] * item, copy.stop[1] * item)
            source.read_rows((copy.start[0], copy.stop[0]), columns, out, (copy.to[0], copy.to[1] * item))
        return out

    def read_tensor(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Read a plain tensor, or its rows [start, stop)."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}; it holds {_some(self.tensors)}")
        first, last = 0 if start is None else start, info.size if stop is None else stop
        if not 0 <= first <= last <= info.size or (not info.shape and (start, stop) != (None, None)):
            raise CheckpointError(f"{name} of shape {list(info.shape)} has no rows [{first}, {last})")
        out = torch.empty((last - first, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        view = bytes_of(out)
        for shard in info.shards:
            low, high = max(first, shard.start), min(last, shard.stop)
            if low < high and len(view):
                source = self._stored(info, shard.file, info.entry(shard).stored()["data"])
                pitch = source.stored.pitch
                into = view[(low - first) * pitch : (high - first) * pitch]
                source.read((low - shard.start) * pitch, (high - shard.start) * pitch, into)
        return out

    def _stored(self, info: Info, index: int, stored: Stored) -> StoredBytes:
        if not self._files:
            raise CheckpointError(f"the reader of {self.directory} is closed; {info.name} can no longer be read")
        sums = self._manifest.expected[index][stored.key][1] if self._verify else None
        return StoredBytes(self._files[index], stored, sums, self._keep_cache)

    def stored(self) -> list[StoredBytes]:
        """Return everything that the data files hold, to be read in the order of its bytes."""
        found = []
        for file, expected in zip(self._files, self._manifest.expected, strict=True):
            found += [StoredBytes(file, *expected[key], keep_cache=self._keep_cache) for key in file.entries]
        return found

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _some(names: Mapping[str, object]) -> str:
    first = ", ".join(list(names)[:3])
    return f"{len(names)}: {first}{', ...' if len(names) > 3 else ''}" if names else "none"


def _check_ranges(info: WeightInfo, axis: int, ranges: Sequence[Range]) -> int:
    size = info.shape[axis]
    step = grain(info.whole.format, info.group_size, axis)
    total = 0
    for start, stop in ranges:
        edges = all(edge % step == 0 or edge == size for edge in (start, stop))
        if not 0 <= start <= stop <= size or not edges or (total % step and stop > start):
            raise FormatError(
                f"cannot read [{start}, {stop}) of {'NK'[axis]} = {size} of {info.name} ({info.format}); "
                f"expected multiples of {step}, or the end in the last range"
            )
        total += stop - start
    return total
