"""Make a save visible: check that its files hold everything once, then rename lowbit.json into place."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from errno import EINVAL
from pathlib import Path
from typing import Any

from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.core.log import logger
from dist_lowbit.core.version import __version__

from .container import reason
from .manifest import MANIFEST, FileInfo, Manifest, Shard, TensorInfo, WeightInfo, is_data_file
from .pieces import Entry, TensorEntry, WeightEntry
from .reader import open_file, read_manifest
from .schema import decode, encode
from .writer import FileRecord, PieceRecord


def _identity(entry: Entry) -> tuple[Any, ...]:
    if isinstance(entry, WeightEntry):
        return (entry.format.name, entry.group_size, entry.shape, entry.axis)
    return (entry.dtype, entry.shape, entry.axis)


def _check_same(name: str, pieces: Sequence[tuple[int, PieceRecord]]) -> None:
    """Refuse pieces of one name that are not pieces of one thing, or whose constant parts differ."""
    first = pieces[0][1]
    constants = {part: sums for _, p in pieces for part, sums in p.checksums.items()}
    for _, piece in pieces:
        if _identity(piece.entry) != _identity(first.entry):
            raise CheckpointError(
                f"ranks disagree about {name}: one has {_identity(first.entry)}, another {_identity(piece.entry)}"
            )
        for part, sums in piece.replicas.items():
            if part in constants and sums != constants[part]:
                raise CheckpointError(f"ranks disagree about part {part} of {name}, which must be the same on all")


def _assemble(tp: int, metadata: Mapping[str, Any], records: Sequence[FileRecord], producer: str) -> Manifest:
    gathered: dict[str, list[tuple[int, PieceRecord]]] = {}
    for index, record in enumerate(records):
        for piece in record.pieces:
            gathered.setdefault(piece.entry.name, []).append((index, piece))
    weights: dict[str, WeightInfo] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, pieces in gathered.items():
        pieces.sort(key=lambda item: item[1].entry.start)
        _check_same(name, pieces)
        filled = [(i, p) for i, p in pieces if p.entry.start != p.entry.stop]
        shards = tuple(Shard(i, p.entry.start, p.entry.stop, p.checksums) for i, p in filled)
        e = pieces[0][1].entry
        if isinstance(e, WeightEntry):
            weights[name] = WeightInfo(WeightEntry(name, e.format, e.group_size, e.shape), e.axis, shards)
        else:
            tensors[name] = TensorInfo(TensorEntry(name, e.dtype, e.shape), e.axis, shards)
    files = tuple(FileInfo(record.name, record.bytes, record.header) for record in records)
    try:
        plain = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the metadata is no JSON: {error}") from None
    return Manifest(tp, producer, plain, files, weights, tensors)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != EINVAL:  # a filesystem whose directories have nothing to flush
            raise
    finally:
        os.close(fd)


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        if is_data_file(name):  # whatever a manifest lists, nothing else is ever removed
            try:
                (directory / name).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("could not remove %s: %s", directory / name, reason(error))


def _previous(directory: Path) -> list[str]:
    """Return the data files of the checkpoint that stands there; none where there is none that can be read."""
    if not (directory / MANIFEST).exists():
        return []
    try:
        return [file.name for file in read_manifest(directory)[0].files]
    except CheckpointError as error:
        logger.warning("%s; its data files, if any, are left in place", error)
        return []


def commit(
    directory: str | os.PathLike[str],
    tp: int,
    metadata: Mapping[str, Any],
    records: Sequence[FileRecord],
    producer: str = f"dist_lowbit {__version__}",
) -> Manifest:
    """Make closed data files the checkpoint of `directory`, and remove those of the checkpoint before it.

    One rank calls it, after all have closed theirs, with every record, including those of ranks that own nothing.
    `metadata` is any JSON object. Checks that every range of every tensor is there exactly once and that the files
    are as recorded, then renames lowbit.json into place: before that a reader sees the old checkpoint, after it the
    new one, also if the machine stops in between. A failure is a CheckpointError and leaves the old checkpoint; the
    new files stay, for another try or for `discard` (which also knows whether an interrupted commit went through).
    """
    folder = Path(directory)
    where = folder / MANIFEST
    try:
        manifest = _assemble(tp, metadata, records, producer)
        data = encode(manifest)
        decode(data, str(where))  # what is written must be readable
    except CheckpointError as error:
        raise CheckpointError(f"cannot save to {folder}: {error}") from None
    for index in range(len(manifest.files)):
        open_file(folder, manifest, index).close()
    old = [name for name in _previous(folder) if name not in {file.name for file in manifest.files}]
    temporary = folder / f".lowbit-{secrets.token_hex(4)}.json"
    try:
        _write_new(temporary, data)
        _sync(folder)  # the data files' names must be on the disk before the manifest that lists them
        os.replace(temporary, where)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            text = f"cannot write {where}: {reason(error)}; what stood there before is intact"
            raise CheckpointError(text) from error
        raise
    try:
        _sync(folder)
    except OSError as error:
        # The new checkpoint is in place, so this is no failure; but a power cut may bring the old one back.
        logger.warning("%s cannot be flushed (%s): the data files of the save before are kept", folder, reason(error))
        return manifest
    _remove(folder, old)
    return manifest


def discard(directory: str | os.PathLike[str], records: Sequence[FileRecord]) -> None:
    """Remove the closed data files of a save that will not be committed; files of the checkpoint in place stay."""
    live = _previous(Path(directory))
    _remove(Path(directory), [record.name for record in records if record.name not in live])
