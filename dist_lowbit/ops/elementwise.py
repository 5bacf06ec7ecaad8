"""The one exponential, and the elementwise steps of a decoder layer, in an order of operations fixed to the bit.

The torch code is the definition: products, sums, quotients and square roots of fp32, each rounded to the nearest, never
contracted. kernels/cpu does the same operations and gives the same bits on every ISA and any number of
threads.
"""

from __future__ import annotations

import ctypes

import torch

from dist_lowbit.core.errors import UsageError

from .library import library as compiled_library

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


def _silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    x = gate.float()
    t = exp_poly(-x.abs())
    sigmoid = torch.where(x < 0, t, torch.ones_like(t)) / (1.0 + t)
    return ((x * sigmoid) * up.float()).to(gate.dtype)


def _rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean = lane_sum(wide * wide) / float(x.shape[-1])
    # torch's fp32 square root is not correctly rounded (17% of its results are not, torch 2.13 on AVX2). The fp64 one,
    # rounded to fp32, is: a root of 24 bits keeps 2^-51 away from a midpoint of fp32, far more than fp64 errs.
    factor = 1.0 / torch.sqrt((mean + eps).double()).float()
    return ((wide * factor.unsqueeze(-1)) * weight.float()).to(x.dtype)


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _library(x: torch.Tensor) -> ctypes.CDLL | None:
    return compiled_library() if x.device.type == "cpu" else None


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.shape != up.shape:
        raise UsageError(f"silu_mul got shapes {tuple(gate.shape)} and {tuple(up.shape)}; give two of one shape")
    library = _library(gate)
    if library is None:
        return _silu_mul_reference(gate, up)
    a, b = gate.float().contiguous(), up.float().contiguous()
    out = torch.empty_like(a)
    library.dlb_silu_mul(_address(a), _address(b), _address(out), ctypes.c_int64(a.numel()))
    return out.to(gate.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.shape != x.shape[-1:]:
        raise UsageError(
            f"rms_norm got a weight of shape {tuple(weight.shape)}; expected ({x.shape[-1]},) as x's last axis"
        )
    library = _library(x)
    if library is None:
        return _rms_norm_reference(x, weight, eps)
    wide, w = x.float().contiguous(), weight.float().contiguous()
    out = torch.empty_like(wide)
    k = wide.shape[-1]
    rows = wide.numel() // k if k else 0
    library.dlb_rms_norm(
        _address(wide), _address(w), ctypes.c_float(eps), _address(out), ctypes.c_int64(rows), ctypes.c_int64(k)
    )
    return out.to(x.dtype)


def forbid_gradient(name: str, library: torch.library.Library) -> None:
    """Make a backward pass through the op `dist_lowbit::name` an error instead of a silently missing gradient."""

    def backward(_context: object, *_gradients: torch.Tensor) -> None:
        raise UsageError(f"dist_lowbit::{name} has no gradient; train without it, or call torch.no_grad()")

    torch.library.register_autograd(f"dist_lowbit::{name}", backward, lib=library)


_ops = torch.library.Library("dist_lowbit", "FRAGMENT")
_ops.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
_ops.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_ops.impl("silu_mul", _silu_mul, "CompositeExplicitAutograd")
_ops.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
torch.library.register_fake("dist_lowbit::silu_mul", lambda gate, up: gate.new_empty(gate.shape), lib=_ops)
torch.library.register_fake("dist_lowbit::rms_norm", lambda x, weight, eps: x.new_empty(x.shape), lib=_ops)

forbid_gradient("silu_mul", _ops)
forbid_gradient("rms_norm", _ops)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, elementwise, in fp32 rounded once to gate's dtype.

    Both of one shape and any float dtype. silu(x) = x * sigmoid(x), sigmoid from exp_poly(-|x|).
    """
    result: torch.Tensor = torch.ops.dist_lowbit.silu_mul(gate, up)
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight along the last axis, in fp32 rounded once to x's dtype.

    x [..., K], weight [K]. The mean is a 16-lane sum divided by K: a row's result depends on that row alone.
    """
    result: torch.Tensor = torch.ops.dist_lowbit.rms_norm(x, weight, eps)
    return result
