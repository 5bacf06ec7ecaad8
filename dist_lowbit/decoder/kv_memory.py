"""Where a cache lies: on the CPU all its tensors in one piece, in huge pages where the system has them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from dist_lowbit.core.pages import huge_pages

_ALIGNMENT = 4096

Kind = tuple[tuple[int, ...], torch.dtype]


class KvMemory:
    """Tensors of zeros of the given shapes and dtypes on one device.

    A step reads a cache in pieces of a few KB that lie apart, so with small pages nearly every piece costs a walk
    through the page tables; one piece of memory for all layers is large enough for pages of 2 MiB. What was never
    written takes none, up to the rest of a page that was.
    """

    def __init__(self, kinds: Sequence[Kind], device: str | torch.device) -> None:
        self._device = device
        self._room: mmap.mmap | None = None
        self._places: list[tuple[int, int]] = []
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
        if torch.device(device).type != "cpu" or sum(sizes) == 0:
            self.tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in kinds]
            return
        at = 0
        for size in sizes:
            self._places.append((at, size))
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._room = huge_pages(at)
        whole = torch.frombuffer(self._room, dtype=torch.uint8)
        self.tensors = [
            whole[first : first + size].view(dtype).view(shape)
            for (first, size), (shape, dtype) in zip(self._places, kinds, strict=True)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> KvMemory:
        """Copy what is in the tensors into memory of the copy's own."""
        copied = KvMemory([(tuple(t.shape), t.dtype) for t in self.tensors], self._device)
        for to, tensor in zip(copied.tensors, self.tensors, strict=True):
            to.copy_(tensor)
        return copied

    def drop(self, index: int) -> None:
        """Give the memory of one tensor back; it reads as zeros from now on where it lay in the one piece."""
        if self._room is not None and self._places[index][1]:
            self._room.madvise(mmap.MADV_DONTNEED, *self._places[index])
