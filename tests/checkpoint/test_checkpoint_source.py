"""Ordinary Hugging Face weights: every layout of files, read by rows; what is damaged gets a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_saving import same_bits, save
from safetensors.torch import save_file

from dist_lowbit.checkpoint import TensorSource
from dist_lowbit.core.errors import CheckpointError

TENSORS = {
    "a.weight": torch.randn(6, 4),
    "b.weight": torch.randn(5, 3).half(),
    "c.weight": torch.randn(4, 2, 3).bfloat16(),
    "d.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
    "bias": torch.randn(7),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "ids": torch.arange(5),
}


def safetensors(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")


def sharded(folder: Path) -> None:
    names = list(TENSORS)
    weight_map = {}
    for i in (0, 1):
        part = {name: TENSORS[name] for name in names[i::2]}
        save_file(part, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin")


def pickled_old(folder: Path) -> None:
    # torch itself cannot read its old format back where it holds float8.
    old = {name: t for name, t in TENSORS.items() if t.dtype != torch.float8_e4m3fn}
    torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_sharded(folder: Path) -> None:
    names = list(TENSORS)
    weight_map = {}
    for i in (0, 1):
        torch.save({name: TENSORS[name] for name in names[i::2]}, folder / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(names[i::2], f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


LAYOUTS = [safetensors, sharded, pickled, pickled_old, pickled_sharded]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep_cache", [True, False])
def test_every_layout_is_read(tmp_path: Path, layout, keep_cache: bool) -> None:
    layout(tmp_path)
    with TensorSource(tmp_path, keep_cache) as source:
        expected = {name: t for name, t in TENSORS.items() if layout != pickled_old or name != "d.weight"}
        assert set(source) == set(expected)
        assert len(source) == len(expected)
        for name, tensor in expected.items():
            assert name in source
            assert (source[name].dtype, source[name].shape) == (tensor.dtype, tuple(tensor.shape))
            assert same_bits(source.read(name), tensor)
            if tensor.ndim and tensor.shape[0] > 3:
                assert same_bits(source.read(name, 1, 3), tensor[1:3])
                assert same_bits(source.read(name, 2), tensor[2:])
                assert source.read(name, 2, 2).shape == (0, *tensor.shape[1:])
            for start, stop in ((0, 99), (-1, None), (2, 1)):
                with pytest.raises(CheckpointError, match=f"{name} of shape .* has no rows"):
                    source.read(name, start, stop)
        assert "x" not in source
        with pytest.raises(CheckpointError, match="holds no tensor 'x'"):
            source.read("x")
    with pytest.raises(CheckpointError, match="is closed"):
        source.read("bias")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_memory_of_its_own(tmp_path: Path, layout) -> None:
    layout(tmp_path)
    with TensorSource(tmp_path) as source:
        source.read("bias").zero_()
        assert same_bits(source.read("bias"), TENSORS["bias"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_files_get_a_sentence(tmp_path: Path, layout) -> None:
    layout(tmp_path)
    path = max(tmp_path.iterdir(), key=lambda p: (p.suffix != ".json", p.name))
    good = path.read_bytes()
    for length in (0, 1, 7, 8, 50, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=path.name), TensorSource(tmp_path) as source:
            [source.read(name) for name in source]


def test_a_shard_that_is_missing_or_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors lacks 'b.weight'"):
        TensorSource(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        TensorSource(tmp_path)


def test_missing_pickled_shards_are_named(tmp_path: Path) -> None:
    pickled_sharded(tmp_path)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin is missing"):
        TensorSource(tmp_path)


def test_what_is_no_model_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights; expected model\.safetensors"):
        TensorSource(tmp_path)
    with pytest.raises(CheckpointError, match="is no directory"):
        TensorSource(tmp_path / "nowhere")
    save(tmp_path, 1, {}, {"a": torch.ones(1)})
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a low-bit checkpoint already"):
        TensorSource(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], {"a": 3}, {"a": {"b": torch.ones(1)}}, {3: torch.ones(1)}, torch.ones(2)])
def test_a_bin_of_something_else_gets_a_sentence(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds"):
        TensorSource(tmp_path)


def test_a_dtype_unknown_to_torch_harms_only_who_reads_it(tmp_path: Path) -> None:
    header = {
        "strange": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "known": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2\3\4")
    with TensorSource(tmp_path) as source:
        assert source["strange"].dtype is None
        assert source.read("known").tolist() == [3, 4]
        with pytest.raises(CheckpointError, match="holds strange as F4"):
            source.read("strange")
