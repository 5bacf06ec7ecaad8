"""Quantize and back: within the derived bound for every row, and the bound is reached by inputs made to reach it."""

from __future__ import annotations

import pytest
import torch

from dist_lowbit.core.errors import FormatError
from dist_lowbit.formats import FORMATS, Format, dequantize, quantize
from dist_lowbit.formats.quantizer import _SLICE, error_bound

GROUPS = (None, 32, 128, -1)
SHAPES = ((7, 100), (16, 256), (3, 1), (5, 64), (1, 31), (4, 0), (0, 64), (0, 0))
ROWS = list(FORMATS.values())
GROUPED = [row for row in ROWS if row.grouped]


def ids(row: object) -> str | None:
    return row.name if isinstance(row, Format) else None


def error(w: torch.Tensor, row: Format, group: int | None) -> torch.Tensor:
    return (w.double() - dequantize(quantize(w, row, group)).double()).abs()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_every_row_stays_within_its_bound(row: Format, group: int | None) -> None:
    generator = torch.Generator().manual_seed(7)
    for shape in SHAPES:
        # 2^-24 has subnormal fp16 scales, 2^-40 scales that round to 0
        for size in (1.0, 3e3, 2.0**-12, 2.0**-24, 2.0**-40):
            for shift in (0.0, 4.0):
                w = (torch.randn(shape, generator=generator) + shift) * size
                assert (error(w, row, group) <= error_bound(w, row, group)).all(), (shape, size, shift)


def adversarial_rows(row: Format) -> torch.Tensor:
    """Return rows of 4096 weights with the group's range placed where rounding scale, min and zero point costs most."""
    # A scale just below, at and above the middle between two fp16 numbers, where half an ulp is largest: above 1.
    middle = 1 + 2.0**-11
    rows = []
    for e in (middle - 2.0**-22, middle, middle + 2.0**-22, 1.0):
        extent = e * row.span
        if row.offset == "none":
            lows = [-extent]
        elif row.offset == "min":
            lows = [0.0, -extent / 2, -extent * middle, 64 * row.span * (middle - 2.0**-22)]
        else:
            lows = [0.0] + [-e * (z + half) for z in (0, 4, 5) for half in (0.49, 0.499, 0.5, 0.501, 0.51)]
            lows = [low for low in lows if -low <= extent]
        for low in lows:
            high = extent if row.offset == "none" else low + extent
            sweep = torch.linspace(low, high, 4096, dtype=torch.float64)
            # the middles between neighbouring codes, as the quantizer will see them; else clamped into the range
            stored = float(torch.tensor(e).half())
            if row.codec == "codebook":
                values = sorted({v for v in row.codebook if abs(v) < float("inf")})
            else:
                values = [c - row.center for c in range(1 << row.bits)]
                if row.offset == "zero_point":
                    values = [c - round(-low / stored) for c in range(1 << row.bits)]
            offset = float(torch.tensor(low).half()) if row.offset == "min" else 0.0
            middles = torch.tensor(values, dtype=torch.float64).unfold(0, 2, 1).mean(1) * stored + offset
            sweep[1 : 1 + len(middles)] = middles.clamp(low, high)
            for sign in (1, -1) if row.offset == "none" else (1,):
                rows.append(torch.cat([sweep[:1] * sign, sweep[1:-1], sweep[-1:] * sign]))
    return torch.stack(rows).float()


@pytest.mark.parametrize("group", [-1, 4096])
@pytest.mark.parametrize("row", GROUPED, ids=ids)
def test_the_bound_holds_and_is_reached_on_adversarial_rows(row: Format, group: int) -> None:
    w = adversarial_rows(row)
    ratio = error(w, row, group) / error_bound(w, row, group)
    assert ratio.max() <= 1
    # The bound adds 4 ulp for fp32 and takes the worst rounding of the scale, which a grid of scales nearly meets.
    assert ratio.max() > 0.99


@pytest.mark.parametrize("power", range(-10, -45, -3))
@pytest.mark.parametrize("row", GROUPED, ids=ids)
def test_the_bound_holds_where_scales_are_subnormal_or_vanish(row: Format, power: int) -> None:
    w = adversarial_rows(row) * 2.0**power
    assert (error(w, row, -1) <= error_bound(w, row, -1)).all()


@pytest.mark.parametrize("row", GROUPED, ids=ids)
def test_a_row_s_error_column_is_reached_without_scale_rounding(row: Format) -> None:
    # With an exact scale, and a low end of 0, the error is the column's fraction of the range.
    w = adversarial_rows(row)
    extent = w.abs().amax(1) if row.offset == "none" else w.clamp(min=0).amax(1) - w.clamp(max=0).amin(1)
    if row.offset == "min":
        extent = w.amax(1) - w.amin(1)
    clean = extent == row.span  # the scale is 1
    assert clean.any()
    fraction = error(w[clean], row, -1).amax() / row.span
    assert fraction == pytest.approx(row.error, rel=2.0**-21)  # codebook entries and products are rounded to fp32


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_casts_reach_half_an_ulp(name: str) -> None:
    row = FORMATS[name]
    w = torch.tensor([[1 + row.error, 1 - row.error / 2, 3e-41, 2.0**-25 * 1.5]])
    assert (error(w, row, None) <= error_bound(w, row)).all()
    assert error(w, row, None)[0, 0] > 0.99 * error_bound(w, row)[0, 0]


