"""Fused products have the bits of their separate steps; experts those of the definition, whatever the degree."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from native_kernels import threads

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.formats import PackedWeight, quantize
from dist_lowbit.formats.packed import merge
from dist_lowbit.ops import elementwise as el
from dist_lowbit.ops import fused
from dist_lowbit.ops.fused import Expert, Finish, Rows
from dist_lowbit.ops.reference import Segments

pytestmark = pytest.mark.usefixtures("library")

FORMATS = [("sym_int4", 64), ("asym_int4", 32), ("sym_int8", -1), ("nf4", 64), ("fp16", -1), ("fp8_e4m3", 64)]
FP32, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def isa_names() -> list[str]:
    return [name for name, supported, _ in ops.isas() if supported]


def pack(weight: PackedWeight, cuts: tuple[int, ...] | None = None, compute: str = "int8") -> torch.Tensor:
    spec = ops.LinearSpec.of(weight, cuts, compute)
    return ops.choose(spec).prepack(weight, spec)


def product(x: torch.Tensor, packed: torch.Tensor, n: int) -> torch.Tensor:
    return ops.linear(x, packed, "cpu", n)


def weights(n: int, k: int, generator: torch.Generator) -> list[PackedWeight]:
    return [quantize(torch.randn(n + i, k, generator=generator), *f) for i, f in enumerate(FORMATS)]


def steps_of(rows: Rows) -> torch.Tensor:
    if rows.norm == "rms":
        return el.rms_norm(rows.x, rows.weight, rows.eps, rows.offset)
    if rows.norm == "layer":
        return el.layer_norm(rows.x, rows.weight, rows.bias, rows.eps, rows.offset)
    if rows.up is not None:
        return el.gated(rows.x, rows.up, rows.activation)
    return el.activation(rows.x, rows.activation) if rows.activation else rows.x


def finished(y: torch.Tensor, finish: Finish) -> torch.Tensor:
    y = y if finish.bias is None else y + finish.bias
    y = y if finish.residual is None else y + finish.residual
    return y.to(finish.dtype)


def rows_of(kind: str, m: int, k: int, generator: torch.Generator) -> Rows:
    both = torch.randn(m, 2 * k, generator=generator)  # gate and up, two halves of one buffer
    x, w, b = both[:, :k], torch.randn(k, generator=generator), torch.randn(k, generator=generator)
    return {
        "as is": Rows(x),
        "rms": Rows(x, "rms", w, eps=1e-6),
        "rms, offset": Rows(x, "rms", w, eps=1e-6, offset=1.0, keep=torch.empty(m, k)),
        "layer": Rows(x, "layer", w, b, eps=1e-5),
        "layer, plain": Rows(x, "layer", eps=1e-5),
        "gelu": Rows(x, activation="gelu"),
        "silu, gated": Rows(x, activation="silu", up=both[:, k:]),
        "gelu_tanh, gated": Rows(x, activation="gelu_tanh", up=both[:, k:], keep=torch.empty(m, k)),
    }[kind]


KINDS = ["as is", "rms", "rms, offset", "layer", "layer, plain", "gelu", "silu, gated", "gelu_tanh, gated"]


def finishes(m: int, n: int, generator: torch.Generator) -> list[Finish]:
    def bias(i: int) -> torch.Tensor:
        return torch.randn(n + i, generator=generator)

    def residual(i: int) -> torch.Tensor:
        return torch.randn(m, n + i + 3, generator=generator)[:, : n + i]

    return [
        Finish(), Finish(bias(1)), Finish(bias(2), residual(2)), Finish(None, residual(3), HALF),
        Finish(bias(4), residual(4), BFLOAT), Finish(None, None, BFLOAT),
    ]  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "k"), [(5, 33), pytest.param(1, 200, marks=SLOW), pytest.param(40, 200, marks=SLOW), (2, 4500)]
)
def test_a_fused_call_has_the_bits_of_its_steps(m: int, k: int, kind: str, generator: torch.Generator) -> None:
    n = 37 if k < 4096 else 3
    packed = [pack(weight) for weight in weights(n, k, generator)]
    rows, finish = rows_of(kind, m, k, generator), finishes(m, n, generator)
    for isa in isa_names():
        ops.select_isa(isa)
        made = steps_of(rows)
        want = [finished(product(made, p, n + i), f) for i, (p, f) in enumerate(zip(packed, finish, strict=True))]
        for count in (1, 2):
            with threads(count):
                got = fused.linear_fused(
                    rows, [(p, n + i, f) for i, (p, f) in enumerate(zip(packed, finish, strict=True))]
                )
                for one, other in zip(got, want, strict=True):
                    assert one.dtype == other.dtype
                    assert torch.equal(one, other), f"{isa}, {count} threads"
                if rows.keep is not None:
                    assert torch.equal(rows.keep, made)
                if k == 33:
                    last = Finish(torch.ones(k), rows.x, HALF)
                    assert torch.equal(fused.rows_apply(rows, last), finished(made, last))


def test_codes_with_fp32_activations_are_fused_too(generator: torch.Generator) -> None:
    rows = rows_of("rms", 6, 200, generator)
    packed = [pack(quantize(torch.randn(20, 200, generator=generator), f), compute="fp32") for f in ("sym_int4", "nf4")]
    finish = Finish(torch.randn(20, generator=generator), None, HALF)
    for isa in isa_names():
        ops.select_isa(isa)
        got = fused.linear_fused(rows, [(p, 20, finish) for p in packed])
        for one, p in zip(got, packed, strict=True):
            assert torch.equal(one, finished(product(steps_of(rows), p, 20), finish))


@pytest.mark.parametrize("format", ["sym_int4", "fp16"])
def test_the_slices_of_a_long_prefill_change_nothing(format: str, generator: torch.Generator) -> None:
    m, k = 2200, 4096  # two slices of 8 MiB and more
    x, w = torch.randn(m, k, generator=generator), torch.randn(k, generator=generator)
    packed = pack(quantize(torch.randn(16, k, generator=generator), format))
    whole = fused.linear_fused(Rows(x, "rms", w, eps=1e-6), [(packed, 16, Finish())])[0]
    parts = [fused.linear_fused(Rows(p, "rms", w, eps=1e-6), [(packed, 16, Finish())])[0] for p in x.split(900)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(product(x, packed, 16), torch.cat([product(p, packed, 16) for p in x.split(900)]))


def test_a_residual_may_be_where_the_result_goes(library: ctypes.CDLL, generator: torch.Generator) -> None:
    x, stream = torch.randn(3, 64, generator=generator), torch.randn(3, 40, generator=generator)
    packed = pack(quantize(torch.randn(40, 64, generator=generator), "sym_int4"))
    want = product(x, packed, 40) + stream
    item = fused.CLinearOut(packed=packed.data_ptr(), bytes=packed.numel())
    item.out = fused._c_out(stream, Finish(residual=stream))
    assert library.dlb_linear_fused(ctypes.byref(fused._c_rows(Rows(x))), ctypes.byref(item), 1) == 0
    assert torch.equal(stream, want)
    rows = Rows(x, "rms", keep=x, eps=1e-6)  # and the finished rows where the rows were
    want = el.rms_norm(x, None, 1e-6)
    fused.linear_fused(rows, [(packed, 40, Finish())])
    assert torch.equal(x, want)


def segments_of(x: torch.Tensor, weight: PackedWeight, cuts: tuple[int, ...]) -> Segments:
    """Return the segments of a product as products of their own, by the same kernel: the definition, for any ISA."""
    parts: Segments = []
    for start, stop in pairwise(cuts):
        alone = (0, *[stop - start] * 8)
        piece = None if start == stop else pack(weight.split(1, start, stop), alone)
        parts.append(None if piece is None else product(x[:, start:stop].contiguous(), piece, weight.shape[0]))
    return parts


def cuts_of(weight: PackedWeight) -> tuple[int, ...]:
    return ops.whole_cuts(weight.shape[1], weight.block)


def rank_cuts(cuts: tuple[int, ...], rank: int, tp: int) -> tuple[int, int, tuple[int, ...]]:
    start, stop = cuts[rank * 8 // tp], cuts[(rank + 1) * 8 // tp]
    return start, stop, tuple(min(max(cut, start), stop) - start for cut in cuts)


def rank_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


@pytest.mark.parametrize("format", ["sym_int4", pytest.param("asym_int4", marks=SLOW), "fp16"])
@pytest.mark.parametrize("m", [1, pytest.param(7, marks=SLOW), 70])
def test_a_sum_of_products_is_formed_inside_the_segments(format: str, m: int, generator: torch.Generator) -> None:
    n, sizes = 21, (160, 576, 2000)
    matrices = [quantize(torch.randn(n, k, generator=generator), format, 32) for k in sizes]
    inputs = [torch.randn(m, k, generator=generator) for k in sizes]
    ids, ones = torch.arange(3, dtype=torch.int32).expand(m, 3), torch.ones(m, 3)
    finish = Finish(torch.randn(n, generator=generator), torch.randn(m, n, generator=generator), BFLOAT)
    for isa in isa_names():
        ops.select_isa(isa)
        products = [segments_of(x, w, cuts_of(w)) for x, w in zip(inputs, matrices, strict=True)]
        want = fused.moe_tree(products, ids, ones)
        terms = [(Rows(x), pack(w)) for x, w in zip(inputs, matrices, strict=True)]
        assert torch.equal(fused.linear_sum(terms, n, Finish()), want), isa
        assert torch.equal(fused.linear_sum(terms, n, finish), finished(want, finish)), isa
    for tp in (2, 4, 8):
        parts = []
        for rank in range(tp):
            mine = []
            for x, w in zip(inputs, matrices, strict=True):
                start, stop, cuts = rank_cuts(cuts_of(w), rank, tp)
                mine.append((Rows(x[:, start:stop]), pack(w.split(1, start, stop), cuts)))
            parts.append(fused.linear_sum(mine, n, Finish()))
        assert torch.equal(rank_tree(parts), want), tp


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
            finish = Finish(None, torch.randn(m, 50, generator=generator), HALF)
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


def test_what_does_not_fit_is_refused(generator: torch.Generator) -> None:
    packed = pack(quantize(torch.randn(20, 64, generator=generator), "sym_int4"))
    x, finish = torch.zeros(2, 64), Finish()
    experts = [Expert(packed, packed)]
    ids, factors = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(UsageError, match="do not fit together"):
        fused.linear_fused(Rows(torch.zeros(2, 65)), [(packed, 20, finish)])
    with pytest.raises(UsageError, match="do not fit together"):
        fused.moe(x, experts, ids, factors, "silu", 20, finish)
    with pytest.raises(KernelError, match="out of its range"):
        fused.moe(x, experts, ids + 1, factors, "silu", 20, finish)
    with pytest.raises(UsageError, match="expected int32"):
        fused.moe(x, experts, ids.long(), factors, "silu", 20, finish)
    with pytest.raises(KernelError, match="no prepacked weight"):
        fused.linear_fused(Rows(x), [(packed[:-1], 20, finish)])
    with pytest.raises(UsageError, match="expected float32"):
        fused.linear_fused(Rows(x.double()), [(packed, 20, finish)])
    with pytest.raises(UsageError, match="contiguous last axis"):
        fused.linear_fused(Rows(torch.zeros(64, 2).T), [(packed, 20, finish)])
    with pytest.raises(UsageError, match="no activation 'swish'"):
        fused.linear_fused(Rows(x, activation="swish"), [(packed, 20, finish)])
    with pytest.raises(UsageError, match="expected one of them"):
        fused.rows_apply(Rows(x, "rms", activation="silu"), finish)
    with pytest.raises(UsageError, match=r"results of torch\.float64"):
        fused.rows_apply(Rows(x), replace(finish, dtype=torch.float64))
