"""Where prepacked weights live."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from dist_lowbit.ops.weight_memory import WeightMemory


def test_weights_lie_one_behind_the_other_without_touching() -> None:
    memory, sizes = WeightMemory(), [100_000, 65_536, 3_000_001, 100_000]
    tensors = [memory.empty(size) for size in sizes]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.dtype == torch.uint8
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == size  # a copy of one copies no other
        assert bool((tensor == i + 1).all())
    first = tensors[0].data_ptr()
    assert tensors[-1].data_ptr() + sizes[-1] - first < sum(sizes) + 64 * len(sizes)


@pytest.mark.parametrize("size", [0, 64, 1 << 20, 20 << 20, 70 << 20])
def test_every_size_is_given(size: int) -> None:
    tensor = WeightMemory().empty(size)
    assert tensor.shape == (size,)
    tensor[-1:] = 7
    assert torch.equal(copy.deepcopy(tensor)[-1:], tensor[-1:])


def test_pieces_are_followed_by_others() -> None:
    memory = WeightMemory()
    tensors = [memory.empty(12 << 20) for _ in range(7)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    assert [int(tensor.sum()) for tensor in tensors] == [i * (12 << 20) for i in range(7)]


def test_a_piece_goes_with_the_last_weight_in_it() -> None:
    memory = WeightMemory()
    tensors = [memory.empty(12 << 20) for _ in range(6)]  # five in the first piece
    start = tensors[0].data_ptr()
    assert _is_mapped(start)
    kept = tensors[4]
    del tensors[:5]
    gc.collect()
    assert _is_mapped(start)
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None
    assert not _is_mapped(start)


def test_the_last_piece_goes_too() -> None:
    memory = WeightMemory()
    tensors = [memory.empty(12 << 20) for _ in range(2)]
    start = tensors[0].data_ptr()
    assert _is_mapped(start)
    tensors.clear()
    assert not _is_mapped(start)
    again = memory.empty(12 << 20)
    again.fill_(1)
    assert int(again.sum()) == 12 << 20


def _is_mapped(address: int) -> bool:
    ranges = (re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line) for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(found[1], 16) <= address < int(found[2], 16) for found in ranges if found)
