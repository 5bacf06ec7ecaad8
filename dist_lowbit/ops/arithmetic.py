"""The definition of the elementwise steps of a decoder layer, in an order of operations fixed to the bit.

Products, sums, quotients and square roots of fp32, each rounded to the nearest, never contracted. kernels/cpu does the
same operations and gives the same bits on every ISA and any number of threads. All functions here take and return fp32.
"""

from __future__ import annotations

import torch

# exp(x) = 2^n exp(r), n = rne(x log2 e), r = x - n ln 2 with ln 2 in two parts (Cody and Waite; the high part has 9
# significant bits, so n * LN2_HI is exact), exp(r) = 1 + r + r^2 P(r). P: minimax of the relative error on |r| <=
# ln(2)/2, 3.1e-9, by Remez' algorithm. The same numbers stand in kernels/cpu/exp_poly.h; tests/ops compares the two bit
# for bit.
EXP_LOWEST = -87.0
EXP_LOG2E = float.fromhex("0x1.715476p+0")
EXP_LN2_HI = float.fromhex("0x1.63p-1")
EXP_LN2_LO = float.fromhex("-0x1.bd0106p-13")
EXP_P = tuple(
    float.fromhex(c) for c in ("0x1.6a2434p-10", "0x1.1239e2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2")
)
EXP_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest even integer

LANES = 16  # partial sums of every reduction along a row; element i belongs to lane i mod 16

# |exp_poly(x) / exp(x) - 1| for -87 <= x <= 0, in u = 2^-24. Rounding of 1 + y: at most 1 (result at least 1) or 0.71
# (below); of r + r^2 P: 1/4; of r itself (the last subtraction): 1/4; the products before them and P's own error: under
# 0.1 together.
EXP_ERROR = 2.0 * 2.0**-24  # the worst over every third float in the range is 1.39 u

# Phi(-a) = exp(-a^2 / 2) P(q) / (1 + a), q = (a - 4) / (a + 4), for a = min(|x|, 14); coefficients of the highest power
# first. kernels/cpu/gelu_poly.h holds the same numbers and says how they were found.
GELU_LARGEST = 14.0
GELU_CENTER = 4.0
GELU_P = tuple(
    float.fromhex(c)
    for c in (
        "0x1.c4890ap-14", "0x1.915312p-11", "-0x1.9a1e9p-12", "-0x1.4c223p-8", "0x1.26251ep-6",
        "-0x1.07a578p-5", "0x1.d492e6p-6", "0x1.cab52p-7", "-0x1.8c18eep-4", "0x1.e361ecp-2",
    )
)  # fmt: skip
GELU_TANH_C1 = float.fromhex("0x1.988454p+0")  # 2 sqrt(2 / pi)
GELU_TANH_C2 = float.fromhex("0x1.2444f2p-4")  # 0.044715 times that
QUICK_GELU_C = float.fromhex("0x1.b3b646p+0")  # 1.702


