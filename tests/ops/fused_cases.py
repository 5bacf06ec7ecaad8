"""Helpers of the tests of fused products and experts: packing, the separate steps, segments, guarded buffers."""

from __future__ import annotations

import ctypes
import mmap
from itertools import pairwise

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.formats import PackedWeight, quantize
from dist_lowbit.ops import elementwise as el
from dist_lowbit.ops.fused import Finish, Rows
from dist_lowbit.ops.reference import Segments

FORMATS = [("sym_int4", 64), ("asym_int4", 32), ("sym_int8", -1), ("nf4", 64), ("fp16", -1), ("fp8_e4m3", 64)]
SLOW = pytest.mark.slow


def isa_names() -> list[str]:
    return [name for name, supported, _ in ops.isas() if supported]


def pack(weight: PackedWeight, cuts: tuple[int, ...] | None = None, compute: str = "int8") -> torch.Tensor:
    spec = ops.LinearSpec.of(weight, cuts, compute)
    return ops.choose(spec).prepack(weight, spec)


def product(x: torch.Tensor, packed: torch.Tensor, n: int) -> torch.Tensor:
    return ops.linear(x, packed, "cpu", n)


def weights(n: int, k: int, generator: torch.Generator) -> list[PackedWeight]:
    return [quantize(torch.randn(n + i, k, generator=generator), *f) for i, f in enumerate(FORMATS)]


def steps_of(rows: Rows) -> torch.Tensor:
    if rows.norm == "rms":
        return el.rms_norm(rows.x, rows.weight, rows.eps, rows.offset)
    if rows.norm == "layer":
        return el.layer_norm(rows.x, rows.weight, rows.bias, rows.eps, rows.offset)
    if rows.up is not None:
        return el.gated(rows.x, rows.up, rows.activation)
    return el.activation(rows.x, rows.activation) if rows.activation else rows.x


def finished(y: torch.Tensor, finish: Finish) -> torch.Tensor:
    y = y if finish.bias is None else y + finish.bias
    y = y if finish.residual is None else y + finish.residual
    return y.to(finish.dtype)


def segments_of(x: torch.Tensor, weight: PackedWeight, cuts: tuple[int, ...]) -> Segments:
    """Return the segments of a product as products of their own, by the same kernel: the definition, for any ISA."""
    parts: Segments = []
    for start, stop in pairwise(cuts):
        alone = (0, *[stop - start] * 8)
        piece = None if start == stop else pack(weight.split(1, start, stop), alone)
        parts.append(None if piece is None else product(x[:, start:stop].contiguous(), piece, weight.shape[0]))
    return parts


def cuts_of(weight: PackedWeight) -> tuple[int, ...]:
    return ops.whole_cuts(weight.shape[1], weight.block)


def rank_cuts(cuts: tuple[int, ...], rank: int, tp: int) -> tuple[int, int, tuple[int, ...]]:
    start, stop = cuts[rank * 8 // tp], cuts[(rank + 1) * 8 // tp]
    return start, stop, tuple(min(max(cut, start), stop) - start for cut in cuts)


def rank_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


class Guarded:
    """Copies of tensors that end where a page begins that may not be touched: a step too far ends the process."""

    def __init__(self) -> None:
        self.libc, self.maps = ctypes.CDLL(None, use_errno=True), list[mmap.mmap]()

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        size = x.numel() * x.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, pages + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert self.libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.maps.append(area)
        flat = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=pages - size) if size else x.flatten()
        flat.copy_(x.flatten())
        return flat.view(x.shape)
