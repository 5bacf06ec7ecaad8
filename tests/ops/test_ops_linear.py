"""The compiled Linear is the reference to the last bit: any M, ISA, number of threads, split of N, split of K."""

from __future__ import annotations

import ctypes

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError
from dist_lowbit.formats import FORMATS, PackedWeight, quantize
from dist_lowbit.ops import reference
from dist_lowbit.ops.codebooks import bad_codes, integer_table
from dist_lowbit.ops.library import start_pool
from dist_lowbit.ops.threads import ThreadPlan
from tests.bounds import exact_linear, linear_bound, read_weight

CODES = [name for name, row in FORMATS.items() if reference.exact_codes(row)]
ELEMENTS = [name for name in FORMATS if name not in CODES]
TOKENS = (1, 2, 3, 4, 5, 17, 33)
SHAPES = [  # (N, K)
    (33, 100),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((7, 1), (1, 32), (8, 64), (64, 256), (33, 576))),
]


def halves(k: int, block: int) -> tuple[int, ...]:
    """Return the segment ends of the upper half of a K twice as long: four slots empty."""
    units = -(-k // block)
    ends = [min(k, i * units // 4 * block) for i in range(5)]
    return (0, 0, 0, 0, *ends)


def activations(m: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Return rows of very different sizes, with a row of zeros and one below the least block maximum."""
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 6, m)[:, None]
    x[m // 2] = 0
    x[m // 3] = 1e-31
    return x


def run(kernel: ops.Kernel, x: torch.Tensor, opaque: torch.Tensor, n: int) -> torch.Tensor:
    out = torch.full((x.shape[0], n), 7.0)
    kernel.run(x, opaque, out)
    return out


def isa_names() -> list[str]:
    return [name for name, supported, _ in ops.isas() if supported]


@pytest.mark.parametrize("format", ["sym_int4", "asym_int5", "nf3", "fp8_e4m3", "bf16"])
def test_threads_that_share_a_product_change_no_bit(
    format: str, library: ctypes.CDLL, generator: torch.Generator
) -> None:
    """One large enough to be cut into several tasks, on every ISA."""
    n, k = 600, 1056
    x = activations(24, k, generator)
    weight = quantize(torch.randn(n, k, generator=generator), format)
    spec = ops.LinearSpec.of(weight)
    kernel = ops.choose(spec)
    opaque = kernel.prepack(weight, spec)
    assert opaque.numel() > 2 * (128 << 10)  # linear.cpp hands out weights in pieces of this size
    for isa in isa_names():
        ops.select_isa(isa)
        for m in (1, 24):
            found = []
            for threads in (1, 2, 3):
                start_pool(library, ThreadPlan(threads, ()))
                found.append(run(kernel, x[:m], opaque, n))
            assert all(torch.equal(one, found[0]) for one in found), f"{isa}, M={m}"


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_for_every_isa_thread_and_m(
    format: str, shape: tuple[int, int], library: ctypes.CDLL, generator: torch.Generator
) -> None:
    n, k = shape
    x = activations(max(TOKENS), k, generator)
    for group_size in (32, 64, -1):
        weight = quantize(torch.randn(n, k, generator=generator), format, group_size)
        for cuts in (ops.whole_cuts(k, weight.block), halves(k, weight.block)):
            spec = ops.LinearSpec.of(weight, cuts)
            kernel = ops.choose(spec)
            assert kernel.name == "cpu"
            opaque = kernel.prepack(weight, spec)
            want = reference.linear(x, weight, cuts, "int8")
            for threads in (1, 2):
                start_pool(library, ThreadPlan(threads, ()))
                for isa in isa_names():
                    ops.select_isa(isa)
                    for m in TOKENS:
                        got = run(kernel, x[:m], opaque, n)
                        assert torch.equal(got, want[:m]), f"{isa}, {threads} threads, M={m}, {group_size}, {cuts}"


@pytest.mark.parametrize("format", [name for name in CODES if FORMATS[name].bits in (4, 8)])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_the_sums_of_the_largest_block_fit_int32(format: str, end: float, library: ctypes.CDLL) -> None:
    k = 32768
    weight = torch.full((17, k), end)
    weight[:, 0] = -1.2 * end  # so that all other codes are at one end, or next to it
    odd = (torch.arange(k) // 4) % 2 == 1  # quads of x that meet the upper halves of bytes
    x = torch.stack([torch.ones(k), -torch.ones(k), torch.where(odd, 1.0, -1.0)])
    packed = quantize(weight, format, k)
    spec = ops.LinearSpec.of(packed)
    kernel = ops.choose(spec)
    opaque = kernel.prepack(packed, spec)
    want = reference.linear(x, packed, spec.cuts, "int8")
    for isa in isa_names():
        ops.select_isa(isa)
        for m in (1, 2, 3):
            assert torch.equal(run(kernel, x[:m], opaque, 17), want[:m]), f"{isa}, M={m}"


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(
    "shape", [(7, 1), (8, 64), (33, 100), (64, 576), (3, 0), (0, 64)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_unpack_undoes_prepack(
    format: str, shape: tuple[int, int], group_size: int, generator: torch.Generator, library: ctypes.CDLL
) -> None:
    weight = quantize(torch.randn(shape, generator=generator), format, group_size)
    spec = ops.LinearSpec.of(weight)
    for kernel in ops.KERNELS:
        if kernel.why_not(spec) is None:
            back = kernel.unpack(kernel.prepack(weight, spec), spec)
            assert (back.format, back.shape, back.group_size) == (weight.format, weight.shape, weight.group_size)
            for name, tensor in weight.tensors().items():
                assert torch.equal(back.tensors()[name], tensor), f"{kernel.name} changed {name}"


@pytest.mark.parametrize("format", CODES)
def test_a_split_of_n_changes_nothing_in_any_isa(format: str, generator: torch.Generator, library: ctypes.CDLL) -> None:
    weight = quantize(torch.randn(50, 192, generator=generator), format)
    x = torch.randn(6, 192, generator=generator)
    for isa in isa_names():
        ops.select_isa(isa)
        whole = apply(weight, x)
        parts = [apply(weight.split(0, a, b), x) for a, b in ((0, 7), (7, 32), (32, 32), (32, 50))]
        assert torch.equal(torch.cat(parts, dim=1), whole), isa


def apply(
    weight: PackedWeight, x: torch.Tensor, cuts: tuple[int, ...] | None = None, compute: str = "int8"
) -> torch.Tensor:
    spec = ops.LinearSpec.of(weight, cuts, compute)
    kernel = ops.choose(spec)
    return ops.linear(x, kernel.prepack(weight, spec), kernel.name, spec.n)


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("k", [64, 576, 1000])
def test_the_tree_over_ranks_gives_the_whole_in_every_isa(
    format: str, k: int, generator: torch.Generator, library: ctypes.CDLL
) -> None:
    weight = quantize(torch.randn(20, k, generator=generator), format)
    x = torch.randn(5, k, generator=generator)
    cuts = ops.whole_cuts(k, weight.block)
    whole = apply(weight, x)
    for tp in (2, 4, 8):
        ranks = []
        for rank in range(tp):
            start, stop = cuts[rank * 8 // tp], cuts[(rank + 1) * 8 // tp]
            mine = tuple(min(max(cut, start), stop) - start for cut in cuts)
            part = weight.split(1, start, stop)
            spec = ops.LinearSpec.of(part, mine)
            ranks.append((x[:, start:stop].contiguous(), ops.choose(spec).prepack(part, spec)))
        for isa in isa_names():
            ops.select_isa(isa)
            sums = [run(ops.kernel("cpu"), part, opaque, 20) for part, opaque in ranks]
            while len(sums) > 1:
                sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
            assert torch.equal(sums[0], whole), f"tp={tp}, {isa}"


@pytest.mark.parametrize("format", FORMATS)
def test_fp32_activations_give_the_same_bits_for_every_isa_m_thread_and_split(
    format: str, library: ctypes.CDLL, generator: torch.Generator
) -> None:
    n, k = 33, 604  # K ends within a chunk of 32 and within four elements
    x = activations(7, k, generator)
    for group_size in (32, -1):
        weight = quantize(torch.randn(n, k, generator=generator), format, group_size)
        cuts = ops.whole_cuts(k, weight.block)
        spec = ops.LinearSpec.of(weight, cuts, compute="fp32")
        kernel = ops.choose(spec)
        assert kernel.name == "cpu"
        opaque = kernel.prepack(weight, spec)
        ops.select_isa("scalar")
        want = run(kernel, x, opaque, n)
        for threads in (1, 2):
            start_pool(library, ThreadPlan(threads, ()))
            for isa in isa_names():
                ops.select_isa(isa)
                for m in (1, 2, 3, 6, 7):
                    assert torch.equal(run(kernel, x[:m], opaque, n), want[:m]), f"{isa}, {threads} threads, M={m}"
                rows = [apply(weight.split(0, a, b), x, cuts, "fp32") for a, b in ((0, 7), (7, 32), (32, 33))]
                assert torch.equal(torch.cat(rows, dim=1), want), isa
                parts = []
                for start, stop in ((0, cuts[4]), (cuts[4], k)):
                    mine = tuple(min(max(cut, start), stop) - start for cut in cuts)
                    parts.append(apply(weight.split(1, start, stop), x[:, start:stop], mine, "fp32"))
                assert torch.equal(parts[0] + parts[1], want), isa


@pytest.mark.parametrize("group_size", [64, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 128, -1))])
@pytest.mark.parametrize("format", CODES)
def test_int8_activations_add_at_most_a_percent_to_a_random_row(
    format: str, group_size: int, generator: torch.Generator, library: ctypes.CDLL
) -> None:
    # docs/numerics.md (b): expected at most 0.83% for blocks of up to 128; what reading a codebook as integers adds is
    # independent of it, and the whole stays below a percent.
    weight = quantize(torch.randn(48, 2048, generator=generator), format, group_size)
    x = torch.randn(4, 2048, generator=generator)
    got, exact = apply(weight, x).double(), exact_linear(x, weight)
    read = x.double() @ read_weight(weight).T
    assert ((got - read).norm(dim=1) <= 0.0083 * read.norm(dim=1)).all()
    assert ((got - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_makes_its_row_nan_and_no_other(
    bad: float, library: ctypes.CDLL, generator: torch.Generator
) -> None:
    weight = quantize(torch.randn(20, 200, generator=generator), "asym_int4")
    x = torch.randn(9, 200, generator=generator)
    good = apply(weight, x)
    x[4, 199] = bad
    for isa in isa_names():
        ops.select_isa(isa)
        y = apply(weight, x)
        assert torch.isnan(y[4]).all()
        rest = [i for i in range(9) if i != 4]
        assert torch.equal(y[rest], good[rest])
    assert torch.isnan(reference.linear(x, weight, ops.whole_cuts(200, 64), "int8")[4]).all()


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("group_size", [32, -1])
def test_result_is_within_the_derived_bound(
    format: str, compute: str, group_size: int, generator: torch.Generator, library: ctypes.CDLL
) -> None:
    weight = quantize(torch.randn(24, 300, generator=generator), format, group_size)
    x = torch.randn(7, 300, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    spec = ops.LinearSpec.of(weight, compute=compute)
    bound = linear_bound(x, weight, compute)
    for isa in isa_names():
        ops.select_isa(isa)
        for kernel in ops.KERNELS:
            if kernel.why_not(spec) is None:
                y = run(kernel, x, kernel.prepack(weight, spec), 24)
                assert ((y.double() - exact_linear(x, weight)).abs() <= bound).all(), f"{kernel.name} {isa}"


def test_a_table_holds_what_its_codebook_says() -> None:
    for row in FORMATS.values():
        table = integer_table(row)
        if table is None:
            continue
        largest, top = max(map(abs, row.codebook)), max(map(abs, table[0]))
        assert 1 <= top <= 127
        for integer, value in zip(table[0], row.codebook, strict=True):
            # Half a step of 1 / top, and the multiplier's own rounding.
            assert abs(integer * table[1] - value) <= largest * (0.5 / top + 2.0**-24)
    assert integer_table(FORMATS["fp4"]) == (tuple(int(v * 16) for v in FORMATS["fp4"].codebook), 1 / 16)


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_every_code_of_a_float_element_is_read_exactly(format: str, library: ctypes.CDLL) -> None:
    row = FORMATS[format]
    finite = [code for code in range(256) if code not in bad_codes(row)]
    codes = torch.tensor(finite, dtype=torch.uint8)[:, None]
    tensors = {"plane0": codes, "scale": torch.ones(len(finite), 1, dtype=torch.float16)}
    weight = PackedWeight.from_tensors(row, (len(finite), 1), -1, tensors)
    for isa in isa_names():
        ops.select_isa(isa)
        assert torch.equal(apply(weight, torch.ones(1, 1))[0], torch.tensor([row.codebook[code] for code in finite]))
    broken = PackedWeight.from_tensors(row, (1, 1), -1, {
        "plane0": torch.tensor([[bad_codes(row)[0]]], dtype=torch.uint8), "scale": torch.ones(1, 1, dtype=torch.float16)
    })  # fmt: skip
    with pytest.raises(KernelError, match="NaN or infinity"):
        apply(broken, torch.ones(1, 1))


def test_activations_below_the_least_maximum_count_as_zero(library: ctypes.CDLL) -> None:
    weight = quantize(torch.ones(3, 64), "sym_int8")
    x = torch.full((1, 64), 0.99e-30)
    assert torch.equal(apply(weight, x), torch.zeros(1, 3))
    assert (apply(weight, x * 1.02) > 0).all()


def test_flush_to_zero_of_the_caller_changes_nothing(library: ctypes.CDLL) -> None:
    weight = quantize(torch.full((3, 64), 1e-5), "sym_int4")  # scales are subnormal in fp16
    x = torch.full((1, 64), 1e-29)
    want = apply(weight, x)
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(apply(weight, x), want)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_float_and_any_leading_shape(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = quantize(torch.randn(5, 70, generator=generator), "sym_int4")
    x = torch.randn(2, 3, 70, generator=generator).to(dtype)
    y = apply(weight, x)
    assert y.shape == (2, 3, 5)
    assert y.dtype == torch.float32
    assert torch.equal(y[1, 2], apply(weight, x[1, 2].float()))
    strided = torch.empty(2, 3, 140, dtype=dtype)[..., ::2].copy_(x)
    assert torch.equal(apply(weight, strided), y)
    assert apply(weight, x[:0]).shape == (0, 3, 5)


def test_empty_dimensions(library: ctypes.CDLL) -> None:
    assert torch.equal(apply(quantize(torch.zeros(4, 0), "sym_int4"), torch.zeros(3, 0)), torch.zeros(3, 4))
    assert apply(quantize(torch.zeros(0, 64), "sym_int4"), torch.zeros(3, 64)).shape == (3, 0)


def test_tracing_and_export_see_the_operator(generator: torch.Generator) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = quantize(torch.randn(6, 64, generator=generator), "sym_int4")
            spec = ops.LinearSpec.of(weight)
            self.kernel = ops.choose(spec)
            self.register_buffer("packed", self.kernel.prepack(weight, spec))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.linear(x, self.packed, self.kernel.name, 6)

    layer = Layer()
    one, other = torch.randn(2, 64, generator=generator), torch.randn(2, 64, generator=generator)
    traced = torch.jit.trace(layer, (one,))
    exported = torch.export.export(layer, (one,)).module()
    assert torch.equal(traced(other), layer(other))
    assert torch.equal(exported(other), layer(other))
