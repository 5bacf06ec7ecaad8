"""The shared bounds of tests/bounds.py: they hold for the reference arithmetic, and inputs made for it come near."""

from __future__ import annotations

import types
from itertools import pairwise

import pytest
import torch

from dist_lowbit.formats import FORMATS, PackedWeight, dequantize, quantize
from dist_lowbit.ops.reference import linear
from tests import bounds
from tests.bounds import (
    activation_bound,
    cast_bound,
    exact_linear,
    format_bound,
    linear_bound,
    margin_bound,
    reorder_bound,
)

ROWS = list(FORMATS.values())
INTEGER = [row for row in ROWS if row.integer]


def cuts_of(weight: PackedWeight) -> list[int]:
    k, block = weight.shape[1], weight.block
    units = -(-k // block)
    return [min(i * units // 8 * block, k) for i in range(9)]


def run(x: torch.Tensor, weight: PackedWeight, compute: str = "int8") -> torch.Tensor:
    return linear(x, weight, cuts_of(weight), compute)


def activations(m: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x[0] *= 30 ** torch.randn(k, generator=generator)  # outliers, as real activations have
    x[1, : k // 2] = 0
    x[2] *= 1e-31  # below what int8 activations resolve
    return x


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_reference_is_within_linear_bound(row: object, group: int, compute: str) -> None:
    for k in (1000, 64, 31):
        weight = quantize(torch.randn(12, k, generator=torch.Generator().manual_seed(k)), row, group)  # type: ignore[arg-type]
        x = activations(5, k, k)
        error = (run(x, weight, compute).double() - exact_linear(x, weight)).abs()
        assert (error <= linear_bound(x, weight, compute)).all()


@pytest.mark.parametrize("row", INTEGER, ids=lambda row: row.name)
def test_linear_bound_is_nearly_reached_by_int8_activations(row: object) -> None:
    # Every activation just under half a step above or below a step, on the side where its weight adds to the error.
    weight = quantize(torch.randn(1, 256, generator=torch.Generator().manual_seed(1)), row, 64)  # type: ignore[arg-type]
    values = dequantize(weight)
    x = (torch.arange(256) % 50).float() + torch.where(values > 0, 0.499, -0.499)
    x[:, ::64] = 127.0  # the scale is 1; this one has no error
    bound = linear_bound(x, weight)
    error = (run(x, weight).double() - exact_linear(x, weight)).abs()
    assert error <= bound
    assert error > 0.9 * bound


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ranks_at_any_degree_are_within_reorder_bound(row: object) -> None:
    k = 1024
    weight = quantize(torch.randn(16, k, generator=torch.Generator().manual_seed(2)), row, 32)  # type: ignore[arg-type]
    x = activations(5, k, 3)
    for compute in ("int8", "fp32"):
        whole = run(x, weight, compute)
        bound = reorder_bound(x, weight, compute)
        for ranks in (2, 3, 5, 7):
            edges = [r * (k // 32) // ranks * 32 for r in range(ranks + 1)]
            shards = [(weight.split(1, a, b), x[:, a:b]) for a, b in pairwise(edges)]
            total = torch.zeros_like(whole)
            for shard, part in reversed(shards):  # some order, not the tree's
                total = total + run(part, shard, compute)
            assert ((whole.double() - total.double()).abs() <= bound).all()


def test_reorder_bound_is_of_the_right_size() -> None:
    # A block of 127 and eight of just under half its ulp: one after the other they are lost, added up first they count.
    k = 64 * 9
    w = torch.zeros(1, k)
    w[0, ::64] = 127.0  # code 255, scale 1
    weight = quantize(w, "sym_int8")
    x = torch.zeros(1, k)
    x[0, ::64] = 2.0**-25
    x[0, 0] = 1.0
    terms = x[0, ::64] * 127
    one_by_one = terms[0].clone()
    for term in terms[1:]:
        one_by_one = one_by_one + term
    rest = terms[1].clone()
    for term in terms[2:]:
        rest = rest + term
    difference = float((terms[0] + rest - one_by_one).abs())
    bound = float(reorder_bound(x, weight))
    assert 0.1 * bound < difference <= bound


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_format_bound_holds_and_follows_the_signs(row: object) -> None:
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(4))
    error = dequantize(quantize(w, row)).double() - w.double()  # type: ignore[arg-type]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5))
    assert ((x.double() @ error.T).abs() <= format_bound(x, w, row)).all()  # type: ignore[arg-type]
    # With all errors pulling one way the sum is a good part of the bound (rounding errors average half the worst).
    aligned = torch.sign(error[0]).float()[None]
    bound = float(format_bound(aligned, w[:1], row))  # type: ignore[arg-type]
    assert float(error[0].abs().sum()) <= bound
    assert bound == 0 or float(error[0].abs().sum()) > 0.05 * bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cast_bound(dtype: torch.dtype) -> None:
    y = torch.randn(1000, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 1e-2
    error = (y.to(dtype).double() - y).abs()
    bound = cast_bound(y, torch.zeros_like(y), dtype)
    assert (error <= bound).all()
    assert (error / bound).max() > 0.9
    shifted = y + 1e-3
    bound = cast_bound(y, torch.full_like(y, 1e-3), dtype, roundings=2)
    assert ((shifted.to(dtype).double() - y).abs() <= bound * (1 + 2.0**-40)).all()


def test_activation_bound_is_the_sum_over_blocks() -> None:
    weight = quantize(torch.ones(1, 128), "sym_int8", 64)
    x = torch.zeros(1, 128)
    x[0, 3], x[0, 70] = 127.0, 254.0
    ones = float(dequantize(weight)[0, 0])
    assert float(activation_bound(x, weight)) == pytest.approx(64 * ones * (0.5 + 1.0), rel=1e-3)  # 4 * 127 u, 2^-20


class Toy(torch.nn.Module):
    """Two Linears with or without something nonlinear between, and an embedding before."""

    def __init__(self, middle: torch.nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.embed = torch.nn.Embedding(11, 16, dtype=torch.float64)
        self.up = torch.nn.Linear(16, 24, dtype=torch.float64)
        self.middle = middle
        self.down = torch.nn.Linear(24, 11, bias=False, dtype=torch.float64)
        self.shift: dict[str, torch.Tensor] = {}
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3

    def forward(self, ids: torch.Tensor) -> types.SimpleNamespace:
        hidden = self.up(self.embed(ids))
        hidden = self.middle(hidden + self.shift.get("up", 0)).cumsum(1)  # positions mix, as in attention
        return types.SimpleNamespace(logits=self.down(hidden) + self.shift.get("down", 0))


@pytest.mark.parametrize(("middle", "second_order"), [(torch.nn.Identity(), 0.0), (torch.nn.SiLU(), 0.02)])
def test_margin_bound_is_exact_where_linear_and_first_order_elsewhere(
    middle: torch.nn.Module, second_order: float
) -> None:
    model, ids, size = Toy(middle), torch.tensor([[3, 1, 4, 1, 5]]), 1e-2
    bound = margin_bound(model, ids, 4, 2, 7, lambda name, x, y: torch.full_like(y, size))
    with torch.no_grad():
        exact = model(ids).logits[0, 4]
        largest = 0.0
        slope = model.down.weight[2] - model.down.weight[7]
        for trial in range(50):
            generator = torch.Generator().manual_seed(trial)
            signs = torch.randn(5, 24, generator=generator).sign() if trial else slope.sign().expand(5, 24)
            last = torch.zeros(5, 11, dtype=torch.float64)
            last[4, 2], last[4, 7] = size, -size
            model.shift = {"up": signs.double() * size, "down": last}
            moved = model(ids).logits[0, 4]
            largest = max(largest, float(((moved[2] - moved[7]) - (exact[2] - exact[7])).abs()))
    # SiLU's second derivative is at most 1/2: one Linear's error of 1e-2 adds 1/2 * 1/2 * 1e-4 a unit, 0.25% of what
    # its own slope (around 1/2) passes on.
    assert largest <= bound * (1 + second_order + 1e-9)
    assert largest >= bound * (1 - second_order - 1e-9) or second_order


def test_margin_bound_leaves_the_model_as_it_was() -> None:
    model = Toy(torch.nn.SiLU())
    margin_bound(model, torch.tensor([[1, 2]]), 1, 0, 1, lambda name, x, y: torch.zeros_like(y))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gamma_is_monotone_and_small() -> None:
    assert bounds.gamma(0) == 0
    assert all(n * bounds.U <= bounds.gamma(n) < bounds.gamma(n + 1) for n in range(0, 10000, 999))
