"""The safetensors container: a length, a JSON header, then the tensors' bytes without holes.

https://huggingface.co/docs/safetensors: 8 bytes little-endian length of the header, the header, the data.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from dist_lowbit.core.errors import CheckpointError

from .strict import Fields, parse_json

ALIGNMENT = 64  # where the data starts: a cache line, which is more than any dtype needs
HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
DIM_LIMIT = 1 << 48  # keeps every product of our own in range; 256 T elements along one axis
RANK_LIMIT = 16

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file: dtype as the file names it, shape, and its bytes [begin, end) counted from the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return xxh3_64 of the bytes, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def reason(error: OSError) -> str:
    """Return what the system says about an error, in words."""
    return (error.strerror or type(error).__name__).lower()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """Return the header's bytes (length included), each tensor's offset in the file, and the file's size.

    Tensors with larger elements come first, so that each is aligned to its own element though nothing is padded.
    """
    order = sorted(tensors, key=lambda key: -tensors[key][0].itemsize)  # stable: the given order within a size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for key in order:
        dtype, shape = tensors[key]
        begins[key] = at
        end = at + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(f"a header of {len(text)} bytes for {len(order)} tensors is over {HEADER_LIMIT} bytes")
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {key: start + begin for key, begin in begins.items()}, start + at


def _entry(key: str, value: object, data_size: int, where: str) -> HeaderEntry:
    fields = Fields(value, f"{where}: the header's entry {key!r:.200}")
    dtype = fields.text("dtype")
    shape = fields.integers("shape", 0, DIM_LIMIT, RANK_LIMIT)
    offsets = fields.integers("data_offsets", 0, 1 << 62, 2)
    fields.done()
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise CheckpointError(
            f"{where}: {key!r:.200} lies at {list(offsets)} in the header; expected a range within {data_size} bytes"
        )
    size = offsets[1] - offsets[0]
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != size:
        want = math.prod(shape) * DTYPES[dtype].itemsize
        raise CheckpointError(f"{where}: {key!r:.200} of {dtype} {list(shape)} has {size} bytes; expected {want}")
    return HeaderEntry(dtype, shape, offsets[0], offsets[1])


def parse_header(text: bytes, data_size: int, where: str) -> dict[str, HeaderEntry]:
    """Return a header's entries in the order of their bytes, which must fill the data without hole or overlap."""
    found = parse_json(text, f"{where}: the header")
    found.pop("__metadata__", None)
    entries = {key: _entry(key, value, data_size, where) for key, value in found.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for key, entry in entries.items():
        if entry.begin != at:
            raise CheckpointError(f"{where}: {key!r:.200} begins at byte {entry.begin} of the data; expected {at}")
        at = entry.end
    if at != data_size:
        raise CheckpointError(f"{where} has {data_size} bytes of data; expected {at} as its header says")
    return entries


class DataFile:
    """A safetensors file held open for pread; nothing of it is mapped.

    Only regular files are opened (a link to one is followed: hub caches are made of links). Raises FileNotFoundError
    where there is none, CheckpointError for all else.
    """

    def __init__(self, path: Path, expected_bytes: int | None = None) -> None:
        self.path = path
        self._fd = -1
        try:
            # O_NONBLOCK: opening a fifo must not wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            info = os.fstat(self._fd)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path} is no regular file; expected a safetensors file")
            self.size = info.st_size
            if expected_bytes is not None and self.size != expected_bytes:
                raise CheckpointError(
                    f"{path} has {self.size} bytes; expected {expected_bytes}: it is truncated or of another save"
                )
            self.entries = self._read_header()
        except FileNotFoundError:
            raise
        except OSError as error:
            self.close()
            raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, HeaderEntry]:
        prefix = bytearray(8)
        if self.size < 8:
            raise CheckpointError(f"{self.path} has {self.size} bytes; expected a safetensors file of 8 or more")
        self.read_into(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(HEADER_LIMIT, self.size - 8):
            limit = min(HEADER_LIMIT, self.size - 8)
            raise CheckpointError(f"{self.path} claims a header of {length} bytes; expected at most {limit}")
        text = bytearray(length)
        self.read_into(memoryview(text), 8)
        self.header_checksum = checksum(bytes(prefix) + text)
        self.data_start = 8 + int(length)
        return parse_header(bytes(text), self.size - self.data_start, str(self.path))

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the file's bytes from `offset`; a short file or a disk error is a CheckpointError."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path} at byte {offset + done}: {reason(error)}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} has become shorter than {offset + len(view)} bytes; expected {self.size}"
                )
            done += count

    def forget(self, offset: int, length: int) -> None:
        """Advise the kernel to drop these bytes from its page cache."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
