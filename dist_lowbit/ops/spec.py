"""What a kernel is asked for, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dist_lowbit.core.errors import UsageError
from dist_lowbit.formats import Format, PackedWeight
from dist_lowbit.formats.packed import summation_block

SEGMENTS = 8


@dataclass(frozen=True)
class LinearSpec:
    """A Linear to be run: y [M, n] = x [M, k] W^T.

    cuts: the nine ends of the eight segments along K, from 0 to k; inner ones are multiples of the block, equal ends
    are an empty segment (parallel/ computes them; `whole_cuts` for a Linear that is not split). compute: "int8" rounds
    the activations of integer formats per block, "fp32" keeps them. device: the type of the device, "cpu",
    "cuda" or "xpu".
    """

    format: Format
    n: int
    k: int
    group_size: int
    cuts: tuple[int, ...]
    compute: str = "int8"
    device: str = "cpu"

    @property
    def block(self) -> int:
        """Return the summation block: the group, or 64 where a row is one group or has none."""
        return summation_block(self.group_size)

    @classmethod
    def of(
        cls, weight: PackedWeight, cuts: tuple[int, ...] | None = None, compute: str = "int8", device: str = "cpu"
    ) -> LinearSpec:
        """Return the spec of a weight; without cuts, those of the whole K in units of one block."""
        n, k = weight.shape
        if cuts is None:
            cuts = whole_cuts(k, weight.block)
        return cls(weight.format, n, k, weight.group_size, tuple(cuts), compute, device)


def whole_cuts(k: int, unit: int) -> tuple[int, ...]:
    """Return the segment ends of a K that is not split, in multiples of `unit`."""
    units = -(-k // unit)
    return tuple(min(k, i * units // SEGMENTS * unit) for i in range(SEGMENTS + 1))


def mismatch(n: int, k: int, asked_n: int, asked_k: int) -> UsageError:
    """Return the error for an x or an n that is not the weight's."""
    return UsageError(f"x has {asked_k} features for {asked_n} outputs; the weight takes {k} for {n}")


class Kernel(Protocol):
    """A way to run a Linear. It states what it takes, owns a layout of weights, and can undo it."""

    name: str

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return why this kernel does not take `spec`, as part of a sentence, or None if it does."""
        ...

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> torch.Tensor:
        """Return the weight in this kernel's own layout: one uint8 tensor that describes itself."""
        ...

    def unpack(self, opaque: torch.Tensor, spec: LinearSpec) -> PackedWeight:
        """Return the weight that was prepacked, every part bit for bit."""
        ...

    def run(self, x: torch.Tensor, opaque: torch.Tensor, out: torch.Tensor) -> None:
        """Write the product of x (fp32 [M, K], rows contiguous) into out (fp32 [M, N], rows contiguous)."""
        ...
