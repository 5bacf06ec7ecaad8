"""Where prepacked weights live: one behind the other in large pieces of memory, so that they fill huge pages."""

from __future__ import annotations

import mmap
import threading
import weakref

import torch

from dist_lowbit.core.pages import huge_pages

_PIECE = 64 << 20
_ALIGNMENT = 64  # a cache line
# Below this a weight is not worth a place in a piece, which stays until the last weight in it is gone.
_SMALL = 64 << 10


class WeightMemory:
    """Gives out bytes of pieces of 64 MiB, or of a piece of its own to what is larger than a quarter of one.

    An allocator of C would put each weight somewhere between small pages: weights of a few MiB hardly ever hold an
    aligned 2 MiB. A piece is given back to the system when all tensors in it are gone. Threads may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._piece: weakref.ref[mmap.mmap] | None = None  # its tensors keep it
        self._used = 0

    def empty(self, size: int) -> torch.Tensor:
        """Return uint8 [size] with a storage of its own size, aligned to a cache line; its contents are not defined."""
        if size < _SMALL:
            return torch.empty(size, dtype=torch.uint8)
        if size > _PIECE // 4:
            return torch.frombuffer(huge_pages(size), dtype=torch.uint8)
        with self._lock:
            piece = None if self._piece is None else self._piece()
            if piece is None or self._used + size > _PIECE:
                piece = huge_pages(_PIECE)
                self._piece, self._used = weakref.ref(piece), 0
            at, self._used = self._used, self._used + -(-size // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(piece, dtype=torch.uint8, count=size, offset=at)


weight_memory = WeightMemory()
