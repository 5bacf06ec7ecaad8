"""The codebooks, as data: entry c is the value of code c, before the scale.

Floating-point codebooks are divided by a power of two, so entries stay exact and a scale (absmax / largest
entry) keeps the size of the weights: a scale of absmax / 57344 would be subnormal in fp16.
"""

from __future__ import annotations

import math

# Quantiles of the normal distribution, 0 and +-1 included (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The same construction with three bits; its outermost probability is 1 - (1/16 + 1/14) / 2.
NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
    0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip


def _minifloat(exponent_bits: int, mantissa_bits: int, shift: int, specials: str) -> tuple[float, ...]:
    """Return every value of a sign-magnitude float with this many bits, times 2^-shift.

    specials: "none" all codes are numbers; "nan" the two largest magnitudes are NaN (OCP e4m3fn);
    "ieee" the largest exponent holds infinity and NaN.
    """
    bias = (1 << (exponent_bits - 1)) - 1
    magnitudes = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        top_exponent = exponent == (1 << exponent_bits) - 1
        top_mantissa = mantissa == (1 << mantissa_bits) - 1
        if specials == "ieee" and top_exponent:
            value = math.nan if mantissa else math.inf
        elif specials == "nan" and top_exponent and top_mantissa:
            value = math.nan
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        magnitudes.append(value * 2.0**-shift)
    return tuple(magnitudes) + tuple(-value for value in magnitudes)


FP4_E2M1 = _minifloat(2, 1, 3, "none")  # 0 .5 1 1.5 2 3 4 6, over 8
FP8_E4M3 = _minifloat(4, 3, 9, "nan")  # up to 448, over 512
FP8_E5M2 = _minifloat(5, 2, 16, "ieee")  # up to 57344, over 65536
