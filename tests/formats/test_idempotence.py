"""Quantizing dequantized values again: where it must give the same values, and where it need not.

With a scale s that is a normal fp16 number, rounding it moved it by a part d <= 2^-11, so the value that set it takes
the code it was meant to take (span (1 + d) rounds to span): the group's values have the same extreme, and the second
scale is s again. Hence:
- casts: always;
- symmetric and codebook rows: wherever the scale is normal or 0;
- rows with a min: where besides |min| 2^-11 + span 2^-11 s < s / 2, so that both ends keep their codes;
- rows with a zero point: where the lowest and the highest code (of the range widened by 0) both occur. Rounding the
  zero point can leave the top code unused; then the second range is a step shorter.
"""

from __future__ import annotations

import pytest
import torch

from dist_lowbit.formats import FORMATS, Format, dequantize, quantize

ROWS = list(FORMATS.values())
SMALLEST_NORMAL = 2.0**-14


def stable(row: Format, w: torch.Tensor, group: int) -> torch.Tensor:
    """Return which groups must come back, bool [N, groups], for K a multiple of the group."""
    packed = quantize(w, row, group)
    s = packed.parts["scale"].tensor.double().abs()
    ok = (s >= SMALLEST_NORMAL) | (s == 0)
    if row.offset == "min":
        m = packed.parts["min"].tensor.double().abs()
        ok &= (m * 2.0**-11).clamp(min=2.0**-25) + row.span * 2.0**-11 * s < 0.5 * s
    if row.offset == "zero_point":
        codes = packed.codes().reshape(w.shape[0], -1, group)
        zero = packed.parts["zero_point"].tensor
        low, high = torch.minimum(codes.amin(-1), zero), torch.maximum(codes.amax(-1), zero)
        ok &= (low == 0) & (high == int(row.span))
    return ok


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_second_quantization_changes_no_value_where_it_must_not(row: Format, group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    w = torch.randn(64, 512, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    w[40:] += 2 * w[40:].abs().amax(1, keepdim=True) * torch.randn(24, 1, generator=generator)
    once = dequantize(quantize(w, row, group))
    twice = dequantize(quantize(once, row, group))
    if not row.grouped:
        assert torch.equal(once, twice)
        return
    must = stable(row, w, group)
    assert must.float().mean() > 0.25  # the claim is about many groups
    same = (once == twice).reshape(64, -1, group).all(-1)
    assert (same | ~must).all()


def test_the_conditions_are_needed() -> None:
    tiny = 2.0**-24  # the smallest fp16
    w = torch.tensor([[-8 * 0.51 * tiny, tiny]])  # scale 0.51 rounds to 1, the extreme to code 4, its scale to 0
    once = dequantize(quantize(w, "sym_int4"))
    assert once.abs().max() > 0
    assert dequantize(quantize(once, "sym_int4")).abs().max() == 0
    w = torch.tensor([[-4.5, 10.5]])  # scale 1: the zero point rounds to 4, the top to 10, code 14
    packed = quantize(w, "zp_int4")
    assert packed.codes().tolist() == [[0, 14]]
    once = dequantize(packed)
    assert not torch.equal(dequantize(quantize(once, "zp_int4")), once)