def test_fp32_is_exact() -> None:
    w = torch.randn(5, 9) * 1e-42
    assert torch.equal(dequantize(quantize(w, "fp32")), w)
    assert error_bound(w, "fp32").max() == 0


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_sources_of_any_dtype_and_stride_give_the_same_bits(row: Format) -> None:
    w = torch.randn(9, 100).bfloat16()
    want = quantize(w.float(), row, 32)
    for source in (w, w.half().float(), w.t().contiguous().t(), torch.nn.Parameter(w.float())):
        if torch.equal(source.float(), w.float()):
            assert quantize(source, row, 32).equal(want)
    wide = torch.zeros(9, 200)
    wide[:, ::2] = w.float()
    assert quantize(wide[:, ::2], row, 32).equal(want)
    assert not any(
        part.tensor.requires_grad for part in quantize(torch.nn.Parameter(w.float()), row, 32).parts.values()
    )


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_slices_change_nothing(row: Format) -> None:
    # Two and a half slices of rows: the same bits as each row by itself.
    k = 1 << 12
    rows = _SLICE // k
    base = torch.randn(5, k)
    w = base.repeat(rows // 2, 1)
    whole = quantize(w, row)
    part = quantize(base, row)
    assert whole.split(0, 5 * (rows // 2 - 1), 5 * (rows // 2)).equal(part)
    assert torch.equal(dequantize(whole)[-5:], dequantize(part))


@pytest.mark.parametrize("row", GROUPED, ids=ids)
def test_a_group_of_zeros_is_zero_and_harms_no_other(row: Format) -> None:
    w = torch.randn(3, 128)
    w[:, :64] = 0.0
    w[1, :64] = -0.0
    packed = quantize(w, row, 64)
    values = dequantize(packed)
    assert (values[:, :64] == 0).all()
    assert (values[:, 64:] != 0).any()
    assert torch.equal(packed.parts["scale"].tensor[:, 0].view(torch.int16), torch.zeros(3, dtype=torch.int16))
    assert torch.equal(packed.split(1, 64, 128).codes(), quantize(w[:, 64:], row, 64).codes())


@pytest.mark.parametrize("row", GROUPED, ids=ids)
def test_a_short_last_group_is_quantized_by_itself(row: Format) -> None:
    w = torch.randn(4, 100) * torch.linspace(0.1, 9, 100)
    whole, tail = quantize(w, row, 64), quantize(w[:, 64:], row, 64)
    assert whole.split(1, 64, 100).equal(tail)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_constant_group_comes_back(row: Format) -> None:
    # One value: the extreme of its group, so only the rounding of scale or min is lost (and of the zero point: none).
    for value in (3.0, -3.0):
        w = torch.full((2, 40), value)
        lost = 0 if row.codec != "cast" and row.offset == "min" else abs(value) * 2.0**-11
        assert (error(w, row, None) <= lost * 1.001).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_what_is_not_finite_is_refused_by_name_and_place(row: Format, bad: float) -> None:
    w = torch.zeros(6, 70)
    w[4, 67] = bad
    with pytest.raises(FormatError, match=rf"model\.q_proj\.weight holds {bad} at \[4, 67\]; .* must be finite"):
        quantize(w, row, name="model.q_proj.weight")


def test_the_place_of_a_bad_value_counts_rows_of_the_whole() -> None:
    k = 1 << 10
    w = torch.zeros(2 * _SLICE // k + 3, k)
    w[-1, 5] = float("nan")
    with pytest.raises(FormatError, match=rf"at \[{w.shape[0] - 1}, 5\]"):
        quantize(w, "sym_int4")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in ("fp32", "bf16")], ids=ids)
def test_a_scale_that_overflows_is_refused(row: Format) -> None:
    w = torch.zeros(2, 64)
    w[1, 3], w[1, 4] = 3e38, -3e38  # max - min is Inf in fp32
    with pytest.raises(FormatError, match=rf"lm_head is too large for {row.name}: its (scale|min|value) overflows"):
        quantize(w, row, name="lm_head")
    largest = 65504 * (row.span if row.grouped else 1) * (0.5 if row.offset == "min" else 1)
    w = torch.zeros(2, 64)
    w[0, 0] = min(largest, 65504) if row.offset == "min" else largest
    assert torch.isfinite(dequantize(quantize(w, row))).all()


def test_bf16_overflow_is_refused() -> None:
    with pytest.raises(FormatError, match=r"too large for bf16: its value overflows torch\.bfloat16"):
        quantize(torch.full((1, 1), torch.finfo(torch.float32).max), "bf16")


@pytest.mark.parametrize(
    "w",
    [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.int8)],
    ids=["vector", "cube", "float64", "int8"],
)
def test_sources_that_are_no_float_matrix_are_refused(w: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"router is a torch\.\w+ tensor of shape \(.*\) on cpu; expected a float32"):
        quantize(w, "sym_int4", name="router")


def test_meta_weights_are_refused() -> None:
    with pytest.raises(FormatError, match=r"on meta; expected .* on the CPU"):
        quantize(torch.empty(2, 64, device="meta"), "nf4")


@pytest.mark.parametrize("group", [0, 1, 16, 33, 100, -2, 64.0, True, "64"])
def test_group_sizes_that_are_no_multiple_of_32_are_refused(group: object) -> None:
    with pytest.raises(FormatError, match=r"group_size is .*; expected a multiple of 32, or -1"):
        quantize(torch.zeros(2, 64), "sym_int4", group)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_dequantize_rounds_once_to_other_dtypes(row: Format) -> None:
    packed = quantize(torch.randn(3, 70), row)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantize(packed, dtype), dequantize(packed).to(dtype))
