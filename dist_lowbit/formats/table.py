"""The table of formats: one row says everything about a format; no other place names one.

`error` is a row's worst-case error of one weight in exact arithmetic, as a fraction of its group's range: the
largest magnitude (symmetric and codebook formats), max - min (asymmetric ones), or the weight itself (casts).
`quantizer.error_bound` adds what rounding the stored scale costs. Derivations stand beside the helpers below.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from dist_lowbit.core.errors import FormatError

from .codebooks import FP4_E2M1, FP8_E4M3, FP8_E5M2, NF3, NF4


@dataclass(frozen=True)
class Format:
    """A row: how one weight becomes `bits` bits.

    codec: "affine" w = (c - offset_code) * scale, or c * scale + min, or (c - zero_point) * scale;
    "codebook" w = codebook[c] * scale; "cast" w itself in another dtype.
    planes: bit widths of the stored planes, low bits first. offset: "none", "min" (fp16) or "zero_point" (uint8).
    group_size: the default, along K; -1 is one group per row. dtype: what a cast stores.
    """

    name: str
    codec: str
    planes: tuple[int, ...]
    error: float
    offset: str = "none"
    codebook: tuple[float, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    group_size: int = 64
    dtype: torch.dtype | None = None
    full_range: bool = True  # symmetric only: whether the most negative code is used

    @property
    def bits(self) -> int:
        """Return the bits of one code, or of one stored value."""
        return sum(self.planes) if self.dtype is None else self.dtype.itemsize * 8

    @property
    def grouped(self) -> bool:
        """Return whether the format has scales."""
        return self.codec != "cast"

    @property
    def integer(self) -> bool:
        """Return whether weights are integers times a scale, so that dot products can be exact."""
        return self.codec == "affine"

    @property
    def center(self) -> int:
        """Return the code that stands for zero in a symmetric format (0 in the others)."""
        return 1 << (self.bits - 1) if self.codec == "affine" and self.offset == "none" else 0

    @property
    def span(self) -> float:
        """Return how many scales lie between the anchor of a group and its farthest value."""
        if self.codec == "codebook":
            return max(abs(v) for v in self.codebook if abs(v) < float("inf"))
        if self.offset == "none":
            return float(self.center if self.full_range else self.center - 1)
        return float((1 << self.bits) - 1)


def _sym(name: str, planes: tuple[int, ...], full_range: bool = True) -> Format:
    # Full range: scale = signed absmax / -2^(b-1), so that the value of largest magnitude is exact. The same
    # magnitude with the other sign would need code 2^b and is clamped one step below: error absmax / 2^(b-1).
    # Restricted range: scale = absmax / (2^(b-1) - 1), no clamping: half a step.
    half = 1 << (sum(planes) - 1)
    error = 1 / half if full_range else 0.5 / (half - 1)
    return Format(name, "affine", planes, error, full_range=full_range)


def _asym(name: str, planes: tuple[int, ...], offset: str = "min") -> Format:
    # 2^b - 1 steps between min and max, half a step of rounding. With a zero point the range is first widened
    # to hold 0; rounding the zero point clips by half a step at most, where nothing else is lost.
    return Format(name, "affine", planes, 0.5 / ((1 << sum(planes)) - 1), offset=offset)


def _book(name: str, planes: tuple[int, ...], codebook: tuple[float, ...]) -> Format:
    # scale = absmax / largest entry; a value lies at most half the widest gap from an entry.
    finite = sorted(v for v in codebook if abs(v) < float("inf"))
    gap = max(b - a for a, b in pairwise(finite))
    return Format(name, "codebook", planes, 0.5 * gap / max(finite), codebook=codebook)


def _cast(name: str, dtype: torch.dtype) -> Format:
    # Round to nearest: half a unit in the last binary digit; fp32 holds every source exactly.
    error = 0.0 if dtype is torch.float32 else 0.5 * torch.finfo(dtype).eps
    return Format(name, "cast", (), error, group_size=-1, dtype=dtype)


_ROWS = (
    _sym("sym_int4", (4,)),
    _asym("asym_int4", (4,)),
    _sym("sym_int5", (4, 1)),
    _asym("asym_int5", (4, 1)),
    _sym("sym_int8", (8,), full_range=False),
    _book("nf3", (2, 1), NF3),
    _book("nf4", (4,), NF4),
    _book("fp4", (4,), FP4_E2M1),
    _book("fp8_e4m3", (8,), FP8_E4M3),
    _book("fp8_e5m2", (8,), FP8_E5M2),
    _cast("fp16", torch.float16),
    _cast("bf16", torch.bfloat16),
    # Rows for imports, calibration and modules kept in high precision.
    _cast("fp32", torch.float32),
    _sym("sym_int2", (2,)),
    _sym("sym_int3", (2, 1)),
    _sym("sym_int6", (4, 2)),
    _asym("asym_int2", (2,)),
    _asym("asym_int3", (2, 1)),
    _asym("asym_int6", (4, 2)),
    _asym("asym_int8", (8,)),
    _asym("zp_int2", (2,), "zero_point"),
    _asym("zp_int3", (2, 1), "zero_point"),
    _asym("zp_int4", (4,), "zero_point"),
    _asym("zp_int8", (8,), "zero_point"),
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
ALIASES = {"fp8": "fp8_e5m2"}  # the name that users of the ancestors write
USER_FORMATS = tuple(row.name for row in _ROWS[:12]) + tuple(ALIASES)  # the names `low_bit=` is documented with


def lookup(name: str, called: str = "low_bit") -> Format:
    """Return the row of a format's name or alias; an unknown name is a FormatError that lists the names.

    called: the argument that the name was given as.
    """
    row = FORMATS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if row is None:
        names = ", ".join([*FORMATS, *ALIASES])
        raise FormatError(f"unknown {called} {name!r}; expected one of {names}", argument=called)
    return row


def cast_name(dtype: torch.dtype | None) -> str:
    """Return the format that stores values of a dtype as they are (fp32 for wider or stranger ones)."""
    return next((row.name for row in _ROWS if row.dtype is not None and row.dtype == dtype), "fp32")


def check_group_size(row: Format, group_size: int | None) -> int:
    """Return the group size to use: the row's own for None; else a multiple of 32, or -1 for one per row."""
    if not row.grouped:
        return -1
    if group_size is None:
        return row.group_size
    if type(group_size) is not int or (group_size != -1 and (group_size < 32 or group_size % 32)):
        raise FormatError(
            f"group_size is {group_size!r}; expected a multiple of 32, or -1 for one group per row",
            argument="group_size",
        )
    return group_size
