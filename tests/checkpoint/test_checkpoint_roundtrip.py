"""load ∘ save is the identity, at every tp on either side, for every format."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoint_saving import even_cuts, random_weight, same, same_bits, save, weight_cuts, write_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dist_lowbit.checkpoint import (
    CheckpointReader,
    ShardWriter,
    TensorEntry,
    WeightEntry,
    commit,
    describe,
    is_checkpoint,
    shard_names,
    verify,
)
from dist_lowbit.checkpoint.container import DTYPES
from dist_lowbit.core.errors import CheckpointError, FormatError
from dist_lowbit.formats import FORMATS, PackedWeight, merge
from dist_lowbit.formats.packed import grain

N, K = 7, 230  # divides nothing: the last group is short, the last bytes are half full


def uneven(weight: PackedWeight, axis: int, tp: int) -> list[tuple[int, int]]:
    """All but the last rank get one unit at most."""
    size, step = weight.shape[axis], grain(weight.format, weight.group_size, axis)
    edges = [min(size, i * step) for i in range(tp)] + [size]
    return list(pairwise(edges))


@pytest.mark.parametrize(("tp", "cuts"), [*((tp, weight_cuts) for tp in (1, 2, 3, 4)), (3, uneven)])
@pytest.mark.parametrize("format", FORMATS)
def test_any_tp_to_any_tp(tmp_path: Path, format: str, tp: int, cuts) -> None:
    groups = [-1] if not FORMATS[format].grouped else [32, 64, -1]
    weights = {}
    for group in groups:
        weights[f"col{group}"] = (random_weight(format, (N, K), group, 1), 0)
        weights[f"row{group}"] = (random_weight(format, (N, K), group, 2), 1)
        weights[f"whole{group}"] = (random_weight(format, (N, K), group, 3), None)
    save(tmp_path, tp, weights, cuts=cuts)
    with CheckpointReader(tmp_path) as reader:
        assert reader.tp == tp
        for name, (weight, _) in weights.items():
            assert same(reader.read_weight(name), weight)
            for axis in (0, 1):
                for other in (1, 2, 3, 4):
                    ranges = weight_cuts(weight, axis, other)
                    parts = [reader.read_weight(name, axis, [r]) for r in ranges]
                    for part, (start, stop) in zip(parts, ranges, strict=True):
                        assert same(part, weight.split(axis, start, stop))
                    assert same(merge(parts, axis), weight)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_fused_ranges_are_joined_in_order(tmp_path: Path, format: str, axis: int) -> None:
    weight = random_weight(format, (256, 256), 32 if FORMATS[format].grouped else -1)
    save(tmp_path, 3, {"qkv": (weight, axis)})
    ranges = [(128, 192), (0, 32), (32, 32), (224, 256), (0, 32)]
    want = merge([weight.split(axis, a, b) for a, b in ranges], axis)
    with CheckpointReader(tmp_path) as reader:
        assert same(reader.read_weight("qkv", axis, ranges), want)


def test_one_file_holds_several_pieces_of_a_weight(tmp_path: Path) -> None:
    weight = random_weight("asym_int5", (96, 64), 32)
    held = [[(0, 16), (32, 48), (64, 80)], [(16, 32), (48, 64), (80, 96)]]  # q | k | v of two ranks
    records = []
    for name, ranges in zip(shard_names(2), held, strict=True):
        entries = [WeightEntry("qkv", weight.format, 32, weight.shape, 0, a, b) for a, b in ranges]
        with ShardWriter(tmp_path, name, entries) as writer:
            for a, b in reversed(ranges):
                writer.write_weight("qkv", a, weight.split(0, a, b))
            records.append(writer.close())
    commit(tmp_path, 2, {}, records)
    with CheckpointReader(tmp_path) as reader:
        assert same(reader.read_weight("qkv"), weight)
        assert same(reader.read_weight("qkv", 0, held[1]), merge([weight.split(0, a, b) for a, b in held[1]], 0))


@pytest.mark.parametrize("group", [32, -1])
def test_a_rank_of_zero_width(tmp_path: Path, group: int) -> None:
    weight = random_weight("sym_int4", (8, 32), group)
    save(tmp_path, 4, {"w": (weight, 1)}, cuts=lambda w, axis, tp: [(0, 0), (0, 32), (32, 32), (32, 32)])
    with CheckpointReader(tmp_path) as reader:
        assert same(reader.read_weight("w"), weight)
        for ranges in ([], [(0, 0)], [(32, 32)]):
            assert same(reader.read_weight("w", 1, ranges), weight.split(1, 32, 32))
            assert reader.read_weight("w", 0, ranges if ranges != [(32, 32)] else [(8, 8)]).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_tensors_of_every_dtype_and_rank(tmp_path: Path, dtype: str) -> None:
    tensors = {}
    for i, shape in enumerate([(), (1,), (5,), (0,), (3, 0), (0, 4), (4, 3), (2, 3, 4), (2, 1, 2, 3)]):
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8)
        tensors[f"t{i}"] = bits.view(DTYPES[dtype]).reshape(shape)
    save(tmp_path, 2, {}, tensors)
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert same_bits(reader.read_tensor(name), tensor)
            if tensor.ndim and tensor.shape[0] > 1:
                assert same_bits(reader.read_tensor(name, 1, 2), tensor[1:2])
    assert verify(tmp_path).ok


def test_rows_of_a_cut_tensor(tmp_path: Path) -> None:
    bias = torch.randn(10, 3)
    records = []
    for name, (a, b) in zip(shard_names(3), [(0, 4), (4, 4), (4, 10)], strict=True):
        with ShardWriter(tmp_path, name, [TensorEntry("bias", bias.dtype, (10, 3), 0, a, b)]) as writer:
            writer.write_tensor("bias", a, bias[a:b])
            records.append(writer.close())
    commit(tmp_path, 3, {}, records)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read_tensor("bias"), bias)
        for a in range(11):
            for b in range(a, 11):
                assert torch.equal(reader.read_tensor("bias", a, b), bias[a:b])


BIG = {
    # Rows that do not divide blocks, over several blocks and several windows; rows longer than blocks; wide gaps.
    "tall": (2100, 3000),
    "wide": (3, 1_500_000),
    "long": (40, 50_000),
}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("big")
    weights = {name: (random_weight("fp16", shape, -1, 5), axis) for axis, (name, shape) in enumerate(BIG.items(), -1)}
    weights = {name: (w, axis if axis >= 0 else None) for name, (w, axis) in weights.items()}
    save(folder, 2, weights)
    readers = [
        CheckpointReader(folder, verify=v, keep_cache=k) for v, k in ((True, True), (False, True), (True, False))
    ]
    yield readers, {name: w for name, (w, _) in weights.items()}
    for reader in readers:
        reader.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", BIG)
def test_any_cut_points_of_many_blocks(big, name: str, axis: int, data: st.DataObject) -> None:
    readers, weights = big
    weight = weights[name]
    edges = st.integers(0, weight.shape[axis])
    ranges = [tuple(sorted(r)) for r in data.draw(st.lists(st.tuples(edges, edges), min_size=1, max_size=3))]
    reader = data.draw(st.sampled_from(readers))
    assert same(reader.read_weight(name, axis, ranges), merge([weight.split(axis, a, b) for a, b in ranges], axis))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cuts_on_both_sides(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    row = FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))]
    group = data.draw(st.sampled_from([32, 64, -1])) if row.grouped else -1
    shape = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300)))
    weight = random_weight(row.name, shape, group, data.draw(st.integers(0, 9)))
    axis, other = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))

    def draw_edges(along: int) -> list[int]:
        step = grain(row, group, along)
        units = -(-shape[along] // step)
        return [min(shape[along], step * u) for u in sorted(data.draw(st.lists(st.integers(0, units), max_size=4)))]

    edges = [0, *draw_edges(axis), shape[axis]]
    folder = tmp_path_factory.mktemp("cuts")
    save(folder, len(edges) - 1, {"w": (weight, axis)}, cuts=lambda *_: list(pairwise(edges)))
    wanted = [0, *draw_edges(other), shape[other]]
    with CheckpointReader(folder) as reader:
        for start, stop in pairwise(wanted):
            assert same(reader.read_weight("w", other, [(start, stop)]), weight.split(other, start, stop))


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    weight = random_weight("zp_int3", (7, 100), 32)
    norm = torch.randn(9, dtype=torch.bfloat16)
    manifest = save(tmp_path, 2, {"a.weight": (weight, 1), "b.weight": (weight, None)}, {"norm": norm})
    keys = {}
    for file in manifest.files:
        with safe_open(tmp_path / file.name, "pt") as opened:
            keys |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        data = (tmp_path / file.name).read_bytes()
        assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    assert torch.equal(keys["norm"], norm)
    for part, tensor in weight.tensors().items():
        assert same_bits(keys[f"b.weight.{part}"], tensor)
        first, second = (weight.split(1, a, b).tensors()[part] for a, b in ((0, 64), (64, 100)))
        assert same_bits(keys[f"a.weight.{part}@0:64"], first)
        assert same_bits(keys[f"a.weight.{part}@64:100"], second)


def test_parts_constant_along_the_cut_are_stored_once(tmp_path: Path) -> None:
    weight = random_weight("sym_int8", (64, 128), -1)
    manifest = save(tmp_path, 4, {"w": (weight, 1)})
    assert sum("scale" in shard.checksums for shard in manifest.weights["w"].shards) == 1
    (row,) = describe(tmp_path)
    assert (row.bytes, row.format, row.axis, len(row.ranges)) == (weight.nbytes, "sym_int8", 1, 4)


def test_ranks_that_disagree_about_a_constant_part_are_refused(tmp_path: Path) -> None:
    mine, yours = random_weight("sym_int8", (8, 64), -1, 1), random_weight("sym_int8", (8, 64), -1, 2)
    records = []
    for name, weight, (a, b) in zip(shard_names(2), (mine, yours), ((0, 32), (32, 64)), strict=True):
        with ShardWriter(tmp_path, name, [WeightEntry("w", weight.format, -1, (8, 64), 1, a, b)]) as writer:
            writer.write_weight("w", a, weight.split(1, a, b))
            records.append(writer.close())
    with pytest.raises(CheckpointError, match="disagree about part scale of w"):
        commit(tmp_path, 2, {}, records)
    assert not is_checkpoint(tmp_path)


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"recipe": {"format": "nf4", "x": [1, 2.5, None, True, "é"]}, "empty": {}}
    save(tmp_path, 1, {}, {"a": torch.ones(2)}, metadata)
    with CheckpointReader(tmp_path) as reader:
        assert reader.metadata == metadata
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(CheckpointError, match="no JSON"):
            save(tmp_path, 1, {}, {"a": torch.ones(2)}, bad)
    assert json.loads((tmp_path / "lowbit.json").read_bytes())["metadata"] == metadata


@pytest.mark.parametrize(
    ("axis", "ranges"),
    [
        (1, [(0, 33)]),
        (1, [(5, 32)]),
        (1, [(0, 132)]),
        (1, [(64, 32)]),
        (1, [(96, 100), (0, 32)]),
        (0, [(-1, 2)]),
        (0, [(0, 9)]),
        (None, [(0, 1)]),
    ],
)
def test_ranges_that_cannot_be_read_get_a_sentence(tmp_path: Path, axis: int | None, ranges) -> None:
    save(tmp_path, 1, {"w": (random_weight("sym_int4", (8, 100), 32), None)})
    with CheckpointReader(tmp_path) as reader, pytest.raises(FormatError, match="w"):
        reader.read_weight("w", axis, ranges)


def test_wrong_names_and_rows_get_a_sentence(tmp_path: Path) -> None:
    save(tmp_path, 1, {"w": (random_weight("sym_int4", (8, 64), 32), None)}, {"t": torch.ones(3), "s": torch.ones(())})
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(CheckpointError, match="no weight 'x'; it holds 1: w"):
            reader.read_weight("x")
        with pytest.raises(CheckpointError, match="no tensor 'w'"):
            reader.read_tensor("w")
        for start, stop in ((0, 4), (-1, 2), (2, 1)):
            with pytest.raises(CheckpointError, match="has no rows"):
                reader.read_tensor("t", start, stop)
        with pytest.raises(CheckpointError, match="has no rows"):
            reader.read_tensor("s", 0, 1)
    with pytest.raises(CheckpointError, match="is closed"):
        reader.read_weight("w")


def test_a_reader_outlives_the_next_save(tmp_path: Path) -> None:
    old, new = random_weight("sym_int4", (8, 64), 32, 1), random_weight("sym_int4", (8, 64), 32, 2)
    save(tmp_path, 2, {"w": (old, 0)})
    with CheckpointReader(tmp_path) as reader:
        save(tmp_path, 3, {"w": (new, 0)})
        assert same(reader.read_weight("w"), old)
    with CheckpointReader(tmp_path) as reader:
        assert same(reader.read_weight("w"), new)
    assert len(os.listdir(tmp_path)) == 4  # the first save's files are gone


def test_a_save_leaves_other_files_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "lowbit-notes.txt"):
        (tmp_path / name).write_text("{}")
    for _ in range(2):
        save(tmp_path, 1, {}, {"a": torch.ones(2)})
    assert {"config.json", "model.safetensors", "lowbit-notes.txt"} < set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) == 5


def test_uncommitted_files_are_listed_as_such(tmp_path: Path) -> None:
    save(tmp_path, 1, {}, {"a": torch.ones(2)})
    (record,) = write_records(tmp_path, 1, {}, {"a": torch.ones(2)})
    assert verify(tmp_path).unlisted == (record.name,)


def test_even_cuts_may_be_empty() -> None:
    assert even_cuts(100, 64, 4) == [(0, 0), (0, 64), (64, 64), (64, 100)]
