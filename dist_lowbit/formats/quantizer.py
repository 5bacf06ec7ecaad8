"""Numbers to codes and back, by round-to-nearest; one codec per number system.

Codes are computed against the scale as it is stored (fp16), so rounding the scale costs clipping at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dist_lowbit.core.errors import FormatError

from .bits import split_planes
from .packed import PackedWeight, part_layout
from .table import Format, check_group_size, lookup

# Rows are quantized in slices of about this many elements, so that temporaries stay small beside the weight.
_SLICE = 1 << 22

Encoded = dict[str, torch.Tensor]  # codes [n, B, G] uint8, and scale / min / zero_point [n, B]


def _store(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values rounded to the stored dtype, and what they read back as in fp32."""
    stored = values.to(dtype)
    return stored, stored.float()


def _steps(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x / scale, rounded to nearest even; 0 where the scale is 0."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(scale == 0, torch.zeros_like(x), (x / safe).round_())


def _encode_affine(row: Format, x: torch.Tensor) -> Encoded:
    top = (1 << row.bits) - 1
    if row.offset == "none":
        position = x.abs().argmax(-1, keepdim=True)
        peak = x.gather(-1, position).squeeze(-1)
        exact = peak / -row.span if row.full_range else peak.abs() / row.span
        scale, s = _store(exact, row.scale_dtype)
        low = 0 if row.full_range else 1
        codes = (_steps(x, s[..., None]) + row.center).clamp_(low, top)
        return {"codes": codes.to(torch.uint8), "scale": scale}
    low_x, high_x = x.amin(-1), x.amax(-1)
    if row.offset == "min":
        scale, s = _store((high_x - low_x) / row.span, row.scale_dtype)
        minimum, m = _store(low_x, row.scale_dtype)
        codes = _steps(x - m[..., None], s[..., None]).clamp_(0, top)
        return {"codes": codes.to(torch.uint8), "scale": scale, "min": minimum}
    low_x, high_x = low_x.clamp(max=0), high_x.clamp(min=0)
    scale, s = _store((high_x - low_x) / row.span, row.scale_dtype)
    zero = _steps(-low_x, s).clamp_(0, top)
    codes = (_steps(x, s[..., None]) + zero[..., None]).clamp_(0, top)
    return {"codes": codes.to(torch.uint8), "scale": scale, "zero_point": zero.to(torch.uint8)}


def _encode_codebook(row: Format, x: torch.Tensor) -> Encoded:
    table = torch.tensor(row.codebook)
    finite = [c for c, value in enumerate(row.codebook) if math.isfinite(value)]
    order = sorted(finite, key=lambda c: (row.codebook[c], c))
    values = table[order]
    scale, s = _store(x.abs().amax(-1) / row.span, row.scale_dtype)
    safe = torch.where(s == 0, torch.ones_like(s), s)[..., None]
    # A value on the midpoint of two entries takes the lower one: bucketize counts midpoints strictly below it.
    nearest = torch.bucketize(x / safe, (values[1:] + values[:-1]) / 2)
    codes = torch.tensor(order, dtype=torch.uint8)[nearest]
    zero_code = int((table == 0).nonzero()[0])
    return {"codes": torch.where(s[..., None] == 0, zero_code, codes).to(torch.uint8), "scale": scale}


_ENCODERS: dict[str, Callable[[Format, torch.Tensor], Encoded]] = {
    "affine": _encode_affine,
    "codebook": _encode_codebook,
}


def _check_finite(w_NK: torch.Tensor, name: str) -> None:
    bad = ~torch.isfinite(w_NK)
    if bool(bad.any()):
        n, k = (int(i) for i in bad.nonzero()[0])
        raise FormatError(f"{name} holds {float(w_NK[n, k])} at [{n}, {k}]; a weight to quantize must be finite")


def _check_stored(tensor: torch.Tensor, part: str, row: Format, name: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise FormatError(
            f"{name} is too large for {row.name}: its {part} overflows {tensor.dtype}; "
            f"rescale the weight or keep this module in fp32"
        )


def _quantize_rows(w_NK: torch.Tensor, row: Format, group_size: int, name: str) -> dict[str, torch.Tensor]:
    n, k = w_NK.shape
    x = w_NK.float()
    _check_finite(x, name)
    if row.dtype is not None:
        values = w_NK.to(row.dtype)
        _check_stored(values, "value", row, name)
        return {"values": values}
    group = k if group_size == -1 else group_size
    groups = -(-k // group)
    if groups * group != k:  # the short last group is filled with its own last column, which changes no statistic
        x = torch.cat([x, x[:, -1:].expand(n, groups * group - k)], dim=1)
    encoded = _ENCODERS[row.codec](row, x.reshape(n, groups, group))
    codes = encoded.pop("codes").reshape(n, groups * group)[:, :k]
    for part, tensor in encoded.items():
        _check_stored(tensor, part, row, name)
    planes = split_planes(codes, row.planes)
    return {f"plane{i}": plane for i, plane in enumerate(planes)} | encoded


def quantize(
    w_NK: torch.Tensor, format: str | Format, group_size: int | None = None, name: str = "weight"
) -> PackedWeight:
    """Quantize a float matrix [N, K] (fp32, fp16 or bf16, on the CPU) by round-to-nearest.

    `format` is a row or its name; `group_size` counts elements of K (None: the format's default, -1: one group per
    row; the last group may be short). `name` is for messages. NaN, Inf and overflowing scales are a FormatError.
    Cost: one pass, with temporaries of a few million elements whatever the size.
    """
    row = lookup(format) if isinstance(format, str) else format
    group_size = check_group_size(row, group_size)
    n, k = w_NK.shape
    layout = part_layout(row, (n, k), group_size)
    out = {part: torch.zeros(want.shape, dtype=want.dtype) for part, want in layout.items()}
    rows = max(1, _SLICE // max(k, 1))
    for first in range(0, n if k else 0, rows):
        piece = _quantize_rows(w_NK[first : first + rows].detach(), row, group_size, name)
        for part, tensor in piece.items():
            out[part][first : first + rows] = tensor
    return PackedWeight.from_tensors(row, (n, k), group_size, out)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values [N, K] that a packed weight stands for, computed in fp32 and rounded once to `dtype`."""
    row, (_, k) = weight.format, weight.shape
    parts = weight.tensors()
    if row.dtype is not None:
        return parts["values"].to(dtype)

    def spread(part: str) -> torch.Tensor:
        value = parts[part].float()
        return value if weight.group_size == -1 else value.repeat_interleave(weight.group_size, 1)[:, :k]

    codes = weight.codes()
    if row.codec == "codebook":
        x = torch.tensor(row.codebook, device=codes.device)[codes.int()] * spread("scale")
    elif row.offset == "zero_point":
        x = (codes.float() - spread("zero_point")) * spread("scale")
    else:
        x = (codes.float() - row.center) * spread("scale")
        if row.offset == "min":
            x = x + spread("min")
    return x.to(dtype)


def error_bound(w_NK: torch.Tensor, format: str | Format, group_size: int | None = None) -> torch.Tensor:
    """Return the largest |w - dequantize(quantize(w))| that the format allows, fp64 [N, K].

    The row's `error` times the group's range (see table.py), plus what the stored scale and min lose: fp16 rounds
    by 2^-11 of the value, or 2^-25 where that is subnormal, `span` scales away from the anchor; plus 4 ulp of
    the range for the fp32 arithmetic in between.
    """
    row = lookup(format) if isinstance(format, str) else format
    x = w_NK.double()
    if row.dtype is not None:
        tiny = 0.5 * torch.finfo(row.dtype).smallest_normal * torch.finfo(row.dtype).eps
        return (x.abs() * row.error).clamp(min=tiny)
    group_size = check_group_size(row, group_size)
    k = w_NK.shape[1]
    group = k if group_size == -1 else group_size
    bound = torch.zeros_like(x)
    for first in range(0, k, group):
        part = x[:, first : first + group]
        low, high, peak = part.amin(1), part.amax(1), part.abs().amax(1)
        if row.offset == "zero_point":
            low, high = low.clamp(max=0), high.clamp(min=0)
        extent = peak if row.offset == "none" else high - low
        lost = row.span * (extent / row.span * 2.0**-11).clamp(min=2.0**-25)
        if row.offset == "min":
            lost = lost + (low.abs() * 2.0**-11).clamp(min=2.0**-25)
        bound[:, first : first + group] = (row.error * extent + lost + 4 * 2.0**-23 * peak)[:, None]
    return bound