def exp_poly(x: torch.Tensor) -> torch.Tensor:
    """Return the fp32 exponential of x <= 88, the same bits everywhere; 0 below -87.

    Relative error at most EXP_ERROR. exp_poly(0) is exactly 1; NaN gives NaN.
    """
    t = x * EXP_LOG2E + EXP_MAGIC
    n = t - EXP_MAGIC
    r = x - n * EXP_LN2_HI
    r = r - n * EXP_LN2_LO
    y = torch.full_like(r, EXP_P[0])
    for c in EXP_P[1:]:
        y = y * r + c
    y = y * r
    y = y * r + r
    y = y + 1.0
    # int32 of a NaN or of an infinity is any number; the first stays NaN, the second is below EXP_LOWEST.
    power = ((torch.nan_to_num(n, 0.0, 0.0, 0.0).clamp(-126, 127).to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < EXP_LOWEST, torch.zeros_like(x), y * power)


def tanh_poly(x: torch.Tensor) -> torch.Tensor:
    """Return the fp32 tanh made of exp_poly: sign(x) (1 - t) / (1 + t), t = exp_poly(-2 |x|).

    Absolute error at most 4 * 2^-24: t errs by 2 u relative, so by 2 u at most; d tanh / dt = 2 / (1 + t)^2 is at most
    2, but t (2 u) times it at most u; the three roundings add at most 1/2 + 1 + 1 u.
    """
    t = exp_poly(-2.0 * x.abs())
    return torch.copysign((1.0 - t) / (1.0 + t), x)


def lane_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum the last axis in 16 lanes (element i to lane i mod 16, in sequence), then the lanes by `lane_tree`."""
    pad = -x.shape[-1] % LANES
    parts = torch.nn.functional.pad(x, (0, pad))
    parts = parts.reshape(*x.shape[:-1], parts.shape[-1] // LANES, LANES)
    lane = torch.zeros_like(parts[..., 0, :])
    for t in range(parts.shape[-2]):
        lane = lane + parts[..., t, :]
    return lane_tree(lane)


def lane_tree(lane: torch.Tensor) -> torch.Tensor:
    """Add 16 lanes (the last axis): lane l with l + 8, then + 4, + 2, + 1."""
    half = LANES // 2
    while half:
        lane = lane[..., :half] + lane[..., half : 2 * half]
        half //= 2
    return lane[..., 0]


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return (x < 0 ? t : 1) / (1 + t), t = exp_poly(-|x|). Relative error at most 5.1 u for x >= -87.

    t: 2 u; 1 + t: at most 1 u from t and its own rounding; the division.
    """
    t = exp_poly(-x.abs())
    return torch.where(x < 0, t, torch.ones_like(t)) / (1.0 + t)


def normal_distribution(x: torch.Tensor) -> torch.Tensor:
    """Return Phi(x), the probability that a normal variable is below x. Relative error at most (10 + x^2 / 2) u.

    For x < 0 in u: P itself 1, Horner's rule 2.1 (a running bound over the interval), q's three roundings times
    |q P' / P| <= 0.41: 1.3; 1 + a and the division: 2; the exponential: 2, and x^2 / 2 from rounding x^2; the product
    1. For x >= 0 it is 1 minus at most a half of that, and a rounding. Below -13.1 the result is 0.
    """
    a = x.abs()
    a = torch.where(a > GELU_LARGEST, torch.full_like(a, GELU_LARGEST), a)
    q = (a - GELU_CENTER) / (a + GELU_CENTER)
    y = torch.full_like(q, GELU_P[0])
    for c in GELU_P[1:]:
        y = y * q + c
    tail = exp_poly((-0.5 * a) * a) * (y / (1.0 + a))
    return torch.where(x < 0, tail, 1.0 - tail)


def _relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, torch.zeros_like(x), x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * sigmoid(x * (GELU_TANH_C1 + GELU_TANH_C2 * (x * x)))


# name: formula, in the order of enum dlb_activation of kernels/cpu/fused.h. The tanh form of gelu is written with a
# sigmoid, 1/2 (1 + tanh y) = sigmoid(2 y), which has no cancellation at negative x.
ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * normal_distribution(x),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(QUICK_GELU_C * x),
    "relu": _relu,
    "sigmoid": sigmoid,
}


def _factor(x: torch.Tensor, eps: float) -> torch.Tensor:
    mean = lane_sum(x * x) / float(x.shape[-1])
    # torch's fp32 square root is not correctly rounded (17% of its results are not, torch 2.13 on AVX2). The fp64 one,
    # rounded to fp32, is: a root of 24 bits keeps 2^-51 away from a midpoint of fp32, far more than fp64 errs.
    return (1.0 / torch.sqrt((mean + eps).double()).float()).unsqueeze(-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Return (x (1 / sqrt(mean(x^2) + eps))) (weight + offset) along the last axis; no weight: ones."""
    y = x * _factor(x, eps)
    return y if weight is None else y * (weight + offset)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return (d (1 / sqrt(mean(d^2) + eps))) (weight + offset) + bias, d = x - mean(x), along the last axis."""
    d = x - (lane_sum(x) / float(x.shape[-1])).unsqueeze(-1)
    y = d * _factor(d, eps)
    if weight is not None:
        y = y * (weight + offset)
    return y if bias is None else y + bias


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts int32 [M, top_k] of fp32 router logits [M, E] and their weights fp32 [M, top_k].

    The largest logits in descending order, ties to the lower index. A weight is exp_poly(logit - max) over the
    lane_sum of all; with `normalize` it is divided by the sum of the chosen, in sequence in their order.
    """
    e = exp_poly(logits - logits.amax(-1, keepdim=True))
    # A stable sort keeps equal logits in order of their index.
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = e.gather(-1, ids) / lane_sum(e).unsqueeze(-1)
    if normalize:
        total = torch.zeros_like(weights[:, 0])
        for slot in range(top_k):
            total = total + weights[:, slot]
        weights = weights / total.unsqueeze(-1)
    return ids.to(torch.int32), weights
