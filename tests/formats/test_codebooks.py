"""The codebooks, derived again by other means than the table's."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from dist_lowbit.core.errors import FormatError
from dist_lowbit.formats import FORMATS, lookup, quantize
from dist_lowbit.formats.table import ALIASES, USER_FORMATS


def normal_float(bits: int) -> list[float]:
    """Quantiles of N(0, 1) for 2^(b-1) positive and 2^(b-1) - 1 negative levels and 0, over the largest (QLoRA, 3)."""
    half = 1 << (bits - 1)
    outer = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2 if bits == 4 else 1 - (1 / 14 + 1 / 16) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(outer + (0.5 - outer) * i / half) for i in range(half)]
    negative = [-quantile(outer + (0.5 - outer) * i / (half - 1)) for i in range(half - 1)]
    levels = sorted([*negative, 0.0, *positive])
    return [level / max(levels) for level in levels]


@pytest.mark.parametrize(("name", "bits"), [("nf3", 3), ("nf4", 4)])
def test_normal_floats_are_normal_quantiles(name: str, bits: int) -> None:
    # The published numbers were computed from probabilities in fp32: off by 2^-25 each, amplified by the quantile
    # function's slope, sqrt(2 pi) exp(z^2 / 2) <= 14 at z = 1.848, for the entry and for the largest it is divided by.
    tolerance = 2 * 2.0**-25 * 14 / 1.48
    book = FORMATS[name].codebook
    assert len(book) == 1 << bits
    assert list(book) == sorted(book)
    for entry, want in zip(book, normal_float(bits), strict=True):
        assert abs(entry - want) <= tolerance
    assert {-1.0, 0.0, 1.0} <= set(book)


@pytest.mark.parametrize(
    ("name", "dtype", "over"), [("fp8_e4m3", torch.float8_e4m3fn, 512), ("fp8_e5m2", torch.float8_e5m2, 65536)]
)
def test_fp8_codes_are_torch_s_bit_patterns(name: str, dtype: torch.dtype, over: int) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    for code, (entry, want) in enumerate(zip(FORMATS[name].codebook, values.tolist(), strict=True)):
        if math.isfinite(want):
            assert entry * over == want, code
            assert math.copysign(1, entry) == math.copysign(1, want), code
        else:
            assert not math.isfinite(entry), code
            assert math.isnan(entry) == math.isnan(want), code


def test_fp4_is_e2m1() -> None:
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [v * 8 for v in FORMATS["fp4"].codebook] == magnitudes + [-m for m in magnitudes]


@pytest.mark.parametrize("name", ["nf3", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2"])
def test_each_entry_has_its_code_and_codes_of_no_value_are_never_written(name: str) -> None:
    row = FORMATS[name]
    entries = [v for v in row.codebook if math.isfinite(v)]
    codes = quantize(torch.tensor([entries]), row, -1).codes()[0].tolist()  # the scale is 1: largest entry over itself
    for value, code in zip(entries, codes, strict=True):
        assert row.codebook[code] == value
        assert code == row.codebook.index(value)  # the lowest code of that value: +0.0 for both zeros
    sweep = quantize(torch.linspace(-1, 1, 4001)[None], row, -1).codes().unique().tolist()
    assert all(math.isfinite(row.codebook[code]) for code in sweep)
    assert not any(str(row.codebook[code]) == "-0.0" for code in sweep)


@pytest.mark.parametrize("name", ["nf3", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2"])
def test_a_value_takes_the_nearest_entry_and_the_lower_of_two(name: str) -> None:
    row = FORMATS[name]
    values = torch.tensor(sorted({v for v in row.codebook if math.isfinite(v)}))
    top = values.max()
    w = torch.cat([top[None], torch.linspace(-float(top), float(top), 2999), (values[1:] + values[:-1]) / 2])
    got = torch.tensor(row.codebook)[quantize(w[None], row, -1).codes()[0].long()]
    distance = (w[:, None].double() - values.double()).abs()
    best = distance.amin(1)
    # A middle is rounded to fp32, so next to it the farther entry may win by that much.
    assert ((w.double() - got.double()).abs() <= best + 2.0**-24).all()
    middles = got[-(len(values) - 1) :]
    assert torch.equal(middles, values[:-1])


def test_names() -> None:
    integer = {"sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8"}
    assert set(USER_FORMATS) == integer | {"nf3", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "fp8", "fp16", "bf16"}
    assert lookup("fp8") is FORMATS["fp8_e5m2"]
    assert not set(ALIASES) & set(FORMATS)
    assert all(name == row.name for name, row in FORMATS.items())
    assert {row.bits for row in FORMATS.values()} == {2, 3, 4, 5, 6, 8, 16, 32}


@pytest.mark.parametrize("name", ["int4", "SYM_INT4", "", None, 4])
def test_an_unknown_name_lists_the_names(name: object) -> None:
    with pytest.raises(FormatError, match=r"unknown low_bit .*; expected one of sym_int4, asym_int4, .*, fp8$"):
        lookup(name)  # type: ignore[arg-type]
