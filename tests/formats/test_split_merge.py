"""Sharding is arithmetic: cutting anywhere legal and merging gives the same bits, and an illegal cut is a sentence."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lowbit.core.errors import FormatError
from dist_lowbit.formats import FORMATS, Format, PackedWeight, Part, dequantize, merge, quantize
from dist_lowbit.formats.packed import grain, part_layout

ROWS = list(FORMATS.values())


def ids(row: object) -> str | None:
    return row.name if isinstance(row, Format) else None


def random_weight(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int, int, list[float], int]:
    n, k = draw(st.integers(0, 12)), draw(st.integers(0, 300))
    group = draw(st.sampled_from([32, 64, 96, 128, -1]))
    places = sorted(draw(st.lists(st.floats(0, 1), max_size=5)))
    return n, k, group, draw(st.integers(0, 1)), places, draw(st.integers(0, 1 << 30))


@pytest.mark.parametrize("row", ROWS, ids=ids)
@settings(max_examples=25, deadline=None)
@given(case=cuts())
def test_merge_of_split_is_the_identity(row: Format, case: tuple[int, int, int, int, list[float], int]) -> None:
    n, k, group, axis, places, seed = case
    w = random_weight(n, k, seed)
    weight = quantize(w, row, group)
    size, step = (n, k)[axis], grain(row, weight.group_size, axis)
    # Any multiple of the grain, or the end; equal edges make empty shards, and a rank with no unit is legal.
    edges = [0, *(min(round(place * (size / step)) * step, size) for place in places), size]
    shards = [weight.split(axis, a, b) for a, b in itertools.pairwise(edges)]
    assert merge(shards, axis).equal(weight)
    values = dequantize(weight)
    for a, b, shard in zip(edges, edges[1:], shards, strict=False):
        part = slice(a, b)
        assert torch.equal(dequantize(shard), values[part] if axis == 0 else values[:, part])
        if axis == 0:  # groups lie along K, so rows quantize by themselves
            assert shard.equal(quantize(w[part], row, group))


@pytest.mark.parametrize("row", [row for row in ROWS if row.grouped], ids=ids)
def test_a_cut_between_groups_commutes_with_quantizing(row: Format) -> None:
    w = random_weight(5, 160, 3)
    weight = quantize(w, row, 32)
    for a, b in ((0, 32), (32, 128), (128, 160), (0, 160)):
        assert weight.split(1, a, b).equal(quantize(w[:, a:b], row, 32))


@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_split_of_a_split_is_a_split(row: Format, group: int) -> None:
    weight = quantize(random_weight(8, 256, 4), row, group)
    assert weight.split(1, 64, 256).split(1, 64, 192).equal(weight.split(1, 128, 256))
    assert weight.split(0, 2, 8).split(1, 0, 64).equal(weight.split(1, 0, 64).split(0, 2, 8))


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_the_grain_is_the_smallest_legal_step(row: Format) -> None:
    # Along N every row stands alone; along K the group, or without groups what fills whole bytes of every plane.
    for group in (64, -1):
        weight = quantize(random_weight(4, 256, 5), row, group)
        assert grain(row, weight.group_size, 0) == 1
        want = 64 if weight.group_size == 64 else max((8 // bits for bits in row.planes), default=1)
        assert grain(row, weight.group_size, 1) == want
        for a in range(1, 130):
            if a % want == 0:
                assert weight.split(1, 0, a).shape == (4, a)
            else:
                with pytest.raises(FormatError):
                    weight.split(1, 0, a)


@pytest.mark.parametrize(("axis", "start", "stop"), [(1, 1, 64), (1, 64, 100), (1, 0, 129), (1, -64, 64), (1, 64, 0)])
def test_an_illegal_cut_along_k_is_a_sentence(axis: int, start: int, stop: int) -> None:
    weight = quantize(torch.zeros(4, 128), "sym_int4")
    want = rf"cannot cut K = 128 of a sym_int4 weight at \[{start}, {stop}\); expected multiples of 64 or the end"
    with pytest.raises(FormatError, match=want):
        weight.split(axis, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (-1, 2), (3, 2)])
def test_an_illegal_cut_along_n_is_a_sentence(start: int, stop: int) -> None:
    weight = quantize(torch.zeros(4, 128), "nf3")
    with pytest.raises(FormatError, match=r"cannot cut N = 4 of a nf3 weight at \["):
        weight.split(0, start, stop)


def test_the_end_is_a_legal_edge_wherever_it_lies() -> None:
    weight = quantize(random_weight(3, 101, 6), "sym_int5", 64)
    assert weight.split(1, 64, 101).shape == (3, 37)
    assert weight.split(1, 101, 101).shape == (3, 0)
    with pytest.raises(FormatError):
        weight.split(1, 64, 100)


@pytest.mark.parametrize("row", [row for row in ROWS if row.grouped], ids=ids)
def test_a_part_constant_along_k_is_copied_and_must_agree(row: Format) -> None:
    weight = quantize(random_weight(3, 128, 7), row, -1)
    left, right = weight.split(1, 0, 64), weight.split(1, 64, 128)
    scale = weight.parts["scale"].tensor
    for shard in (left, right):
        assert torch.equal(shard.parts["scale"].tensor, scale)
        assert shard.parts["scale"].unit == (1, 0)
    right.parts["scale"].tensor[1] += 1
    with pytest.raises(FormatError, match="cannot merge: part scale, constant along K, differs between shards"):
        merge([left, right], 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group", [64, -1])
def test_a_shard_keeps_nothing_of_the_whole_alive(axis: int, group: int) -> None:
    weight = quantize(random_weight(64, 128, 8), "asym_int5", group)
    alive = [weakref.ref(part.tensor.untyped_storage()) for part in weight.parts.values()]
    pointers = {part.tensor.data_ptr() for part in weight.parts.values()}
    shard = weight.split(axis, 0, 64)
    for part in shard.parts.values():
        assert part.tensor.is_contiguous()
        assert part.tensor.data_ptr() not in pointers
        assert part.tensor.untyped_storage().nbytes() == part.tensor.nbytes
    del weight
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_merging_what_does_not_fit_is_a_sentence() -> None:
    a = quantize(torch.zeros(2, 64), "sym_int4", 64)
    with pytest.raises(FormatError, match=r"cannot merge a sym_int8 weight \(2, 64\) .* with a sym_int4 weight"):
        merge([a, quantize(torch.zeros(2, 64), "sym_int8", 64)], 0)
    with pytest.raises(FormatError, match="of group size 32 with"):
        merge([a, quantize(torch.zeros(2, 64), "sym_int4", 32)], 0)
    with pytest.raises(FormatError, match=r"weight \(3, 64\)"):
        merge([a, quantize(torch.zeros(3, 64), "sym_int4", 64)], 1)
    with pytest.raises(FormatError, match="cannot merge no weights"):
        merge([], 0)
    short = quantize(torch.zeros(2, 70), "sym_int4", 64)
    with pytest.raises(FormatError, match="cannot merge at K = 70; expected a multiple of 64"):
        merge([short, a], 1)
    assert merge([a, short], 1).shape == (2, 134)


def broken(weight: PackedWeight, name: str, part: Part | None) -> PackedWeight:
    parts = {**weight.parts, name: part} if part else {k: v for k, v in weight.parts.items() if k != name}
    return PackedWeight(weight.format, weight.shape, weight.group_size, parts)


def test_a_weight_checks_its_parts() -> None:
    weight = quantize(random_weight(4, 128, 9), "asym_int5", 64)
    with pytest.raises(
        FormatError, match=r"part plane1 of a asym_int5 weight \(4, 128\) is missing; expected torch\.u"
    ):
        broken(weight, "plane1", None)
    scale = weight.parts["scale"]
    with pytest.raises(FormatError, match=r"part scale .* is torch\.float32 .* expected torch\.float16 \(4, 2\)"):
        broken(weight, "scale", Part(scale.tensor.float(), scale.unit))
    with pytest.raises(FormatError, match=r"part scale .* is torch\.float16 \(4, 1\)"):
        broken(weight, "scale", Part(scale.tensor[:, :1], scale.unit))
    with pytest.raises(FormatError, match=r"of unit \(1, 32\); expected .* of unit \(1, 64\)"):
        broken(weight, "scale", Part(scale.tensor, (1, 32)))
    with pytest.raises(FormatError, match="has no part named zero_point; expected plane0, plane1, scale, min"):
        broken(weight, "zero_point", scale)
    with pytest.raises(FormatError, match="expected a multiple of 32"):
        PackedWeight(weight.format, weight.shape, 0, weight.parts)
    values = quantize(torch.zeros(2, 2), "bf16")
    with pytest.raises(FormatError, match="a bf16 weight has no groups; its group_size is 64, expected -1"):
        PackedWeight(values.format, values.shape, 64, values.parts)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_weight_is_rebuilt_from_its_tensors(row: Format) -> None:
    weight = quantize(random_weight(3, 100, 10), row)
    again = PackedWeight.from_tensors(row, weight.shape, weight.group_size, weight.tensors())
    assert again.equal(weight)
    assert list(weight.parts) == list(part_layout(row, weight.shape, weight.group_size))
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    assert weight.block == (64 if weight.group_size == -1 else weight.group_size)


def test_equal_compares_every_bit() -> None:
    weight = quantize(random_weight(3, 64, 11), "asym_int4")
    for name, part in weight.parts.items():
        other = weight.split(0, 0, 3)
        assert other.equal(weight)
        other.parts[name].tensor.view(torch.uint8)[-1, -1] ^= 1
        assert not other.equal(weight), name
        assert torch.equal(part.tensor, weight.parts[name].tensor)
    assert not weight.equal(weight.split(0, 0, 2))
    assert not weight.equal(quantize(random_weight(3, 64, 11), "sym_int4"))
