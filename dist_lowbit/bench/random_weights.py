"""Random weights straight in a low-bit form: nothing is downloaded, and no matrix is quantized."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from dist_lowbit.formats import Format, PackedWeight
from dist_lowbit.formats.bits import split_planes
from dist_lowbit.formats.packed import part_layout

# Of a row's K weights, each uniform over its codes: about 0.6 of the extent. Twice the extent over sqrt(K) gives
# outputs of the size of the inputs, so that a model of such weights keeps its activations in range.
_GAIN = 2.0
_SLICE = 1 << 20  # elements


def generator(*names: object) -> np.random.Generator:
    """Return a generator that depends on nothing but its names."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:8], "little")))


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    words = rng.integers(0, 1 << 64, size=-(-count // 8), dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8)[:count].reshape(shape))


def random_normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Return normally distributed fp32 values of standard deviation `scale`."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).mul_(scale)


def _planes(row: Format, shape: tuple[int, int], rng: np.random.Generator) -> list[torch.Tensor]:
    """Return the planes of codes that are each as likely as the other, those that no sound weight holds left out."""
    legal = [code for code in range(1 << row.bits) if not row.codebook or math.isfinite(row.codebook[code])]
    if not row.full_range:
        legal.remove(0)
    if len(legal) == 1 << row.bits and shape[1] % 8 == 0:  # any byte of any plane will do
        return [_bytes(rng, (shape[0], shape[1] * bits // 8)) for bits in row.planes]
    drawn = _bytes(rng, shape).to(torch.int32) % len(legal)
    return split_planes(torch.tensor(legal, dtype=torch.uint8)[drawn], row.planes)


def _uniform(rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype, extent: float) -> torch.Tensor:
    """Return values uniform in +-extent, drawn and cast some rows at a time: no fp32 matrix beside the result."""
    out = torch.empty(shape, dtype=dtype)
    step = max(1, _SLICE // shape[1])
    for start in range(0, shape[0], step):
        rows = out[start : start + step]
        rows.copy_(_bytes(rng, (len(rows), 2 * shape[1])).view(torch.int16).float().mul_(extent / (1 << 15)))
    return out


def random_weight(row: Format, shape: tuple[int, int], group_size: int, rng: np.random.Generator) -> PackedWeight:
    """Return a weight (N, K) of random codes and scales; a product with it has about the size of its input.

    Cost: a pass over the bytes of the result (over its elements for codes that leave some out).
    """
    layout = part_layout(row, shape, group_size)
    size = _GAIN / math.sqrt(shape[1])
    if row.dtype is not None:
        return PackedWeight.from_tensors(row, shape, group_size, {"values": _uniform(rng, shape, row.dtype, size)})
    parts = {f"plane{i}": plane for i, plane in enumerate(_planes(row, shape, rng))}
    for name, part in layout.items():
        if name == "scale":
            wide = 1 if row.offset == "none" else 2  # a range around 0 has two sides
            spread = torch.from_numpy(rng.uniform(0.5, 1.0, part.shape).astype(np.float32))
            parts[name] = (spread * (wide * size / row.span)).to(part.dtype)
        elif name == "min":
            parts[name] = (parts["scale"].float() * (-row.span / 2)).to(part.dtype)
        elif name == "zero_point":
            parts[name] = torch.full(part.shape, int(row.span) // 2, dtype=part.dtype)
    return PackedWeight.from_tensors(row, shape, group_size, parts)
