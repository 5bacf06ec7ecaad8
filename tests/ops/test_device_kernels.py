"""Kernels for other devices than the cpu. Their layouts and arithmetic are tested here; no such device is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dist_lowbit.formats import FORMATS, PackedWeight, dequantize, quantize
from dist_lowbit.ops import LinearSpec, choose
from dist_lowbit.ops.devices import Dequantized, XpuInt4
from tests.bounds import exact_linear, linear_bound

INT4 = ("sym_int4", "zp_int4")


def some_weight(format: str, n: int = 7, k: int = 128) -> PackedWeight:
    torch.manual_seed(1)
    return quantize(torch.randn(n, k), format, 64 if FORMATS[format].grouped else None)


@pytest.mark.parametrize("format", FORMATS)
def test_a_dequantized_product_is_the_exact_one_within_its_bound(format: str) -> None:
    weight, x = some_weight(format), torch.randn(5, 128)
    kernel, spec = Dequantized(), LinearSpec.of(weight, device="cuda")
    assert kernel.why_not(spec) is None
    packed, y = kernel.prepack(weight, spec), torch.empty(5, 7)
    kernel.run(x, packed, y)
    assert bool(((y - exact_linear(x, weight)).abs() <= linear_bound(x, weight, "fp32")).all())
    assert kernel.unpack(packed, spec).equal(weight)


@pytest.mark.parametrize("format", INT4)
def test_the_layout_of_xpu_holds_the_weight(format: str) -> None:
    weight = some_weight(format)
    kernel, spec = XpuInt4(), LinearSpec.of(weight, device="xpu")
    assert kernel.why_not(spec) is None
    packed = kernel.prepack(weight, spec)
    assert kernel.unpack(packed, spec).equal(weight)
    codes, scale, zeros = kernel._open(packed, 7, 128)
    words = codes.view(torch.int32).long()
    nibbles = torch.stack([words >> (4 * i) & 15 for i in range(8)], -1).reshape(7, 128)
    spread = [part.t().float().repeat_interleave(64, 1) for part in (scale, zeros)]
    assert torch.equal((nibbles.float() - spread[1]) * spread[0], dequantize(weight))


def test_a_device_gets_its_own_kernel() -> None:
    spec = LinearSpec.of(some_weight("sym_int4"))
    assert choose(replace(spec, device="xpu")).name == "xpu_int4"
    assert choose(replace(spec, device="cuda")).name == "dequantized"
    assert choose(spec).name not in ("xpu_int4", "dequantized")


@pytest.mark.parametrize(
    ("format", "changes", "why"),
    [
        ("sym_int4", {"device": "cuda"}, "it runs on xpu, not on cuda"),
        ("asym_int4", {}, "no 4-bit integer with a zero point"),
        ("sym_int8", {}, "no 4-bit integer with a zero point"),
        ("nf4", {}, "no 4-bit integer with a zero point"),
        ("sym_int4", {"group_size": -1}, "groups of multiples of 32"),
        ("sym_int4", {"k": 100}, "K = 100 is no multiple of the group"),
    ],
)
def test_xpu_refuses_what_its_operator_does_not_take(format: str, changes: dict, why: str) -> None:  # type: ignore[type-arg]
    spec = replace(LinearSpec.of(some_weight(format), device="xpu"), **changes)
    assert why in str(XpuInt4().why_not(spec))
