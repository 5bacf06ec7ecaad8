"""Experts give the bits of the definition, whatever the layout, the degree and the rows beside."""

from __future__ import annotations

import pytest
import torch
from fused_cases import SLOW, cuts_of, finished, isa_names, pack, product, rank_cuts, rank_tree, segments_of
from native_kernels import threads

from dist_lowbit import ops
from dist_lowbit.formats import PackedWeight, quantize
from dist_lowbit.formats.packed import merge
from dist_lowbit.ops import elementwise as el
from dist_lowbit.ops import fused
from dist_lowbit.ops.fused import Expert, Finish, Rows

pytestmark = pytest.mark.usefixtures("library")


class Experts:
    """Experts of I = 160 and a shared one of I = 96, as matrices and packed."""

    def __init__(self, format: str, layout: str, generator: torch.Generator, count: int = 5) -> None:
        self.k, self.n, self.layout = 96, 50, layout
        self.matrices = []
        for e in range(count):
            inner = 96 if e == count - 1 else 160
            shapes = [(inner, self.k), (inner, self.k), (self.n, inner)]
            self.matrices.append([quantize(torch.randn(s, generator=generator), format, 32) for s in shapes])
        self.whole = [self.packed(*three, cuts_of(three[2])) for three in self.matrices]

    def packed(self, gate: PackedWeight, up: PackedWeight, down: PackedWeight, cuts: tuple[int, ...]) -> Expert:
        if self.layout == "stacked":
            return Expert(pack(merge([gate, up], 0)), pack(down, cuts))
        return Expert(pack(gate), pack(down, cuts), pack(up) if self.layout == "gated" else None)

    def rank(self, rank: int, tp: int) -> list[Expert]:
        mine = []
        for gate, up, down in self.matrices:
            start, stop, cuts = rank_cuts(cuts_of(down), rank, tp)
            mine.append(
                self.packed(gate.split(0, start, stop), up.split(0, start, stop), down.split(1, start, stop), cuts)
            )
        return mine

    def definition(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kind: str) -> torch.Tensor:
        products = []
        for gate, up, down in self.matrices:
            h = product(x, pack(gate), gate.shape[0])
            other = product(x, pack(up), up.shape[0])
            h = el.activation(h, kind) if self.layout == "plain" else el.gated(h, other, kind)
            products.append(segments_of(h, down, cuts_of(down)))
        return fused.moe_tree(products, ids, weights)


def routed(m: int, experts: int, slots: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a choice of experts for each row, the last one in all rows, one slot unused in some."""
    ids, chosen = el.route(torch.randn(m, experts - 1, generator=generator), slots - 1, True)
    ids = torch.cat([torch.full((m, 1), experts - 1, dtype=torch.int32), ids], 1)
    ids[::3, 1] = -1
    return ids, torch.cat([torch.rand(m, 1, generator=generator), chosen], 1)


@pytest.mark.parametrize("layout", ["stacked", pytest.param("gated", marks=SLOW), pytest.param("plain", marks=SLOW)])
@pytest.mark.parametrize(
    "format", ["sym_int4", "fp16", *[pytest.param(f, marks=SLOW) for f in ("asym_int5", "nf4", "bf16", "fp8_e4m3")]]
)
def test_experts_have_the_bits_of_the_definition(format: str, layout: str, generator: torch.Generator) -> None:
    experts, kind = Experts(format, layout, generator), "gelu_tanh" if layout == "plain" else "silu"
    for isa in isa_names() if layout == "stacked" else isa_names()[-1:]:
        ops.select_isa(isa)
        for m in (1, 4, 37):
            x, (ids, factors) = torch.randn(m, 96, generator=generator), routed(m, 5, 3, generator)
            want = experts.definition(x, ids, factors, kind)
            finish = Finish(None, torch.randn(m, 50, generator=generator), torch.float16)
            for count in (1, 2):
                with threads(count):
                    got = fused.moe(x, experts.whole, ids, factors, kind, 50, Finish())
                    assert torch.equal(got, want), f"{isa}, M={m}, {count} threads"
            assert torch.equal(fused.moe(x, experts.whole, ids, factors, kind, 50, finish), finished(want, finish)), (
                f"{isa}, M={m}"
            )


@pytest.mark.parametrize("format", ["sym_int4", "sym_int8"])
def test_experts_over_ranks_give_the_bits_of_the_whole(format: str, generator: torch.Generator) -> None:
    experts, x = Experts(format, "gated", generator), torch.randn(9, 96, generator=generator)
    ids, factors = routed(9, 5, 3, generator)
    whole = fused.moe(x, experts.whole, ids, factors, "silu", 50, Finish())
    for tp in (2, 4, 8):
        parts = [fused.moe(x, experts.rank(r, tp), ids, factors, "silu", 50, Finish()) for r in range(tp)]
        assert torch.equal(rank_tree(parts), whole), tp


@pytest.mark.parametrize("format", ["sym_int4", "fp16"])
def test_a_row_of_experts_depends_on_nothing_else(format: str, generator: torch.Generator) -> None:
    experts, m = Experts(format, "stacked", generator), 600  # more than a slice
    x, (ids, factors) = torch.randn(m, 96, generator=generator), routed(m, 5, 3, generator)
    whole = fused.moe(x, experts.whole, ids, factors, "silu", 50, Finish())
    for rows in (slice(0, 1), slice(1, 8), slice(510, 515), slice(599, 600)):
        part = fused.moe(x[rows], experts.whole, ids[rows], factors[rows], "silu", 50, Finish())
        assert torch.equal(part, whole[rows])
    back = ids.flip(1), factors.flip(1)  # the order of the slots does not matter
    assert torch.equal(fused.moe(x, experts.whole, *back, "silu", 50, Finish()), whole)


def test_rows_without_experts_and_calls_without_rows(generator: torch.Generator) -> None:
    experts, x = Experts("sym_int4", "gated", generator), torch.randn(2, 96, generator=generator)
    none, factors = torch.full((2, 3), -1, dtype=torch.int32), torch.ones(2, 3)
    residual = torch.randn(2, 50, generator=generator)
    assert torch.equal(fused.moe(x, experts.whole, none, factors, "silu", 50, Finish()), torch.zeros(2, 50))
    assert torch.equal(fused.moe(x, experts.whole, none, factors, "silu", 50, Finish(None, residual)), residual)
    empty = fused.moe(x[:0], experts.whole, none[:0], factors[:0], "silu", 50, Finish())
    assert empty.shape == (0, 50)
    packed = pack(quantize(torch.randn(20, 64, generator=generator), "sym_int4"))
    assert fused.linear_fused(Rows(torch.zeros(0, 64)), [(packed, 20, Finish())])[0].shape == (0, 20)
    nothing = pack(quantize(torch.zeros(20, 0), "sym_int4"))
    bias = torch.randn(20, generator=generator)
    got = fused.linear_fused(Rows(torch.zeros(3, 0), "rms"), [(nothing, 20, Finish(bias))])[0]
    assert torch.equal(got, bias.expand(3, 20))
