"""A damaged checkpoint gives a CheckpointError that names the file and the tensor, and never wrong values."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from checkpoint_saving import random_weight, same, save, write_records

from dist_lowbit.checkpoint import (
    CheckpointReader,
    FileRecord,
    ShardWriter,
    TensorEntry,
    WeightEntry,
    commit,
    discard,
    is_checkpoint,
    shard_names,
    verify,
)
from dist_lowbit.checkpoint.schema import decode, render
from dist_lowbit.core.errors import CheckpointError
from dist_lowbit.formats import PackedWeight, lookup

WEIGHT = random_weight("asym_int5", (6, 100), 32, 1)
NORM = torch.arange(5, dtype=torch.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path, 2, {"w.weight": (WEIGHT, 1)}, {"norm": NORM}, {"note": "é"})
    return tmp_path


def data_file(folder: Path, rank: int = 0) -> Path:
    return sorted(folder.glob("lowbit-*.safetensors"))[rank]


def edit(folder: Path, change) -> None:
    """Change lowbit.json and seal it again, as an attacker or a careful editor would."""
    path = folder / "lowbit.json"
    raw = json.loads(path.read_bytes())
    raw.pop("checksum")
    change(raw)
    path.write_bytes(render(raw))


def read_all(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        assert same(reader.read_weight("w.weight"), WEIGHT)
        assert torch.equal(reader.read_tensor("norm"), NORM)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_flipped_byte_of_a_data_file_is_found(saved: Path, rank: int) -> None:
    path = data_file(saved, rank)
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            read_all(saved)
        assert path.name in str(caught.value)
    path.write_bytes(good)
    read_all(saved)


def test_every_flipped_byte_of_the_manifest_is_found(saved: Path) -> None:
    path = saved / "lowbit.json"
    good = path.read_bytes()
    want = decode(good, "x")
    harmless = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        try:
            found = decode(bytes(bad), "lowbit.json")
        except CheckpointError:
            continue
        assert found == want  # white space for white space
        harmless += 1
    assert harmless < len(good) // 50


def test_a_flipped_byte_is_named_and_spares_what_it_does_not_touch(tmp_path: Path) -> None:
    big = random_weight("fp16", (3000, 500), -1)  # 3 MB: three blocks
    save(tmp_path, 1, {"big.weight": (big, None)})
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[-600_000] ^= 16  # in the third block
    path.write_bytes(data)
    with CheckpointReader(tmp_path) as reader:
        assert same(reader.read_weight("big.weight", 0, [(0, 2000)]), big.split(0, 0, 2000))
        with pytest.raises(
            CheckpointError, match=rf"{path.name}: 'big.weight.values' has checksum .* block 2 .*expected"
        ):
            reader.read_weight("big.weight", 0, [(2999, 3000)])
        with pytest.raises(CheckpointError):
            reader.read_weight("big.weight", 1, [(0, 1)])
    report = verify(tmp_path)
    assert not report.ok
    assert len(report.problems) == 1
    assert "block 2" in report.problems[0]
    with CheckpointReader(tmp_path, verify=False) as reader:
        assert not same(reader.read_weight("big.weight"), big)


def test_a_truncated_file_is_found_at_any_length(saved: Path) -> None:
    path = data_file(saved)
    size = path.stat().st_size
    for length in (size - 1, size // 2, 100, 8, 7, 0):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=f"{path.name} has {length} bytes; expected {size}"):
            CheckpointReader(saved)
    path = saved / "lowbit.json"
    good = path.read_bytes()
    for length in range(0, len(good) - 1, 7):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"lowbit\.json"):
            CheckpointReader(saved)


def test_a_file_truncated_under_an_open_reader_is_found(saved: Path) -> None:
    with CheckpointReader(saved) as reader:
        os.truncate(data_file(saved), 200)
        with pytest.raises(CheckpointError, match="has become shorter than"):
            reader.read_weight("w.weight")


def test_a_missing_rank_file_is_named(saved: Path) -> None:
    path = data_file(saved, 1)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name} is missing; lowbit\.json lists 2 data files"):
        CheckpointReader(saved)
    assert "is missing" in verify(saved).problems[0]


def test_files_of_two_saves_do_not_mix(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    save(other, 2, {"w.weight": (random_weight("asym_int5", (6, 100), 32, 2), 1)}, {"norm": NORM})
    data_file(saved).write_bytes(data_file(other).read_bytes())
    with pytest.raises(CheckpointError, match=f"{data_file(saved).name}: 'w.weight.plane0.* has checksum"):
        read_all(saved)
    data_file(saved).write_bytes(data_file(saved, 1).read_bytes())
    with pytest.raises(CheckpointError, match=data_file(saved).name):
        CheckpointReader(saved)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_a_wrong_schema_version_is_refused(saved: Path, version: object) -> None:
    edit(saved, lambda raw: raw.update(schema_version=version))
    with pytest.raises(CheckpointError, match=r"lowbit\.json has schema_version .*; expected 1"):
        CheckpointReader(saved)


def test_an_unknown_format_is_refused_by_name(saved: Path) -> None:
    edit(saved, lambda raw: raw["weights"]["w.weight"].update(format="int3_of_tomorrow"))
    with pytest.raises(CheckpointError, match=r"lowbit\.json: .*int3_of_tomorrow.*sym_int4"):
        CheckpointReader(saved)


def test_an_edited_manifest_is_refused_and_a_reformatted_one_is_not(saved: Path) -> None:
    path = saved / "lowbit.json"
    raw = json.loads(path.read_bytes())
    path.write_text(json.dumps(raw, indent=4))
    read_all(saved)
    raw["tp"] = 3
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="was altered after it was written"):
        CheckpointReader(saved)


def test_what_is_no_checkpoint_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no lowbit\.json; expected a low-bit checkpoint$"):
        CheckpointReader(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert it first"):
        CheckpointReader(tmp_path)
    for path in (tmp_path / "nowhere", tmp_path / "config.json"):
        assert not is_checkpoint(path)
        with pytest.raises(CheckpointError, match="is no directory"):
            CheckpointReader(path)
    assert "is no directory" in verify(tmp_path / "nowhere").problems[0]


def test_ranges_missing_or_stored_twice_are_not_committed(tmp_path: Path) -> None:
    save(tmp_path, 1, {}, {"old": NORM})
    for cuts, text in (
        ([(0, 2), (3, 6)], r"w lacks the range \[2, 3\) of 6"),
        ([(0, 4), (3, 6)], r"w has the range \[3, 4\) of 6 twice"),
        ([(0, 2), (2, 5)], r"w lacks the range \[5, 6\) of 6"),
        ([(1, 2), (2, 6)], r"w lacks the range \[0, 1\) of 6"),
    ):
        records = write_records(tmp_path, 2, {"w": (WEIGHT, 0)}, cuts=lambda *_, c=cuts: c)
        with pytest.raises(CheckpointError, match=text):
            commit(tmp_path, 2, {}, records)
        discard(tmp_path, records)
        with CheckpointReader(tmp_path) as reader:
            assert reader.tensors.keys() == {"old"}
    assert len(os.listdir(tmp_path)) == 2


def test_ranks_that_disagree_are_not_committed(tmp_path: Path) -> None:
    first = write_records(tmp_path, 1, {"w": (WEIGHT, 0)})
    for other in (random_weight("sym_int4", (6, 100), 32), random_weight("asym_int5", (7, 100), 32)):
        with pytest.raises(CheckpointError, match="ranks disagree about w"):
            commit(tmp_path, 2, {}, first + write_records(tmp_path, 1, {"w": (other, 0)}))
    with pytest.raises(CheckpointError, match="ranks disagree about w"):
        commit(tmp_path, 2, {}, first + write_records(tmp_path, 1, {}, {"w": NORM}))


def test_a_record_whose_file_is_gone_or_changed_is_not_committed(tmp_path: Path) -> None:
    records = write_records(tmp_path, 2, {"w": (WEIGHT, 0)})
    path = tmp_path / records[1].name
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match=f"{path.name} has {len(data) + 1} bytes; expected {len(data)}"):
        commit(tmp_path, 2, {}, records)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        commit(tmp_path, 2, {}, records)
    assert not is_checkpoint(tmp_path)


def test_discard_never_touches_the_checkpoint_in_place(tmp_path: Path) -> None:
    records = write_records(tmp_path, 2, {"w": (WEIGHT, 0)})
    commit(tmp_path, 2, {}, records)
    discard(tmp_path, records)
    assert verify(tmp_path).ok


def entry() -> WeightEntry:
    return WeightEntry("w", WEIGHT.format, 32, (12, 100), 0, 0, 6)


@pytest.mark.parametrize(
    ("name", "start", "weight", "text"),
    [
        ("v", 0, WEIGHT, "not declared to hold a piece of v"),
        ("w", 6, WEIGHT, "not declared to hold a piece of w that begins at 6"),
        ("w", 0, random_weight("asym_int5", (5, 100), 32), "declared was"),
        ("w", 0, random_weight("asym_int5", (6, 100), 64), "declared was"),
        ("w", 0, random_weight("sym_int5", (6, 100), 32), "declared was"),
        ("t", 0, WEIGHT, "was declared as a tensor"),
    ],
)
def test_a_piece_that_was_not_declared_is_refused(tmp_path: Path, name: str, start: int, weight, text: str) -> None:
    tensor = TensorEntry("t", torch.float32, (5,))
    writer = ShardWriter(tmp_path, shard_names(1)[0], [entry(), tensor])
    with pytest.raises(CheckpointError, match=text), writer:
        writer.write_weight(name, start, weight)
    assert os.listdir(tmp_path) == []


def test_pieces_written_twice_or_never_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_names(1)[0], [entry(), TensorEntry("t", torch.float32, (5,))])
    writer.write_weight("w", 0, WEIGHT)
    with pytest.raises(CheckpointError, match="written twice"):
        writer.write_weight("w", 0, WEIGHT)
    with pytest.raises(CheckpointError, match=r"1 declared pieces were never written, first t \[0, 5\)"):
        writer.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(CheckpointError, match="is closed"):
        writer.write_tensor("t", 0, NORM)


@pytest.mark.parametrize("tensor", [NORM.half(), torch.ones(6), torch.ones(5, 1), torch.ones(5, device="meta")])
def test_a_tensor_unlike_its_entry_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with (
        pytest.raises(CheckpointError, match="t"),
        ShardWriter(tmp_path, shard_names(1)[0], [TensorEntry("t", torch.float32, (5,))]) as writer,
    ):
        writer.write_tensor("t", 0, tensor)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "build",
    [
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (8, 128), 1, 0, 63),
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (8, 128), 1, 65, 128),
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (8, 128), 0, 3, 9),
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (8, 128), None, 0, 4),
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (0, 128)),
        lambda: WeightEntry("w", lookup("sym_int4"), 64, (8, 128), 2, 0, 1),
        lambda: WeightEntry("", lookup("sym_int4"), 64, (8, 128)),
        lambda: TensorEntry("__metadata__", torch.float32, (8,)),
        lambda: TensorEntry("t", torch.complex64, (8,)),
        lambda: TensorEntry("t", torch.float32, (), 0),
        lambda: TensorEntry("t", torch.float32, (4, 4), 1, 0, 2),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(build) -> None:
    with pytest.raises(CheckpointError):
        build()


def test_keys_that_would_collide_are_refused(tmp_path: Path) -> None:
    clash = [TensorEntry("w.scale", torch.float32, (5,)), entry_whole()]
    with pytest.raises(CheckpointError, match=r"would hold 'w\.scale' twice"):
        ShardWriter(tmp_path, shard_names(1)[0], clash)
    with pytest.raises(CheckpointError, match="begin at the same place"):
        ShardWriter(tmp_path, shard_names(1)[0], [entry(), entry()])
    assert os.listdir(tmp_path) == []


def entry_whole() -> WeightEntry:
    return WeightEntry("w", WEIGHT.format, 32, (6, 100))


@pytest.mark.parametrize(
    "name", ["../lowbit-01234567-00001-of-00001.safetensors", "model.safetensors", "", "lowbit.json"]
)
def test_only_names_of_data_files_are_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no name of a data file"):
        ShardWriter(tmp_path / "x", name, [])


def in_child(work) -> int:
    """Run `work` in a forked child; return its exit status (1 for an exception)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_full_disk_is_known_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the file size gives the same kind of error as a full disk, without needing one.
    save(tmp_path, 1, {}, {"old": NORM})

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(CheckpointError, match=r"cannot write .*lowbit-.* bytes\): file too large; nothing of it"):
            ShardWriter(tmp_path, shard_names(1)[0], [TensorEntry("t", torch.float32, (1 << 20,))])

    assert in_child(work) == 0
    assert len(os.listdir(tmp_path)) == 2
    assert verify(tmp_path).ok


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1, {}, {"old": NORM})
    before = (tmp_path / "lowbit.json").read_bytes()
    records = write_records(tmp_path, 1, {}, {"new": NORM})

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
        with pytest.raises(CheckpointError, match=r"cannot write .*lowbit\.json: file too large; .* intact"):
            commit(tmp_path, 1, {"long": "x" * 10_000}, records)

    assert in_child(work) == 0
    assert (tmp_path / "lowbit.json").read_bytes() == before
    assert not list(tmp_path.glob(".lowbit-*"))


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/lowbit-"):
        ShardWriter(tmp_path / "file", shard_names(1)[0], [])
    (name,) = shard_names(1)
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="file exists"):
        ShardWriter(tmp_path, name, [])
    assert (tmp_path / name).read_text() == "precious"
    (tmp_path / "lowbit.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*lowbit\.json"):
        save(tmp_path, 1, {}, {"a": NORM})


def test_records_survive_json_only_as_they_are(tmp_path: Path) -> None:
    (record,) = write_records(tmp_path, 1, {"w": (WEIGHT, 0)}, {"t": NORM})
    assert FileRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    for change in ({"name": 3}, {"bytes": -1}, {"pieces": {}}, {"extra": 1}):
        with pytest.raises(CheckpointError):
            FileRecord.from_json({**record.to_json(), **change})


def test_weights_on_meta_are_refused(tmp_path: Path) -> None:
    meta = {part: t.to("meta") for part, t in WEIGHT.tensors().items()}
    empty = PackedWeight.from_tensors(WEIGHT.format, WEIGHT.shape, WEIGHT.group_size, meta)
    with (
        pytest.raises(CheckpointError, match="w has no values"),
        ShardWriter(tmp_path, shard_names(1)[0], [entry_whole()]) as writer,
    ):
        writer.write_weight("w", 0, empty)
