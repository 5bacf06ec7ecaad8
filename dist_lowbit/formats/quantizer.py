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
_SLICE = 1 << 20
_SOURCES = (torch.float32, torch.float16, torch.bfloat16)

Encoded = dict[str, torch.Tensor]  # codes [n, B, G] uint8, and scale / min / zero_point [n, B]


def _store(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values rounded to the stored dtype, and what they read back as in fp32. No -0.0: zero has one pattern."""
    stored = values.to(dtype) + 0.0
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
    table = torch.tensor(row.codebook, dtype=torch.float32)
    # Each finite value by its lowest code: -0.0 is the value 0.0 again and is never written.
    lowest = {value: c for c, value in reversed(list(enumerate(row.codebook))) if math.isfinite(value)}
    order = [lowest[value] for value in sorted(lowest)]
    values = table[order]
    scale, s = _store(x.abs().amax(-1) / row.span, row.scale_dtype)
    safe = torch.where(s == 0, torch.ones_like(s), s)[..., None]
    # A value on the midpoint of two entries takes the lower one: bucketize counts midpoints strictly below it.
    nearest = torch.bucketize(x / safe, (values[1:] + values[:-1]) / 2)
    codes = torch.tensor(order, dtype=torch.uint8)[nearest]
    return {"codes": torch.where(s[..., None] == 0, lowest[0.0], codes).to(torch.uint8), "scale": scale}


_ENCODERS: dict[str, Callable[[Format, torch.Tensor], Encoded]] = {
    "affine": _encode_affine,
    "codebook": _encode_codebook,
}


def _check_source(w_NK: torch.Tensor, name: str) -> None:
    if w_NK.ndim != 2 or w_NK.dtype not in _SOURCES or w_NK.device.type != "cpu":
        raise FormatError(
            f"{name} is a {w_NK.dtype} tensor of shape {tuple(w_NK.shape)} on {w_NK.device}; "
            f"expected a float32, float16 or bfloat16 matrix on the CPU"
        )


def _check_finite(w_NK: torch.Tensor, name: str, first: int) -> None:
    bad = ~torch.isfinite(w_NK)
    if bool(bad.any()):
        n, k = (int(i) for i in bad.nonzero()[0])
        value = float(w_NK[n, k])
        raise FormatError(f"{name} holds {value} at [{first + n}, {k}]; a weight to quantize must be finite")


def _check_stored(tensor: torch.Tensor, part: str, row: Format, name: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise FormatError(
            f"{name} is too large for {row.name}: its {part} overflows {tensor.dtype}; "
            f"rescale the weight or keep this module in fp32"
        )


def _quantize_rows(w_NK: torch.Tensor, row: Format, group_size: int, name: str, first: int) -> dict[str, torch.Tensor]:
    n, k = w_NK.shape
    x = w_NK.float()
    _check_finite(x, name, first)
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
    row = format if isinstance(format, Format) else lookup(format)
    group_size = check_group_size(row, group_size)
    _check_source(w_NK, name)
    n, k = w_NK.shape
    layout = part_layout(row, (n, k), group_size)
    out = {part: torch.zeros(want.shape, dtype=want.dtype) for part, want in layout.items()}
    rows = max(1, _SLICE // max(k, 1))
    for first in range(0, n if k else 0, rows):
        piece = _quantize_rows(w_NK[first : first + rows].detach(), row, group_size, name, first)
        for part, tensor in piece.items():
            out[part][first : first + rows] = tensor
    return PackedWeight.from_tensors(row, (n, k), group_size, out)


def _dequantize_rows(weight: PackedWeight) -> torch.Tensor:
    row, parts, k = weight.format, weight.tensors(), weight.shape[1]

    def spread(part: str) -> torch.Tensor:
        value = parts[part].float()
        return value if weight.group_size == -1 else value.repeat_interleave(weight.group_size, 1)[:, :k]

    codes = weight.codes()
    if row.codec == "codebook":
        return torch.tensor(row.codebook, dtype=torch.float32, device=codes.device)[codes.int()] * spread("scale")
    if row.offset == "zero_point":
        return (codes.float() - spread("zero_point")) * spread("scale")
    x = (codes.float() - row.center) * spread("scale")
    return x + spread("min") if row.offset == "min" else x


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values [N, K] that a packed weight stands for, computed in fp32 and rounded once to `dtype`.

    A cast format asked for in its own dtype gives its stored tensor, not a copy.
    Cost: one pass, with temporaries of a few million elements whatever the size.
    """
    n, k = weight.shape
    if weight.format.dtype is not None:
        return weight.parts["values"].tensor.to(dtype)
    out = torch.empty((n, k), dtype=dtype, device=weight.parts["scale"].tensor.device)
    rows = max(1, _SLICE // max(k, 1))
    for first in range(0, n, rows):
        out[first : first + rows] = _dequantize_rows(weight.split(0, first, min(first + rows, n)))
    return out


def error_bound(w_NK: torch.Tensor, format: str | Format, group_size: int | None = None) -> torch.Tensor:
    """Return the largest |w - dequantize(quantize(w))| that the format allows, fp64 [N, K].

    Two cases, of which the worse counts. Between the group's ends: the row's `error` (see table.py) of a range whose
    scale was rounded up. Beyond an end that the rounded scale or min no longer reaches: `span` roundings of the scale
    and one of the min, on top of `error` for the rows that clip anyway. fp16 rounds by 2^-11 of the value, or by 2^-25
    where that is subnormal. Both get 4 ulp of the group's largest value for the fp32 arithmetic in between.
    """
    row = format if isinstance(format, Format) else lookup(format)
    x = w_NK.detach().double()
    if row.dtype is not None:
        tiny = 0.5 * torch.finfo(row.dtype).smallest_normal * torch.finfo(row.dtype).eps
        return (x.abs() * row.error).clamp(min=tiny) if row.error else torch.zeros_like(x)
    group_size = check_group_size(row, group_size)
    k = w_NK.shape[1]
    group = max(k, 1) if group_size == -1 else group_size
    clips = row.full_range if row.offset == "none" and row.codec == "affine" else row.offset == "zero_point"
    rounding = 0.5 * torch.finfo(row.scale_dtype).eps
    tiny = rounding * torch.finfo(row.scale_dtype).smallest_normal
    bound = torch.zeros_like(x)
    for first in range(0, k, group):
        part = x[:, first : first + group]
        low, high, peak = part.amin(1), part.amax(1), part.abs().amax(1)
        if row.offset == "zero_point":
            low, high = low.clamp(max=0), high.clamp(min=0)
        extent = peak if row.offset == "none" else high - low
        lost = (extent / row.span * rounding).clamp(min=tiny)  # by the scale
        inside = row.error * (extent + row.span * lost)
        beyond = row.error * extent * clips + row.span * lost
        if row.offset == "min":
            beyond = beyond + (low.abs() * rounding).clamp(min=tiny)
        bound[:, first : first + group] = (torch.maximum(inside, beyond) + 4 * 2.0**-23 * peak)[:, None]
    return bound
