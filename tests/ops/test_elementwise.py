"""exp_poly within its bound; the elementwise steps in C++ equal to the torch definition, on any ISA."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from native_kernels import each_isa, library, threads

from dist_lowbit.core.errors import UsageError
from dist_lowbit.ops import arithmetic as ar
from dist_lowbit.ops import elementwise as el

U = 2.0**-24


def _exp_range() -> torch.Tensor:
    # Even steps through the whole range and through the bits near zero.
    bits = torch.arange(-(2**31), -(2**31) + 0x42AE0000, 4999, dtype=torch.int64).to(torch.int32)
    return torch.cat([torch.linspace(-87, 0, 20011), bits.view(torch.float32)])


def test_exp_poly_keeps_its_bound() -> None:
    x = _exp_range()
    exact = x.double().exp()
    assert float(((el.exp_poly(x).double() - exact) / exact).abs().max()) <= el.EXP_ERROR


@pytest.mark.parametrize(("x", "y"), [(0.0, 1.0), (-0.0, 1.0), (-87.1, 0.0), (-math.inf, 0.0), (-3e38, 0.0)])
def test_exp_poly_at_its_ends(x: float, y: float) -> None:
    assert float(el.exp_poly(torch.tensor([x]))) == y


def test_exp_poly_never_gives_a_subnormal_and_keeps_nan() -> None:
    assert float(el.exp_poly(torch.tensor([-87.0]))) >= 2.0**-126
    assert el.exp_poly(torch.tensor([math.nan])).isnan().all()


def test_exp_poly_in_cpp_has_the_bits_of_the_definition() -> None:
    x = torch.cat([_exp_range(), torch.tensor([-math.inf, -90.0, 1.0, 80.0])])
    expected = el.exp_poly(x)
    with each_isa() as isas:
        for isa in isas:
            library().dlb_isa_select(isa)
            out = torch.empty_like(x)
            library().dlb_exp_poly(
                ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel())
            )
            assert torch.equal(out, expected)


def test_tanh_poly_keeps_its_bound() -> None:
    x = torch.cat([torch.linspace(-50, 50, 20001), torch.logspace(-30, 0, 1000)])
    # 4 u: the docstring of tanh_poly derives it.
    assert float((el.tanh_poly(x).double() - x.double().tanh()).abs().max()) <= 4 * U


def test_silu_mul_keeps_its_bound() -> None:
    g, u = torch.randn(5000) * 30, torch.randn(5000)
    exact = torch.nn.functional.silu(g.double()) * u.double()
    # t: 2 u; 1 + t: 2 u and its own rounding; a division and two products: 3 u; where t is 0, silu itself: 87 e^-87.
    bound = 1.05 * 8 * U * exact.abs() + 87 * math.exp(-87) * u.double().abs()
    assert bool(((el.silu_mul(g, u).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("k", [1, 15, 16, 100, 257, 4096])
def test_rms_norm_keeps_its_bound(k: int) -> None:
    x, w = torch.randn(3, k) * 5, torch.randn(k)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    # The sum of squares: ceil(K/16) + 4 roundings, mean and eps 3 (eps itself is rounded), halved by the root; root,
    # division and two products 4.
    bound = 1.05 * ((math.ceil(k / 16) + 7) / 2 + 4) * U * exact.abs()
    assert bool(((el.rms_norm(x, w, 1e-5).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 100), (40, 1024), (1, 4096)])
def test_cpp_has_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, w = (torch.randn(shape) * 8).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    silu = (ar.ACTIVATIONS["silu"](x.float()) * y.float()).to(dtype)
    norm = ar.rms_norm(x.float(), w.float(), 1e-6).to(dtype)
    with each_isa() as isas:
        for isa in isas:
            library().dlb_isa_select(isa)
            for count in (1, 2, 3):
                with threads(count):
                    assert torch.equal(el.silu_mul(x, y), silu)
                    assert torch.equal(el.rms_norm(x, w, 1e-6), norm)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, w = torch.randn(33, 200), torch.randn(200)
    whole = el.rms_norm(x, w, 1e-6)
    assert torch.equal(torch.cat([el.rms_norm(row, w, 1e-6) for row in x.split(1)]), whole)


def test_wrong_shapes_and_gradients_are_refused() -> None:
    with pytest.raises(UsageError, match="give two of one shape"):
        el.silu_mul(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match="weight of shape"):
        el.rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6)
    with pytest.raises(UsageError, match="no gradient"):
        el.silu_mul(torch.ones(3, requires_grad=True), torch.ones(3)).sum().backward()
