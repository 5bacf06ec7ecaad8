"""Round-to-nearest: each weight on its own, no data needed."""

from __future__ import annotations

from typing import Protocol

import torch

from dist_lowbit.formats import Format, PackedWeight, quantize


class Algorithm(Protocol):
    """What every entry of ALGORITHMS can be called as; an algorithm that needs more is bound to it beforehand."""

    def __call__(
        self, weight_NK: torch.Tensor, format: str | Format, group_size: int | None = None, name: str = "weight"
    ) -> PackedWeight:
        """Quantize a float matrix [N, K]; `name` is the module's, for messages and for the algorithm's own data."""
        ...


def rtn(
    weight_NK: torch.Tensor, format: str | Format, group_size: int | None = None, name: str = "weight"
) -> PackedWeight:
    """Quantize a float matrix [N, K] by rounding each weight to the nearest code; see formats.quantize."""
    return quantize(weight_NK, format, group_size, name)
