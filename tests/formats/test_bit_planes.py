"""Bit planes: pack and unpack are inverse, and the bytes are what docs/formats.md draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lowbit.formats import FORMATS
from dist_lowbit.formats.bits import join_planes, pack, packed_width, split_planes, unpack

WIDTHS = (1, 2, 4, 8)
PLANES = sorted({row.planes for row in FORMATS.values() if row.planes})


def codes(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), k=st.integers(0, 70), seed=st.integers(0, 1 << 30))
def test_unpack_is_the_inverse_of_pack(bits: int, n: int, k: int, seed: int) -> None:
    want = codes(n, k, bits, seed)
    packed = pack(want, bits)
    assert packed.shape == (n, packed_width(k, bits))
    assert packed_width(k, bits) == (k * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, k), want)


@pytest.mark.parametrize("planes", PLANES, ids=str)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), k=st.integers(0, 70), seed=st.integers(0, 1 << 30))
def test_join_is_the_inverse_of_split(planes: tuple[int, ...], n: int, k: int, seed: int) -> None:
    want = codes(n, k, sum(planes), seed)
    assert torch.equal(join_planes(split_planes(want, planes), planes, k), want)


@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_every_code_survives_at_every_place(planes: tuple[int, ...]) -> None:
    top = 1 << sum(planes)
    square = torch.arange(top, dtype=torch.uint8)[:, None].expand(top, 9)  # stride 0: packing must not write in place
    assert torch.equal(join_planes(split_planes(square, planes), planes, 9), square)


@pytest.mark.parametrize("bits", WIDTHS)
def test_code_k_lies_at_bit_k_times_bits_of_its_row(bits: int) -> None:
    # The row as one little-endian integer: sum of code_k * 2^(k bits). Padding is 0.
    want = codes(3, 21, bits, seed=bits)
    for row, packed in zip(want.tolist(), pack(want, bits).tolist(), strict=True):
        integer = sum(code << (k * bits) for k, code in enumerate(row))
        assert bytes(packed) == integer.to_bytes(packed_width(21, bits), "little")


def test_planes_hold_the_low_bits_first() -> None:
    five = torch.tensor([[0b10110, 0b01001]], dtype=torch.uint8)
    low, high = split_planes(five, (4, 1))
    assert low.tolist() == [[0b1001_0110]]
    assert high.tolist() == [[0b01]]
    six = torch.tensor([[0b10_0110, 0b01_1001]], dtype=torch.uint8)
    low, high = split_planes(six, (4, 2))
    assert low.tolist() == [[0b1001_0110]]
    assert high.tolist() == [[0b01_10]]
