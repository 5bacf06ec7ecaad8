"""Hostile low-bit checkpoints. README.md has the list."""

from __future__ import annotations

import copy
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_saving import random_weight, save

from dist_lowbit.checkpoint import CheckpointReader, TensorSource, describe, verify
from dist_lowbit.checkpoint.container import checksum
from dist_lowbit.checkpoint.schema import render
from dist_lowbit.core.errors import CheckpointError

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder, 2, {"w": (random_weight("asym_int4", (4, 128), 64), 1)}, {"norm": torch.ones(6, 2)})
    return folder


def read_all(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        for name in reader.weights:
            reader.read_weight(name)
        for name in reader.tensors:
            reader.read_tensor(name)


def refused(folder: Path, text: str | None = None) -> None:
    """Check that every way in answers with the sentence, and takes no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text) as caught:
            read_all(folder)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not verify(folder).ok


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Change lowbit.json and seal it again: an attacker can compute a checksum too."""
    path = folder / "lowbit.json"
    raw = json.loads(path.read_bytes())
    raw.pop("checksum")
    change(raw)
    path.write_bytes(render(raw))


def rewrite_header(folder: Path, change: Callable[[Json], object], file: int = 0) -> None:
    """Change a data file's header, and make size and checksum in lowbit.json agree."""
    raw = json.loads((folder / "lowbit.json").read_bytes())
    path = folder / raw["files"][file]["name"]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    put_header(folder, struct.pack("<Q", len(text)) + text, data[8 + length :], file)


def put_header(folder: Path, header: bytes, body: bytes, file: int = 0) -> None:
    def agree(raw: Json) -> None:
        raw["files"][file].update(bytes=len(header) + len(body), header=checksum(header))

    edit(folder, agree)
    raw = json.loads((folder / "lowbit.json").read_bytes())
    (folder / raw["files"][file]["name"]).write_bytes(header + body)


def shard(raw: Json, i: int = 0) -> Json:
    found: Json = raw["weights"]["w"]["shards"][i]
    return found


HUGE = 1 << 47
MANIFESTS: list[tuple[str, Callable[[Json], object], str]] = [
    ("path upwards", lambda r: r["files"][0].update(name="../secret.safetensors"), "no name of a data file"),
    ("absolute path", lambda r: r["files"][0].update(name="/etc/passwd"), "no name of a data file"),
    ("NUL in a path", lambda r: r["files"][0].update(name="lowbit-\0"), "no name of a data file"),
    ("newline after a name", lambda r: r["files"][0].update(name=r["files"][0]["name"] + "\n"), "no name of a data"),
    ("foreign file", lambda r: r["files"][0].update(name="model.safetensors"), "no name of a data file"),
    ("a file twice", lambda r: r["files"].append(copy.deepcopy(r["files"][0])), "listed twice"),
    ("a file of minus one byte", lambda r: r["files"][0].update(bytes=-1), "'bytes' -1"),
    ("a file of exabytes", lambda r: r["files"][0].update(bytes=1 << 61), "expected 2305843009213693952"),
    ("no files", lambda r: r.update(files=[]), "lies in file number 0"),
    ("file number out of range", lambda r: shard(r).update(file=9), "lies in file number 9"),
    ("negative file number", lambda r: shard(r).update(file=-1), "'file' -1"),
    ("the other rank's file", lambda r: shard(r).update(file=1), "does not list|lacks"),
    ("huge shape", lambda r: r["weights"]["w"].update(shape=[HUGE, HUGE]), "beyond any file"),
    ("huge rows", lambda r: r["weights"]["w"].update(shape=[1 << 36, 128]), "checksums; expected"),
    ("zero shape", lambda r: r["weights"]["w"].update(shape=[0, 128]), "'shape'"),
    ("negative shape", lambda r: r["weights"]["w"].update(shape=[-4, 128]), "'shape'"),
    ("three axes", lambda r: r["weights"]["w"].update(shape=[4, 128, 1]), "'shape'"),
    ("one axis", lambda r: r["weights"]["w"].update(shape=[4]), "expected N and K"),
    ("shape of floats", lambda r: r["weights"]["w"].update(shape=[4.0, 128.0]), "'shape'"),
    ("shape of booleans", lambda r: r["weights"]["w"].update(shape=[True, 128]), "'shape'"),
    ("smaller shape", lambda r: r["weights"]["w"].update(shape=[2, 128]), r"expected U8 \[2, 32\]"),
    ("axis 2", lambda r: r["weights"]["w"].update(axis=2), "'axis' 2"),
    ("other axis", lambda r: r["weights"]["w"].update(axis=0), "expected a range within"),
    ("no axis", lambda r: r["weights"]["w"].update(axis=None), "expected a range within"),
    ("tensor cut along axis 1", lambda r: r["tensors"]["norm"].update(axis=1), "cut along axis 1"),
    ("hole", lambda r: r["weights"]["w"]["shards"].pop(0), r"lacks the range \[0, 64\)"),
    ("no shards", lambda r: r["weights"]["w"].update(shards=[]), r"lacks the range \[0, 128\)"),
    ("overlap", lambda r: shard(r, 1).update(start=0), r"has the range \[0, 64\) of 128 twice"),
    ("range twice", lambda r: r["weights"]["w"]["shards"].append(shard(r)), "twice"),
    ("cut off the grain", lambda r: (shard(r).update(stop=63), shard(r, 1).update(start=63)), "multiple of 64"),
    ("range past the end", lambda r: shard(r, 1).update(stop=192), r"range within \[0, 128\)"),
    ("range backwards", lambda r: shard(r).update(start=64, stop=0), "expected a range within"),
    ("empty range", lambda r: r["weights"]["w"]["shards"].append({**shard(r), "stop": 0}), "checksums of"),
    ("negative start", lambda r: shard(r).update(start=-64), "'start' -64"),
    (
        "huge group",
        lambda r: r["weights"]["w"].update(group_size=1 << 40),
        "is cut at 64 along axis 1; expected a multiple of",
    ),
    ("group of zero", lambda r: r["weights"]["w"].update(group_size=0), "group_size is 0"),
    ("other group", lambda r: r["weights"]["w"].update(group_size=32), r"expected F16 \[4, 2\]"),
    ("format of same size", lambda r: r["weights"]["w"].update(format="zp_int4"), "checksums of"),
    ("format that is no name", lambda r: r["weights"]["w"].update(format=["sym_int4"]), "'format'"),
    ("missing checksums", lambda r: shard(r)["checksums"].pop("plane0"), "has checksums of"),
    ("checksums of a part unknown", lambda r: shard(r)["checksums"].update(plane9=[]), "has checksums of"),
    ("too few checksums", lambda r: shard(r)["checksums"].update(plane0=[]), "0 checksums; expected 1"),
    ("a wrong checksum", lambda r: shard(r)["checksums"].update(plane0=["0" * 16]), "'w.plane0@0:64' has checksum"),
    ("a checksum that is no hex", lambda r: shard(r)["checksums"].update(plane0=["z" * 16]), "16 hex digits"),
    ("checksum with newline", lambda r: shard(r)["checksums"].update(plane0=["0" * 16 + "\n"]), "16 hex digits"),
    ("header checksum of null", lambda r: r["files"][0].update(header=None), "'header' None"),
    ("unknown dtype", lambda r: r["tensors"]["norm"].update(dtype="F3"), "dtype 'F3'"),
    ("dtype that lies", lambda r: r["tensors"]["norm"].update(dtype="I32"), "as F32 .*expected I32"),
    ("shape that lies", lambda r: r["tensors"]["norm"].update(shape=[2, 6]), "expected a range within"),
    ("many axes", lambda r: r["tensors"]["norm"].update(shape=[1] * 1000), "'shape'"),
    ("overflowing strides", lambda r: r["tensors"]["norm"].update(shape=[6, HUGE, HUGE, 0]), "beyond any file"),
    ("name with control characters", lambda r: r["tensors"].update({"a\x1b[2J": r["tensors"].pop("norm")}), "no name"),
    ("name of a lone surrogate", lambda r: r["tensors"].update({"\ud800": r["tensors"].pop("norm")}), "no name"),
    ("endless name", lambda r: r["tensors"].update({"a" * 100_000: r["tensors"].pop("norm")}), "no name"),
    ("weight and tensor of one name", lambda r: r["tensors"].update(w=r["tensors"].pop("norm")), "both as"),
    ("unknown key", lambda r: r.update(hook="os.system"), "unknown key 'hook'"),
    ("unknown key of a shard", lambda r: shard(r).update(offset=0), "unknown key 'offset'"),
    ("missing key", lambda r: r.pop("tensors"), "no 'tensors'"),
    ("list for an object", lambda r: r.update(weights=[]), "'weights'"),
    ("null for an object", lambda r: r["weights"].update(w=None), "expected an object"),
    ("tp of zero", lambda r: r.update(tp=0), "'tp' 0"),
    ("tp of text", lambda r: r.update(tp="2"), "'tp' '2'"),
]


@pytest.mark.parametrize(("change", "text"), [m[1:] for m in MANIFESTS], ids=[m[0] for m in MANIFESTS])
def test_hostile_manifests(folder: Path, change: Callable[[Json], object], text: str) -> None:
    edit(folder, change)
    refused(folder, text)


TEXTS: list[tuple[str, bytes, str]] = [
    ("empty", b"", "no valid JSON"),
    ("a list", b"[]", "expected an object"),
    ("no UTF-8", b'{"a": "\xff"}', "no valid JSON"),
    ("duplicate keys", b'{"schema_version": 1, "schema_version": 1}', "stands there twice"),
    ("NaN", b'{"schema_version": NaN}', "no JSON number"),
    ("Infinity", b'{"schema_version": -Infinity}', "no JSON number"),
    ("overflow", b'{"schema_version": 1e999}', "out of range"),
    ("endless digits", b'{"schema_version": ' + b"9" * 100_000 + b"}", "no valid JSON"),
    ("deep lists", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("deep objects", b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deeply"),
    ("medium depth", b'{"a":' * 80 + b"1" + b"}" * 80, "nested too deeply"),
    ("zeros", bytes(10_000), "no valid JSON"),
    ("trailing data", b"{} {}", "no valid JSON"),
]


@pytest.mark.parametrize(("data", "text"), [t[1:] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_hostile_json(folder: Path, data: bytes, text: str) -> None:
    (folder / "lowbit.json").write_bytes(data)
    refused(folder, text)
    with pytest.raises(CheckpointError, match=text):
        describe(folder)


def first(header: Json) -> Json:
    found: Json = header["norm"]
    return found


HEADERS: list[tuple[str, Callable[[Json], object], str]] = [
    ("offsets past the end", lambda h: first(h).update(data_offsets=[0, 1 << 40]), "expected a range within"),
    ("offsets backwards", lambda h: first(h).update(data_offsets=[48, 0]), "expected a range within"),
    ("negative offsets", lambda h: first(h).update(data_offsets=[-48, 0]), "data_offsets"),
    ("three offsets", lambda h: first(h).update(data_offsets=[0, 48, 48]), "data_offsets"),
    ("offsets of floats", lambda h: first(h).update(data_offsets=[0.0, 48.0]), "data_offsets"),
    ("overlap", lambda h: h.update(evil=copy.deepcopy(first(h))), "begins at byte 0 of the data; expected 48"),
    ("hole", lambda h: h.pop("norm"), "begins at byte 48 of the data; expected 0"),
    ("size that lies", lambda h: first(h).update(shape=[6, 3]), "has 48 bytes; expected 72"),
    ("overflowing shape", lambda h: first(h).update(shape=[1 << 32, 1 << 32]), "has 48 bytes; expected"),
    ("negative shape", lambda h: first(h).update(shape=[-6, -2]), "'shape'"),
    ("other shape of that size", lambda h: first(h).update(shape=[2, 6]), r"as F32 \[2, 6\]; expected F32 \[6, 2\]"),
    ("other dtype of that size", lambda h: first(h).update(dtype="I32"), "as I32"),
    ("unknown dtype", lambda h: first(h).update(dtype="F31"), "as F31"),
    ("other name", lambda h: h.update(evil=h.pop("norm")), "lacks 'norm'"),
    (
        "unlisted tensor",
        lambda h: h.update(evil={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        "does not list",
    ),
    ("entry is a number", lambda h: h.update(norm=1), "expected an object"),
    ("entry of unknown keys", lambda h: first(h).update(hook=1), "unknown key"),
    ("endless name", lambda h: h.update({"a" * 100_000: h.pop("norm")}), "lacks 'norm'"),
    (
        "endless unlisted name",
        lambda h: h.update({"a" * 10**5: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "does not list",
    ),
]


@pytest.mark.parametrize(("change", "text"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_hostile_headers(folder: Path, change: Callable[[Json], object], text: str) -> None:
    rewrite_header(folder, change)
    refused(folder, text)


@pytest.mark.parametrize("length", [0, 1, 10_000, 99_999_999, 100_000_001, (1 << 63) - 1, (1 << 64) - 1])
def test_header_lengths_that_lie(folder: Path, length: int) -> None:
    put_header(folder, struct.pack("<Q", length), b"{}" + bytes(100))
    refused(folder, "claims a header of|no valid JSON")


@pytest.mark.parametrize("text", [t[1] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_headers_of_hostile_json(folder: Path, text: bytes) -> None:
    put_header(folder, struct.pack("<Q", len(text)) + text, b"")
    refused(folder)


def replace_data_file(folder: Path, make: Callable[[Path], object]) -> None:
    path = sorted(folder.glob("lowbit-*.safetensors"))[0]
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkfifo, "no regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "no regular file"),
        (lambda p: p.mkdir(), "no regular file"),
        (lambda p: p.symlink_to(p), "cannot read"),
        (lambda p: p.symlink_to("/nowhere"), "is missing"),
        (lambda p: p.symlink_to("/etc/passwd"), "bytes; expected"),
    ],
    ids=["fifo", "device", "directory", "endless link", "dangling link", "other file"],
)
def test_things_that_are_no_files(folder: Path, make: Callable[[Path], object], text: str) -> None:
    replace_data_file(folder, make)
    refused(folder, text)


def test_a_manifest_that_is_no_file(folder: Path) -> None:
    path = folder / "lowbit.json"
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero")):
        path.unlink()
        make(path)
        refused(folder, "no regular file")


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / "lowbit.json", 1 << 40)  # sparse
    refused(folder, "expected a file of at most")


def test_links_to_regular_files_are_followed(folder: Path, tmp_path: Path) -> None:
    for path in list(folder.iterdir()):
        path.rename(tmp_path / f"blob-{path.name}")
        path.symlink_to(f"../blob-{path.name}")  # as in a hub cache
    assert verify(folder).ok


@pytest.mark.parametrize("name", ["config.json", "../precious.safetensors", "model.safetensors"])
def test_a_save_over_a_hostile_manifest_removes_nothing_else(folder: Path, name: str) -> None:
    target = folder / name
    target.write_text("precious")
    edit(folder, lambda raw: raw["files"][0].update(name=name))
    save(folder, 1, {}, {"t": torch.ones(1)})
    assert target.read_text() == "precious"
    assert verify(folder).ok


class Bomb:
    """Runs code when it is unpickled the careless way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, zipped: bool) -> None:
    torch.save({"w": Bomb(tmp_path / "owned")}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TensorSource(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "a\nb", 3, None]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_points_elsewhere(tmp_path: Path, index: str, file: object) -> None:
    (tmp_path / index).write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(CheckpointError, match="expected a file of the same folder"):
        TensorSource(tmp_path)


@pytest.mark.parametrize("text", [t[1] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_sources_of_hostile_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        TensorSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError):
        TensorSource(tmp_path)
