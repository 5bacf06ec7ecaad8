"""Kernels for other devices than the cpu. Their layouts and arithmetic are tested here; no such device is needed."""

from __future__ import annotations

from collections.abc import Iterator
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


def int4_product(x: torch.Tensor, words: torch.Tensor, group: int, scale: torch.Tensor, zeros: torch.Tensor):  # type: ignore[no-untyped-def]
    """Compute what torch's operator is documented to, on the CPU, which has none of its own."""
    kinds = (torch.float16, torch.int32, torch.float16, torch.int8)
    assert tuple(part.dtype for part in (x, words, scale, zeros)) == kinds
    assert all(part.is_contiguous() for part in (x, words, scale, zeros))
    n, k = words.shape[0], x.shape[1]
    assert (words.shape, scale.shape, zeros.shape) == ((n, k // 8), (k // group, n), (k // group, n))
    nibbles = (words.long()[..., None] >> torch.arange(0, 32, 4) & 15).reshape(n, k)
    scales, centers = (part.double().repeat_interleave(group, 0).T for part in (scale, zeros))
    return (x.double() @ ((nibbles - centers) * scales).T).half()


@pytest.fixture
def int4_on_the_cpu() -> Iterator[None]:
    """Register the operator's arithmetic for the CPU while a test runs; torch has it for Intel GPUs only."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_weight_int4pack_mm_with_scales_and_zeros", int4_product, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("int4_on_the_cpu")
@pytest.mark.parametrize(("n", "k", "group"), [(7, 128, 64), (16, 96, 32), (5, 128, 128)])
@pytest.mark.parametrize("format", INT4)
def test_xpu_hands_its_operator_what_gives_the_product(format: str, n: int, k: int, group: int) -> None:
    torch.manual_seed(2)
    weight = quantize(torch.randn(n, k), format, group)
    x = torch.randn(3, 2 * k)[:, ::2]  # not contiguous
    kernel, spec = XpuInt4(), LinearSpec.of(weight, device="xpu")
    y = torch.empty(3, n)
    kernel.run(x, kernel.prepack(weight, spec), y)
    exact = exact_linear(x, weight)
    # docs/numerics.md: fp16 moves x by 2^-11 of itself, or half of its least step, and then the result likewise.
    moved = x.double().abs().mul(2**-11).clamp(min=2**-25) @ dequantize(weight).double().abs().T
    assert bool(((y - exact).abs() <= moved + (exact.abs() + moved).mul(2**-11).clamp(min=2**-25)).all())


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
