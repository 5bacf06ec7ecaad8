"""Fused products have the bits of their separate steps."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from fused_cases import (
    FORMATS,
    SLOW,
    Guarded,
    finished,
    isa_names,
    pack,
    product,
    steps_of,
    weights,
)
from native_kernels import threads

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.formats import quantize
from dist_lowbit.ops import elementwise as el
from dist_lowbit.ops import fused
from dist_lowbit.ops.fused import Expert, Finish, Rows

pytestmark = pytest.mark.usefixtures("library")

FP32, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


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


@pytest.mark.parametrize("kind", ["as is", "rms", "gelu", "silu, gated"])
def test_rows_are_finished_in_their_place(kind: str, library: ctypes.CDLL, generator: torch.Generator) -> None:
    rows = rows_of(kind, 4, 100, generator)
    finish = Finish(torch.randn(100, generator=generator), torch.randn(4, 100, generator=generator))
    want = finished(steps_of(rows), finish)
    out = fused._c_out(rows.x, finish)
    assert library.dlb_rows_apply(ctypes.byref(fused._c_rows(rows)), ctypes.byref(out)) == 0
    assert torch.equal(rows.x, want)


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
    twice = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(KernelError, match="out of its range"):
        fused.moe(x, experts, twice, torch.ones(2, 2), "silu", 20, finish)
    for call in (
        lambda: fused.linear_fused(Rows(x), [(packed, 1, finish)]),
        lambda: fused.moe(x, experts, ids, factors, "silu", 1, finish),
    ):
        with pytest.raises(UsageError, match="a product of 1 outputs was asked for; the weight has 20"):
            call()
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


@pytest.mark.parametrize("count", [7, 8, 9, 12])
def test_experts_of_many_group_sizes_are_taken_or_refused(count: int, generator: torch.Generator) -> None:
    """Rows are rounded once for each group size; more of them than there is room for are refused, not written."""
    k = 64
    experts = []
    for i in range(count):
        gate, up = (quantize(torch.randn(32, k, generator=generator), "sym_int4", 32 * (2 * i + j)) for j in (1, 2))
        down = quantize(torch.randn(k, 32, generator=generator), "sym_int4", 32)
        experts.append(Expert(pack(gate), pack(down), pack(up)))
    x, ids = torch.randn(1, k, generator=generator), torch.arange(count, dtype=torch.int32)[None]
    weights = torch.ones(1, count)
    if count <= 7:
        assert torch.isfinite(fused.moe(x, experts, ids, weights, "silu", k, Finish())).all()
    else:
        with pytest.raises(KernelError, match="out of its range"):
            fused.moe(x, experts, ids, weights, "silu", k, Finish())


@pytest.mark.parametrize("k", [33, 200])
def test_no_buffer_is_left(k: int, library: ctypes.CDLL, generator: torch.Generator) -> None:
    guard, n, m = Guarded(), 21, 5
    g = guard.copy
    matrices = [quantize(torch.randn(n, k, generator=generator), *f) for f in FORMATS]
    packed = [g(pack(weight)) for weight in matrices]
    w, b, x, up = (g(torch.randn(s, generator=generator)) for s in ((k,), (k,), (m, k), (m, k)))
    bias, residual = g(torch.randn(n, generator=generator)), g(torch.randn(m, n, generator=generator))
    inputs = [
        Rows(x), Rows(x, "rms", w), Rows(x, "layer", w, b), Rows(x, activation="gelu", up=up, keep=g(torch.empty(m, k)))
    ]  # fmt: skip
    experts = [
        Expert(g(pack(quantize(torch.randn(2 * n, k), "sym_int4"))), g(pack(quantize(torch.randn(n, n), "fp16"))))
    ]
    ids, factors = g(torch.zeros(m, 1, dtype=torch.int32)), g(torch.ones(m, 1))
    for isa in isa_names():
        ops.select_isa(isa)
        for dtype in (FP32, HALF, BFLOAT):
            y = [g(torch.empty(m, n, dtype=dtype)) for _ in packed]
            items = (fused.CLinearOut * len(packed))()
            for item, p, out in zip(items, packed, y, strict=True):
                item.packed, item.bytes, item.out = (
                    p.data_ptr(),
                    p.numel(),
                    fused._c_out(out, Finish(bias, residual, dtype)),
                )
            for rows in inputs:
                assert library.dlb_linear_fused(ctypes.byref(fused._c_rows(rows)), items, len(packed)) == 0
                applied = fused._c_out(g(torch.empty(m, k, dtype=dtype)), Finish(b, x, dtype))
                assert library.dlb_rows_apply(ctypes.byref(fused._c_rows(rows)), ctypes.byref(applied)) == 0
        fused.moe(x, experts, ids, factors, "silu", n, Finish(bias, residual))
        el.route(x, min(k, 8), True)
