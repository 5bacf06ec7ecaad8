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
from dist_lowbit.ops import fused

U = 2.0**-24
GELU_C = 2 * math.sqrt(2 / math.pi)


def grown(n: torch.Tensor | float) -> torch.Tensor | float:
    """Return the relative error of a product of factors 1 + e, or of 1 / (1 + e), |e| <= a u each, n the sum of all a.

    By Bernoulli's inequality it is at least 1 - n u and at most 1 / (1 - n u). n may be half a number where the factors
    stand under a root, each with a = 1: (1 - u)^n >= 1 - n u for every n >= 1. A sum of positive terms lies between
    the sums with the smallest and the largest of their factors.
    """
    return n * U / (1 - n * U)


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
    # t: 2 u; 1 + t: 1 u, since t is at most half of 1 + t, and its own rounding; a division and two products: 3 u.
    # Where t is 0, silu itself: 87 e^-87. A product below 2^-126 rounds by 2^-150.
    bound = grown(7) * exact.abs() + 87 * math.exp(-87) * u.double().abs() + 2.0**-150
    assert bool(((el.silu_mul(g, u).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("k", [1, 15, 16, 100, 257, 4096])
def test_rms_norm_keeps_its_bound(k: int) -> None:
    x, w = torch.randn(3, k) * 5, torch.randn(k)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    # The sum of squares: ceil(K/16) + 4 roundings, mean and eps 3 (eps itself is rounded), halved by the root; root,
    # division and two products 4.
    bound = grown((math.ceil(k / 16) + 7) / 2 + 4) * exact.abs()
    assert bool(((el.rms_norm(x, w, 1e-5).double() - exact).abs() <= bound).all())


def _activation_range() -> torch.Tensor:
    return torch.cat([torch.linspace(-100, 100, 20001), torch.randn(5000), torch.logspace(-30, 30, 300)])


def _relative(kind: str, x: torch.Tensor) -> torch.Tensor:
    """Return the derived relative error of an activation at x (fp64)."""
    if kind == "gelu":  # normal_distribution, which takes |x| as 14 at most, and the product
        return torch.as_tensor(grown(11 + x.clamp(-14, 14).square() / 2))
    inner = {"gelu_tanh": x * (GELU_C + 0.044715 * GELU_C * x * x), "quick_gelu": 1.702 * x}.get(kind, x)
    # The argument errs by 5 u (tanh form: x x, c2, its product; the sum; the product) or 2 u (c, the product). The
    # logarithm of a sigmoid has the derivative 1 - sigmoid, at most that at the argument's lower end. Then 5 u of the
    # sigmoid itself (its docstring) and the product.
    moved = grown({"gelu_tanh": 5.0, "quick_gelu": 2.0}.get(kind, 0.0)) * inner.abs()
    return (1 + grown(6)) * torch.expm1(moved * torch.sigmoid(moved - inner)) + grown(6)


@pytest.mark.parametrize("kind", list(ar.ACTIVATIONS))
def test_activations_keep_their_bound(kind: str) -> None:
    x = _activation_range()
    wide = x.double()
    exact = {
        "none": lambda v: v,
        "silu": torch.nn.functional.silu,
        # torch's fp64 gelu cancels at negative x; erfc does not.
        "gelu": lambda v: v * torch.special.erfc(-v / math.sqrt(2)) / 2,
        "gelu_tanh": lambda v: v * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)),
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
    }[kind](wide)
    # Where the exponential is 0, at most |x| exp(-87) is missing; and a product below 2^-126 rounds by 2^-150.
    least = (wide.abs() + 1) * (math.exp(-87) + 2.0**-149)
    bound = torch.where(exact == 0, 0, _relative(kind, wide) * exact.abs()) + least
    assert bool(((el.activation(x, kind).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kind", list(ar.ACTIVATIONS))
def test_activations_at_their_ends(kind: str) -> None:
    ends = torch.tensor([0.0, -0.0, math.inf, math.nan])
    got = el.activation(ends, kind)
    assert got[:2].tolist() == ([0.5, 0.5] if kind == "sigmoid" else [0.0, 0.0])
    assert float(got[2]) == (1.0 if kind == "sigmoid" else math.inf)
    assert got[3].isnan()


@pytest.mark.parametrize("k", [1, 15, 16, 100, 257, 4096])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_layer_norm_keeps_its_bound(k: int, shift: float) -> None:
    x, w, b = torch.randn(3, k) * 5 + shift, torch.randn(k), torch.randn(k)
    wide, eps = x.double(), 1e-5
    d = wide - wide.mean(-1, keepdim=True)
    sigma = (d.square().mean(-1, keepdim=True) + eps).sqrt()
    y = d / sigma * w.double()
    # The mean errs by its sum's and the division's roundings; so does d, and by its own. By Minkowski's inequality the
    # root of the mean square errs by no more than d does on average; `moved` is that relative to sigma, before its own
    # roundings (square, sum, mean, eps twice, under the root), the root, the division and two products.
    lanes = math.ceil(k / 16)
    error = (1 + U) * grown(lanes + 4) * wide.abs().mean(-1, keepdim=True) + U * d.abs()
    moved = error.square().mean(-1, keepdim=True).sqrt() / sigma
    rounded = grown((lanes + 7) / 2 + 4)
    scaled = (error + d.abs() * moved) / (sigma * (1 - moved)) * (1 + rounded) + d.abs() / sigma * rounded
    bound = scaled * w.double().abs() * (1 + U) + U * (y + b.double()).abs()
    assert bool(((el.layer_norm(x, w, b, eps).double() - (y + b.double())).abs() <= bound).all())


SHAPES = [(1, 1), (3, 7), (2, 5, 100), (9, 1000), (1, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_has_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, w = (torch.randn(shape) * 8).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    a, b, c = x.float(), y.float(), w.float()
    gate = y[..., :1]
    steps = [
        *[(lambda kind=kind: el.gated(x, y, kind), act(a) * b) for kind, act in ar.ACTIVATIONS.items()],
        *[(lambda kind=kind: el.activation(x, kind), act(a)) for kind, act in ar.ACTIVATIONS.items()],
        (lambda: el.rms_norm(x, w, 1e-6), ar.rms_norm(a, c, 1e-6)),
        (lambda: el.rms_norm(x, w, 1e-6, 1.0), ar.rms_norm(a, c, 1e-6, 1.0)),
        (lambda: el.rms_norm(x, None, 1e-6), ar.rms_norm(a, None, 1e-6)),
        (lambda: el.layer_norm(x, w, w, 1e-6), ar.layer_norm(a, c, c, 1e-6)),
        (lambda: el.layer_norm(x, w, None, 1e-6), ar.layer_norm(a, c, None, 1e-6)),
        (lambda: el.layer_norm(x, None, None, 1e-6), ar.layer_norm(a, None, None, 1e-6)),
        (lambda: el.sigmoid_add(x, y, gate), a + ar.sigmoid(gate.float()) * b),
    ]
    with each_isa() as isas:
        for isa in {isas[0], isas[-1]}:  # those between have the last one's
            library().dlb_isa_select(isa)
            for count in (1, 2):
                with threads(count):
                    for i, (run, want) in enumerate(steps):
                        assert torch.equal(run(), want.to(dtype)), f"step {i}, {isa}, {count} threads"


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8), (1024, 16)])
@pytest.mark.parametrize("normalize", [False, True])
def test_route_has_the_bits_of_the_definition(experts: int, top_k: int, normalize: bool) -> None:
    logits = torch.randn(37, experts) * 3
    logits[5] = logits[5].round()  # ties
    logits[6] = 0
    ids, weights = ar.route(logits, top_k, normalize)
    exact = logits.double().softmax(-1).gather(-1, ids.long())
    # exp: 2 u, its argument's rounding times |logit - max| u, the sum the same and its roundings, the division; the
    # sum of the chosen and another division.
    spread = (logits.amax(-1) - logits.amin(-1)).double().unsqueeze(-1)
    bound = (2 * (2 + spread) + math.ceil(experts / 16) + 5) * (2 if normalize else 1) + top_k + 1
    exact = exact / exact.sum(-1, keepdim=True) if normalize else exact
    assert bool(((weights.double() - exact).abs() <= grown(bound) * exact).all())
    assert ids[6].tolist() == list(range(top_k))
    with each_isa() as isas:
        for isa in isas:
            library().dlb_isa_select(isa)
            got = el.route(logits, top_k, normalize)
            assert torch.equal(got[0], ids)
            assert torch.equal(got[1], weights)


def test_a_route_of_nan_is_a_valid_choice() -> None:
    logits = torch.randn(3, 20)
    logits[1, 4] = math.nan
    ids, weights = el.route(logits, 4, True)
    assert weights[1].isnan().all()
    assert not weights[[0, 2]].isnan().any()
    assert len(set(ids[1].tolist())) == 4
    assert bool(((ids >= 0) & (ids < 20)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_cast_as_torch_casts(dtype: torch.dtype) -> None:
    # Every exponent, both signs, and bits around the midpoints; and every number of the type with its neighbours.
    bits = torch.arange(-(2**31), 2**31, 1500007, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    near = halves.view(torch.int32)
    x = torch.cat(
        [bits, near, near + 0x0FFF, near + 0x1000, near + 0x1001, near + 0x7FFF, near + 0x8000, near + 0x8001]
    )
    x = x.view(torch.float32)[: len(x) // 64 * 64].reshape(-1, 64)
    want = x.to(dtype)
    nan = want.isnan()
    with each_isa() as isas:
        found = []
        for isa in isas:
            library().dlb_isa_select(isa)
            got = fused.rows_apply(fused.Rows(x), fused.Finish(dtype=dtype))
            assert torch.equal(got.isnan(), nan)
            assert torch.equal(got[~nan], want[~nan])
            found.append(got.view(torch.int16))
        assert all(torch.equal(one, found[0]) for one in found)  # NaN too


def test_a_row_does_not_depend_on_the_others() -> None:
    x, w = torch.randn(33, 200), torch.randn(200)
    whole = el.rms_norm(x, w, 1e-6)
    assert torch.equal(torch.cat([el.rms_norm(row, w, 1e-6) for row in x.split(1)]), whole)


def test_wrong_shapes_and_gradients_are_refused() -> None:
    with pytest.raises(UsageError, match="give two of one shape"):
        el.silu_mul(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match="weight of shape"):
        el.rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6)
    with pytest.raises(UsageError, match="layer_norm got a bias of shape"):
        el.layer_norm(torch.zeros(2, 3), None, torch.zeros(4), 1e-6)
    with pytest.raises(UsageError, match="there is no activation 'swish'"):
        el.activation(torch.zeros(3), "swish")
    with pytest.raises(UsageError, match="gate with a last axis of 1"):
        el.sigmoid_add(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(UsageError, match="top_k <= E <= 1024"):
        el.route(torch.zeros(2, 3), 4, False)
    with pytest.raises(UsageError, match="no gradient"):
        el.silu_mul(torch.ones(3, requires_grad=True), torch.ones(3)).sum().backward()
