"""How kernels read codebooks: small ones as tables of integers, those of eight bits as floating-point elements."""

from __future__ import annotations

import math
from functools import cache

import torch

from dist_lowbit.formats import Format

_TOP = 127  # integers of a table stay in +-127, as quantized activations do
_TABLE_BITS = 4  # a table has at most 16 entries: what one byte shuffle looks up
_FLOAT8 = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


@cache
def integer_table(row: Format) -> tuple[tuple[int, ...], float] | None:
    """Return (integers T, multiplier m) with codebook[c] ~ T[c] m, or None for a codebook of more than 16 entries.

    Exact where a power of two makes all entries integers within +-127 (fp4). Else the largest entry stands for the
    integer top in 64 to 127 that leaves the least sum of squared errors (nf3: 125, nf4: 112), and the others are
    rounded: an error of at most 1 / (2 top) of the group's largest weight, which itself is kept. m is exact in fp32.
    """
    if row.codec != "codebook" or row.bits > _TABLE_BITS:
        return None
    largest = max(abs(value) for value in row.codebook)
    for shift in range(16):
        scaled = [value * 2.0**shift for value in row.codebook]
        if largest * 2.0**shift <= _TOP and all(value == int(value) for value in scaled):
            return tuple(int(value) for value in scaled), 2.0**-shift

    def rounded(top: int) -> tuple[int, ...]:
        # Python rounds halves to even, as all rounding here does.
        return tuple(round(value * top / largest) for value in row.codebook)

    def cost(top: int) -> float:
        return sum((t * largest / top - v) ** 2 for t, v in zip(rounded(top), row.codebook, strict=True))

    top = min(range(_TOP // 2 + 1, _TOP + 1), key=cost)
    return rounded(top), float(torch.tensor(largest / top, dtype=torch.float32))


@cache
def float_element(row: Format) -> tuple[str, float] | None:
    """Return (name of the element, multiplier) with codebook[c] = element(c) multiplier, or None if there is none."""
    if row.codec != "codebook" or row.bits != 8:
        return None
    codes = torch.arange(256, dtype=torch.uint8)
    book = torch.tensor(row.codebook, dtype=torch.float64)
    for name, dtype in _FLOAT8.items():
        values = codes.view(dtype).double()
        multiplier = float(book[1] / values[1])  # code 1 is the smallest positive value
        if torch.equal(torch.nan_to_num(values * multiplier, nan=-1.0), torch.nan_to_num(book, nan=-1.0)):
            return name, multiplier
    return None


@cache
def bad_codes(row: Format) -> tuple[int, ...]:
    """Return the codes that stand for NaN or infinity; no sound weight holds one."""
    return tuple(code for code, value in enumerate(row.codebook) if not math.isfinite(value))
