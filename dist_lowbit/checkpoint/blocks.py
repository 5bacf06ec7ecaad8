"""Bytes of one stored tensor, read by blocks that are checked before anyone sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_lowbit.core.errors import CheckpointError

from .container import DataFile, bytes_of, checksum
from .pieces import CHECKSUM_BLOCK, Stored

WINDOW = 8 * CHECKSUM_BLOCK  # bytes in memory at once beside the result, and asked of the system in one call
SPARSE = 1 << 16  # a gap that is cheaper to skip than to read: some 30 us of disk against one system call


@dataclass(frozen=True)
class StoredBytes:
    """A stored tensor's bytes; with `sums` each block that is touched is read whole and checked."""

    file: DataFile
    stored: Stored
    sums: Sequence[str] | None
    keep_cache: bool = True

    @property
    def _begin(self) -> int:
        return self.file.data_start + self.file.entries[self.stored.key].begin

    def _check(self, data: memoryview, block: int) -> None:
        assert self.sums is not None
        found = checksum(data)
        if found != self.sums[block]:
            at = self._begin + block * CHECKSUM_BLOCK
            raise CheckpointError(
                f"{self.file.path}: {self.stored.key!r} has checksum {found} in its block {block} "
                f"(bytes {at} to {at + len(data)} of the file); expected {self.sums[block]}: the file is damaged"
            )

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the bytes [start, stop), whole blocks straight, the ends through a block's copy."""
        if self.sums is None:
            self.file.read_into(out, self._begin + start)
        else:
            at = start
            while at < stop:
                at = self._read_some(at, start, stop, out)
        if not self.keep_cache and stop - start >= CHECKSUM_BLOCK:
            self.file.forget(self._begin + start, stop - start)

    def _read_some(self, at: int, start: int, stop: int, out: memoryview) -> int:
        """Read from `at` a run of whole blocks, or the needed bytes of one block; return where it ended."""
        nbytes = self.stored.nbytes
        block = at // CHECKSUM_BLOCK
        low = block * CHECKSUM_BLOCK
        high = min(low + CHECKSUM_BLOCK, nbytes)
        if at > low or stop < high:
            scratch = memoryview(bytearray(high - low))
            self.file.read_into(scratch, self._begin + low)
            self._check(scratch, block)
            end = min(stop, high)
            out[at - start : end - start] = scratch[at - low : end - low]
            return end
        end = stop if stop == nbytes else stop // CHECKSUM_BLOCK * CHECKSUM_BLOCK
        end = min(end, low + WINDOW)
        view = out[at - start : end - start]
        self.file.read_into(view, self._begin + at)
        for i, offset in enumerate(range(0, len(view), CHECKSUM_BLOCK)):
            self._check(view[offset : offset + CHECKSUM_BLOCK], block + i)
        return end

    def read_rows(
        self, rows: tuple[int, int], columns: tuple[int, int], out: torch.Tensor, to: tuple[int, int]
    ) -> None:
        """Copy rows and columns (in bytes) of the stored matrix to row and column (in bytes) `to` of the matrix `out`.

        Whole rows go straight to their place; of cut rows a window of whole rows is read and its columns are taken,
        unless what lies between is large enough to skip.
        """
        pitch, width = self.stored.pitch, columns[1] - columns[0]
        out_pitch = out.shape[1] * out.element_size()
        if width == pitch == out_pitch or rows[1] - rows[0] == 1:
            view = bytes_of(out)
            first = to[0] * out_pitch + to[1]
            size = (rows[1] - rows[0]) * width
            begin = rows[0] * pitch + columns[0]
            self.read(begin, begin + size, view[first : first + size])
            return
        skip = pitch - width > (SPARSE if self.sums is None else 2 * CHECKSUM_BLOCK)
        into = out.view(torch.uint8).numpy()
        buffer = memoryview(bytearray())
        row = rows[0]
        while row < rows[1]:
            # End a window at a block's end, so that no block is read twice where rows divide blocks.
            limit = (row * pitch // CHECKSUM_BLOCK * CHECKSUM_BLOCK + WINDOW) // pitch
            last = row + 1 if skip else min(rows[1], max(row + 1, limit))
            begin, end = row * pitch + columns[0], (last - 1) * pitch + columns[1]
            if len(buffer) < end - begin:
                buffer = memoryview(bytearray(end - begin))
            self.read(begin, end, buffer[: end - begin])
            # numpy copies on this thread; torch would wake its pool for it, which costs more than the copy.
            taken = np.ndarray((last - row, width), np.uint8, buffer, 0, (pitch, 1))
            at = to[0] + row - rows[0]
            into[at : at + last - row, to[1] : to[1] + width] = taken
            row = last

    def read_all(self) -> None:
        """Read and check everything, keeping nothing; the first bad block is a CheckpointError."""
        nbytes = self.stored.nbytes
        buffer = memoryview(bytearray(min(WINDOW, nbytes)))
        for start in range(0, nbytes, WINDOW):
            stop = min(start + WINDOW, nbytes)
            self.read(start, stop, buffer[: stop - start])
