"""Read ordinary Hugging Face weights tensor by tensor, never a file at once, for convert."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.core.log import logger

from .container import DTYPES, DataFile, bytes_of, reason
from .manifest import MANIFEST
from .strict import Fields, parse_json

INDEX_LIMIT = 1 << 28
REMAP = 1 << 26  # bytes read from a mapped .bin before it is mapped anew, which gives its pages back
SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_SHARDED = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a model's files, known before its data is read. `dtype` is None where torch has no such type."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: str


def _check_rows(info: SourceTensor, start: int | None, stop: int | None) -> tuple[int, int]:
    rows = info.shape[0] if info.shape else 1
    first, last = 0 if start is None else start, rows if stop is None else stop
    if not 0 <= first <= last <= rows or (not info.shape and (start, stop) != (None, None)):
        raise CheckpointError(f"{info.name} of shape {list(info.shape)} in {info.file} has no rows [{first}, {last})")
    return first, last


class _Safetensors:
    """Safetensors files, held open and read with pread."""

    def __init__(self, folder: Path, files: list[str], keep_cache: bool) -> None:
        self._keep_cache = keep_cache
        self._files: dict[str, DataFile] = {}
        self.tensors: dict[str, list[SourceTensor]] = {}
        try:
            for name in files:
                self._files[name] = file = _open(folder / name)
                self.tensors[name] = [
                    SourceTensor(key, DTYPES.get(entry.dtype), entry.shape, name) for key, entry in file.entries.items()
                ]
        except BaseException:
            self.close()
            raise

    def read(self, info: SourceTensor, start: int | None, stop: int | None) -> torch.Tensor:
        file = self._files[info.file]
        entry = file.entries[info.name]
        if info.dtype is None:
            raise CheckpointError(
                f"{file.path} holds {info.name} as {entry.dtype}; expected one of {', '.join(DTYPES)}"
            )
        first, last = _check_rows(info, start, stop)
        out = torch.empty((last - first, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        view = bytes_of(out)
        if len(view):
            offset = file.data_start + entry.begin + first * (len(view) // (last - first))
            file.read_into(view, offset)
            if not self._keep_cache:
                file.forget(offset, len(view))
        return out

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def _open(path: Path) -> DataFile:
    try:
        return DataFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though the model's index lists it") from None


class _Pickled:
    """Files of torch.save, read with weights_only: one mapped at a time, and none for long."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._folder = folder
        self._name = ""
        self._state: dict[str, torch.Tensor] = {}
        self._read = 0
        self.tensors: dict[str, list[SourceTensor]] = {}
        for name in files:
            state = self._load(name)
            self.tensors[name] = [SourceTensor(key, t.dtype, tuple(t.shape), name) for key, t in state.items()]

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        if name == self._name and self._read < REMAP:
            return self._state
        self.close()
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or no regular file; expected weights of torch.save")
        self._state = _load_pickled(path)
        self._name = name
        return self._state

    def read(self, info: SourceTensor, start: int | None, stop: int | None) -> torch.Tensor:
        first, last = _check_rows(info, start, stop)
        tensor = self._load(info.file)[info.name]
        out = (tensor[first:last] if info.shape else tensor).detach().clone(memory_format=torch.contiguous_format)
        self._read += out.nbytes
        return out

    def close(self) -> None:
        self._state, self._name, self._read = {}, "", 0


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # a zip; the format before torch 1.6 is not, and cannot be mapped
    if not mapped:
        logger.info("%s is of the format before torch 1.6: it is read whole", path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises whatever its parsers meet
        text = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"cannot read {path} as plain weights of torch.save: {text or type(error).__name__}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a dict of tensors")
    for key, value in state.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not plain or value.is_quantized:
            raise CheckpointError(
                f"{path} holds {key!r:.80} of type {type(value).__name__}; expected plain tensors only"
            )
    return state


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor as an index says, the names checked to be names within its folder."""
    try:
        size = path.stat().st_size
        if size > INDEX_LIMIT:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {INDEX_LIMIT}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
    weight_map = Fields(parse_json(data, str(path)), str(path)).object("weight_map")
    for name, file in weight_map.items():
        bad = not isinstance(file, str) or not file or file.startswith(".") or not file.isprintable()
        if bad or "/" in file or "\\" in file:
            raise CheckpointError(f"{path} puts {name!r:.80} into {file!r:.120}; expected a file of the same folder")
    if not weight_map:
        raise CheckpointError(f"{path} lists no tensors")
    return weight_map


class TensorSource(Mapping[str, SourceTensor]):
    """Read the weights of an ordinary model directory, tensor by tensor; a mapping of names to what is known of each.

    Takes, in this order, model.safetensors, its index, pytorch_model.bin, its index. Names, shapes and dtypes are
    known at once. Safetensors are read with pread, nothing of them is mapped, and the kernel is advised to drop what
    was read (unless `keep_cache`). A .bin is unpickled with weights_only and mapped, its pages given back every
    64 MiB; one from before torch 1.6 is held whole. Whatever is damaged, missing or unsafe is a CheckpointError.
    """

    def __init__(self, directory: str | os.PathLike[str], keep_cache: bool = False) -> None:
        self.directory = Path(directory)
        self._backend: _Safetensors | _Pickled | None = None
        kind, files, index = self._find()
        opened: _Safetensors | _Pickled
        opened = _Safetensors(self.directory, files, keep_cache) if kind else _Pickled(self.directory, files)
        self._backend = opened
        self._tensors: dict[str, SourceTensor] = {}
        try:
            self._collect(opened.tensors, index)
        except BaseException:
            self.close()
            raise

    def _find(self) -> tuple[bool, list[str], dict[str, str] | None]:
        folder = self.directory
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no directory; expected one with a model's weights")
        if (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} is a low-bit checkpoint already; expected a model in its original precision"
            )
        for single, sharded, safe in ((SINGLE, SHARDED, True), (BIN, BIN_SHARDED, False)):
            if (folder / single).exists():
                return safe, [single], None
            if (folder / sharded).exists():
                index = _read_index(folder / sharded)
                return safe, sorted(set(index.values())), index
        raise CheckpointError(f"{folder} has no weights; expected {SINGLE}, {SHARDED}, {BIN} or {BIN_SHARDED}")

    def _collect(self, found: dict[str, list[SourceTensor]], index: dict[str, str] | None) -> None:
        by_file = {name: {t.name: t for t in tensors} for name, tensors in found.items()}
        if index is None:
            self._tensors = next(iter(by_file.values()))
            return
        for name, file in index.items():
            tensor = by_file[file].get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.directory / file} lacks {name!r:.200}, which the model's index puts there"
                )
            self._tensors[name] = tensor

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, start_row: int | None = None, stop_row: int | None = None) -> torch.Tensor:
        """Read a tensor, or its rows [start_row, stop_row), into memory of its own."""
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r:.200}, but {len(self._tensors)} others")
        if self._backend is None:
            raise CheckpointError(f"the source {self.directory} is closed; {name} can no longer be read")
        return self._backend.read(info, start_row, stop_row)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
