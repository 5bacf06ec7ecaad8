"""The dtypes of the decoder's cache on the sample model: memory, perplexity, and which bits may change."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dist_lowbit.sample
from dist_lowbit.decoder.kv_memory import KvMemory
from dist_lowbit.transformers import AutoModelForCausalLM

SAMPLE = str(dist_lowbit.sample.path())
STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball that she loved very much. One day the "
    "ball rolled under the big bed. Lily looked and looked, but it was too dark to see. Her brother Tom came with a "
    "lamp. He said, do not worry, I can help you. They found the ball together and played in the garden until it was "
    "time to eat. Mom gave them warm soup and bread, and they were happy. "
)
DTYPES = ("fp32", "bf16", "fp16", "int8")


Loaded = Callable[[str], torch.nn.Module]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Return a function from a cache's dtype to the sample model with such caches, loaded once."""

    @functools.cache
    def load(dtype: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(SAMPLE, load_in_low_bit="sym_int8", kv_cache_dtype=dtype)

    return load


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(torch.exp(model(ids, labels=ids).loss))


def text() -> str:
    """Return the held-out text where it is, else a story."""
    data = os.environ.get("DIST_LOWBIT_TEST_DATA")
    return (Path(data) / "text" / "storyteller-heldout.txt").read_text(encoding="utf-8") if data else STORY * 4


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Return four stretches of 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    ids = tokenizer(text()[:20000] if len(text()) > 4000 else text() * 3, return_tensors="pt", verbose=False).input_ids
    count = min(4, ids.shape[1] // 512)
    return ids[:, : count * 512].reshape(count, 512)


@pytest.fixture(scope="module")
def exact(loaded: Loaded, windows: torch.Tensor) -> float:
    """Return the perplexity with a cache in fp32."""
    return perplexity(loaded("fp32"), windows)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_perplexity(dtype: str, loaded: Loaded, windows: torch.Tensor, exact: float) -> None:
    """Within half a percent of a cache in fp32: what users are promised."""
    rounded = perplexity(loaded(dtype), windows)
    assert exact > 1
    assert abs(rounded / exact - 1) < 0.005, (exact, rounded)


def test_memory(loaded: Loaded, windows: torch.Tensor) -> None:
    sizes = {}
    for dtype in DTYPES:
        model = loaded(dtype)
        with torch.inference_mode():
            cache = model(windows[:1], use_cache=True).past_key_values
        store = cache.layers[0].batch.blocks.store
        sizes[dtype] = sum(t.numel() * t.element_size() for t in store.tensors())
    assert sizes["fp32"] == 2 * sizes["fp16"] == 2 * sizes["bf16"]
    # Codes of one byte and a scale of two bytes for each 32 of them, over two bytes: 34 / 64.
    assert sizes["int8"] / sizes["fp16"] == 34 / 64 <= 0.55


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_a_prompt_change_no_bit(dtype: str, loaded: Loaded, windows: torch.Tensor) -> None:
    model = loaded(dtype)
    ids = windows[:1, :100]
    with torch.inference_mode():
        whole = model(ids).logits
        cache = model(ids[:, :41], use_cache=True).past_key_values
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((41, 42), (42, 90), (90, 100))]
    assert torch.equal(torch.cat(parts, 1), whole[:, 41:])


def resident(tensor: torch.Tensor) -> int:
    """Return how many bytes of memory lie under a tensor, by the kernel's own entries for its pages."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.numel() * tensor.itemsize) // page)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as entries:
        entries.seek(8 * first)
        pages = struct.unpack(f"<{last - first}Q", entries.read(8 * (last - first)))
    return page * sum(entry >> 63 for entry in pages)  # bit 63: the page is there


def test_the_memory_of_a_cache_is_taken_when_written_and_given_back_by_tensor() -> None:
    shape, size = (8, 4, 256, 64), 8 * 4 * 256 * 64 * 4
    memory = KvMemory([(shape, torch.float32)] * 3, "cpu")
    assert [resident(tensor) for tensor in memory.tensors] == [0, 0, 0]
    assert all(not tensor.any() for tensor in memory.tensors)
    for tensor in memory.tensors:
        tensor.fill_(1.0)
    assert [resident(tensor) for tensor in memory.tensors] == [size, size, size]
    memory.drop(1)
    assert [resident(tensor) for tensor in memory.tensors] == [size, 0, size]
    assert memory.tensors[0].all()
    assert not memory.tensors[1].any()
    assert memory.tensors[2].all()
