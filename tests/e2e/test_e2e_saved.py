"""Checkpoints of split models: written at one degree, read at any other, and refused when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_lowbit.sample
from dist_lowbit.checkpoint import MANIFEST, CheckpointReader
from dist_lowbit.checkpoint.schema import render
from dist_lowbit.optimize import convert
from tests.e2e.command_line import generate_text

SAMPLE = str(dist_lowbit.sample.path())
# family, format, group size; -1 is one group for a whole row, which no cut of K may go through.
SAVED = (
    ("llama", "sym_int4", None),
    ("phi3", "asym_int4", 32),
    ("qwen2", "sym_int8", -1),
    ("qwen3", "nf3", None),
    ("mistral", "zp_int4", -1),
)


@pytest.fixture(scope="module")
def saved(ranks, tiny, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    """Return models saved by four ranks, of which one holds no heads."""
    folder = tmp_path_factory.mktemp("saved")
    entries = [
        {"model": tiny[family], "form": form, "group_size": group, "to": str(folder / f"{family}-{form}")}
        for family, form, group in SAVED
    ]
    entries.append({"model": SAMPLE, "form": "sym_int4", "group_size": None, "to": str(folder / "sample")})
    ranks("save", 4, models=entries)
    return [entry | {"checkpoint": entry["to"]} for entry in entries]


def test_four_ranks_write_four_files(saved) -> None:  # type: ignore[no-untyped-def]
    for entry in saved:
        with CheckpointReader(entry["checkpoint"]) as reader:
            assert reader.tp == len(reader.files) == 4
        # Every file holds a share: no rank writes what all hold.
        sizes = [path.stat().st_size for path in Path(entry["checkpoint"]).glob("lowbit-*.safetensors")]
        assert max(sizes) < 0.6 * sum(sizes)


@pytest.mark.parametrize("tp", [1, 2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (3, 4, 8))])
def test_weights_are_those_of_a_direct_quantization(ranks, saved, tp: int) -> None:  # type: ignore[no-untyped-def]
    _, wrong = ranks("loaded", tp, checkpoints=saved)
    assert wrong == [[]] * tp


def test_convert_writes_what_the_ranks_save(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for number, entry in enumerate(saved):
        place = tmp_path / str(number)
        convert(entry["model"], place, entry["form"], tp=4, group_size=entry["group_size"])
        with CheckpointReader(place) as ours, CheckpointReader(entry["checkpoint"]) as theirs:
            assert ours.weights.keys() == theirs.weights.keys()
            assert ours.tensors.keys() == theirs.tensors.keys()
            assert ours.metadata == theirs.metadata
            for name, info in ours.weights.items():
                other = theirs.weights[name]
                assert (info.format, info.group_size, info.axis) == (other.format, other.group_size, other.axis)
                spans = [(s.file, s.start, s.stop) for s in info.shards]
                assert spans == [(s.file, s.start, s.stop) for s in other.shards], name
                assert ours.read_weight(name).equal(theirs.read_weight(name)), name
            for name in ours.tensors:  # ranks hold norms in the dtype of activations, which is the wider one
                assert torch.equal(ours.read_tensor(name).float(), theirs.read_tensor(name).float()), name


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def _reseal(place: Path, **changes: Any) -> None:
    raw = json.loads((place / MANIFEST).read_text())
    del raw["checksum"]
    raw |= changes
    (place / MANIFEST).write_bytes(render(raw))


def _file(place: Path, rank: int) -> Path:
    return sorted(place.glob("lowbit-*.safetensors"))[rank]


def _metadata(place: Path, **changes: Any) -> None:
    _reseal(place, metadata=json.loads((place / MANIFEST).read_text())["metadata"] | changes)


# What is done to a checkpoint, and what the sentence about it says.
DAMAGE = {
    "missing rank file": (lambda d: _file(d, 1).unlink(), "is missing"),
    "byte of rank 0": (lambda d: _flip(_file(d, 0), _file(d, 0).stat().st_size - 1), "checksum"),
    "byte of rank 1": (lambda d: _flip(_file(d, 1), _file(d, 1).stat().st_size - 1), "checksum"),
    "truncated": (lambda d: _file(d, 0).write_bytes(_file(d, 0).read_bytes()[:-100]), "bytes"),
    "schema": (lambda d: _reseal(d, schema_version=99), "99"),
    "manifest byte": (lambda d: _flip(d / MANIFEST, 500), ""),
    "recipe": (lambda d: _metadata(d, recipe={"format": "sym_int4"}), "recipe"),
    "kept": (lambda d: _metadata(d, kept="lm_head"), "kept"),
    "no recipe": (lambda d: _reseal(d, metadata={}), "kept"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return checkpoints of the sample model for two ranks, each damaged in one way."""
    folder = tmp_path_factory.mktemp("damaged")
    convert(SAMPLE, folder / "whole", "sym_int4", tp=2)
    places = {}
    for name, (harm, _) in DAMAGE.items():
        places[name] = folder / name.replace(" ", "-")
        shutil.copytree(folder / "whole", places[name])
        harm(places[name])
    return places


@pytest.mark.parametrize("tp", [1, 2])
def test_damage_is_told_to_all_ranks_by_name(ranks, damaged, tp: int) -> None:  # type: ignore[no-untyped-def]
    _, told = ranks("load_fails", tp, checkpoints=[str(place) for place in damaged.values()])
    for rank in range(tp):
        for (name, (_, says)), (kind, sentence) in zip(DAMAGE.items(), told[rank], strict=True):
            assert kind == "CheckpointError", (name, rank, sentence)
            assert says in sentence
            assert "\n" not in sentence
            assert damaged[name].name in sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte of rank 1", "missing rank file", "truncated", "schema"])
def test_generate_answers_damage_with_a_sentence(damaged, name: str) -> None:  # type: ignore[no-untyped-def]
    done = generate_text(damaged[name], "-n", "2", "--greedy", "--max-new-tokens", "4")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert DAMAGE[name][1] in done.stderr
    assert done.stdout == ""
