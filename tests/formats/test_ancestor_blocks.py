"""sym_int4, asym_int4 and sym_int8 against the block formulas that users of these names have had (q4_0, q4_1, q8_0).

The formulas are written here in numpy, block 64, byte for byte. They divide by the scale before it is rounded to
fp16 and round halves up; ours divides by the scale as stored and rounds halves to even. So the stored scale and min
are the same bits, codes differ by one step where a value lies near the middle of two, and ours is never farther off.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dist_lowbit.formats import dequantize, quantize

QK = 64
F32 = npt.NDArray[np.float32]


def nibbles(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return (codes[..., : QK // 2] | codes[..., QK // 2 :] << 4).astype(np.uint8)


def codes_of(qs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def q4_0(x: F32) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Return fp16 d and 32 bytes of nibbles for each block of float32 [..., 64]."""
    position = np.abs(x).argmax(-1)
    largest = np.take_along_axis(x, position[..., None], -1)
    d = largest / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    codes = np.minimum(15, (x * inverse + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    return d[..., 0].astype(np.float16), nibbles(codes)


def q4_1(x: F32) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Return fp16 d, fp16 m and 32 bytes of nibbles for each block."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    d = (high - low) / np.float32(15)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    codes = np.minimum(15, ((x - low) * inverse + np.float32(0.5)).astype(np.int8)).astype(np.uint8)
    return d[..., 0].astype(np.float16), low[..., 0].astype(np.float16), nibbles(codes)


def q8_0(x: F32) -> tuple[F32, npt.NDArray[np.int8]]:
    """Return fp32 d and 64 int8 for each block."""
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    scaled = x * inverse
    return d[..., 0], (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))).astype(np.int8)


def weights(seed: int) -> F32:
    w = np.random.default_rng(seed).standard_normal((9, 5, QK)).astype(np.float32)
    w[3, 2] = 0
    w[4] *= 1e-3
    w[5] += 7
    return w


def ours(w: F32, name: str) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[np.float16]], F32]:
    packed = quantize(torch.from_numpy(w.reshape(w.shape[0], -1)), name, QK)
    parts = {part: t.numpy() for part, t in packed.tensors().items() if not part.startswith("plane")}
    return packed.codes().numpy().reshape(w.shape), parts, dequantize(packed).numpy().reshape(w.shape)


def check_near(w: F32, mine: F32, theirs: F32, step: F32, codes: F32, their_codes: F32) -> None:
    difference = np.abs(codes.astype(int) - their_codes.astype(int))
    assert difference.max() <= 1
    assert (difference != 0).mean() < 0.01  # 2^-11 of 15 steps is under 1% of a step
    # Both are c * step + offset on one grid, and ours is the nearest point of it; 2^-22 for the fp32 in between.
    slack = 2.0**-22 * np.abs(w).max()
    assert (np.abs(w - mine) <= np.abs(w - theirs) + slack).all()
    assert (np.abs(mine - theirs) <= step[..., None] * difference + slack).all()


@pytest.mark.parametrize("seed", range(5))
def test_sym_int4_is_q4_0(seed: int) -> None:
    w = weights(seed)
    d, qs = q4_0(w)
    codes, parts, mine = ours(w, "sym_int4")
    assert np.array_equal(parts["scale"] + np.float16(0), d + np.float16(0))  # theirs has -0 for a block of zeros
    step = d.astype(np.float32)
    theirs = (codes_of(qs).astype(np.float32) - 8) * step[..., None]
    check_near(w, mine, theirs, np.abs(step), codes, codes_of(qs))


@pytest.mark.parametrize("seed", range(5))
def test_asym_int4_is_q4_1(seed: int) -> None:
    w = weights(seed)
    w[5] -= 7  # see the next test for blocks far from zero
    d, m, qs = q4_1(w)
    codes, parts, mine = ours(w, "asym_int4")
    assert np.array_equal(parts["scale"], d)
    assert np.array_equal(parts["min"], m)
    step = d.astype(np.float32)
    theirs = codes_of(qs).astype(np.float32) * step[..., None] + m.astype(np.float32)[..., None]
    check_near(w, mine, theirs, step, codes, codes_of(qs))


def test_asym_int4_far_from_zero_is_better_than_q4_1() -> None:
    # Rounding the min moves the grid by a good part of a step, which the ancestors' codes do not notice.
    w = (np.random.default_rng(0).standard_normal((4, 2, QK)) + 900).astype(np.float32)
    d, m, qs = q4_1(w)
    theirs = codes_of(qs).astype(np.float32) * d.astype(np.float32)[..., None] + m.astype(np.float32)[..., None]
    _, parts, mine = ours(w, "asym_int4")
    assert np.array_equal(parts["min"], m)
    assert (np.abs(w - mine) <= np.abs(w - theirs) + 2.0**-22 * 910).all()
    assert np.abs(w - mine).mean() < np.abs(w - theirs).mean()


@pytest.mark.parametrize("seed", range(5))
def test_sym_int8_is_q8_0_with_an_fp16_scale(seed: int) -> None:
    w = weights(seed)
    d, q = q8_0(w)
    codes, parts, mine = ours(w, "sym_int8")
    assert np.array_equal(parts["scale"], d.astype(np.float16))
    assert np.abs(codes.astype(int) - 128 - q).max() <= 1
    # What 127 roundings of the scale are worth in steps: 0.062, or more where fp16 is subnormal (absmax < 127 * 2^-14).
    step = d[..., None].astype(np.float64)
    drift = 127 * np.maximum(2.0**-11, 2.0**-25 / np.where(step == 0, 1, step)) + 2.0**-16
    assert (np.abs(mine - q * step) <= step * (1 + drift)).all()
    # A code moves only where the value lies that near to the middle of two.
    moved = np.nonzero(codes.astype(int) - 128 != q)
    fraction = np.abs(w[moved] / np.broadcast_to(step, w.shape)[moved]) % 1
    assert (np.abs(fraction - 0.5) <= np.broadcast_to(drift, w.shape)[moved]).all()


@pytest.mark.parametrize("scale", [0.5, 0.0625, 3 * 2.0**-7, 1.0009765625])
def test_weights_on_the_grid_are_the_same_codes_and_values(scale: float) -> None:
    generator = np.random.default_rng(1)
    four = generator.integers(-8, 8, (3, 4, QK)).astype(np.float32)
    four[..., 5] = -8
    _, qs = q4_0(four * np.float32(scale))
    codes, _, mine = ours(four * np.float32(scale), "sym_int4")
    assert np.array_equal(codes, codes_of(qs))
    assert np.array_equal(mine, four * np.float32(scale))

    four[..., 6] = 7
    _, _, qs = q4_1(four * np.float32(scale))
    codes, _, mine = ours(four * np.float32(scale), "asym_int4")
    assert np.array_equal(codes, codes_of(qs))
    assert np.array_equal(mine, four * np.float32(scale))

    eight = generator.integers(-127, 128, (3, 4, QK)).astype(np.float32)
    eight[..., 7] = 127
    _, q = q8_0(eight * np.float32(scale))
    codes, _, mine = ours(eight * np.float32(scale), "sym_int8")
    assert np.array_equal(codes.astype(int) - 128, q)
    assert np.array_equal(mine, eight * np.float32(scale))
