"""The decoder's own loop and its executor between calls: tokens on and on, threads, another default dtype."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lowbit import optimize_model
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.blocks import BlockTables
from dist_lowbit.decoder.step import BLOCK_SLOTS
from dist_lowbit.engine.loop import DecodeLoop, backbone_of, most_likely

ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "by length": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}
PROMPTS = [[1, 2, 3] * 10 + [4], [5, 6, 7], [9] * 40]


def fused(low_bit: str = "sym_int4", rope: str = "plain", **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=48,
        rope_parameters=ROPES[rope],
        eos_token_id=None,
    )
    return optimize_model(LlamaForCausalLM(config).eval(), low_bit, **options)


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("decoder", ["native", "torch"])
@pytest.mark.parametrize("rope", ROPES)
def test_sequences_that_grow_together_give_each_ones_own_tokens(rope: str, decoder: str) -> None:
    model, new = fused(rope=rope, decoder=decoder), 2 * BLOCK_SLOTS + 3
    want = [greedy(model, prompt, new) for prompt in PROMPTS]
    loop = DecodeLoop(backbone_of(model))
    for _ in range(2):
        steps = [loop.start(PROMPTS)]
        for _ in range(new - 1):
            steps.append(loop.go_on(steps[-1]))
        assert [list(tokens) for tokens in zip(*steps, strict=True)] == want
    assert loop.start([PROMPTS[1]]) == want[1][:1]
    assert loop.go_on(want[1][:1]) == want[1][1:2]


def test_positions_beyond_the_first_table() -> None:
    """Positions past 512 and past a million get the angles of Hugging Face's forward, in any order of calls."""
    ours, theirs = fused("fp16", compute="fp32"), fused("fp16", compute="fp32", optimize_llm=False)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for first in (0, 600, 300_000_000, 7, 3_000_000, 100):
        positions = first + torch.arange(5)[None]
        got, want = (model(ids, position_ids=positions).logits for model in (ours, theirs))
        # Both round fp32(position) * inv_freq alike (decoder/rope.py) and then differ by roundings: in 2 layers of
        # sums of at most 128 products, of numbers below one, fewer than 1,000 of 2^-24 each, or 6e-5. Angles of another
        # distance between tokens move these logits by 4e-3; at 3e8 fp32 gives neighbours one angle.
        assert float((got - want).abs().max()) < 1e-4, first


def test_the_first_of_the_highest_is_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -2.0, -1.0]])
    assert most_likely(logits) == [1, 0]


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_threads_that_share_a_model_get_their_own_tokens(decoder: str) -> None:
    model = fused(decoder=decoder)
    prompts = [[i + 1, 2, 3, 4 + i] for i in range(4)]
    want, got = [greedy(model, prompt, 20) for prompt in prompts], {}

    def run(i: int) -> None:
        got[i] = greedy(model, prompts[i], 20)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got.get(i) for i in range(4)] == want


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf4", "fp16"])
@pytest.mark.parametrize("decoder", ["native", "torch", "off"])
def test_the_default_dtype_of_torch_changes_nothing(decoder: str, low_bit: str, default_dtype: None) -> None:
    options: dict[str, Any] = {"optimize_llm": False} if decoder == "off" else {"decoder": decoder}
    ids = torch.tensor([PROMPTS[0]])
    model = fused(low_bit, **options)
    want = model(ids).logits
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        got = model(ids).logits
        torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32
        assert torch.equal(got, want), dtype


def test_ids_that_int32_does_not_hold_are_refused() -> None:
    model = fused()
    with pytest.raises(UsageError, match="token ids run from"):
        model(torch.tensor([[2**32 + 1]]))
    with pytest.raises(UsageError, match="positions run from"):
        model(torch.tensor([[1]]), position_ids=torch.tensor([[-(2**32)]]))


def test_a_cache_grows_once_for_all_rows() -> None:
    tables = BlockTables(backbone_of(fused()).program, "fp32")
    tables.start(8)
    stores = [tables.store]
    tables.make_room([100] * 8)
    stores.append(tables.store)
    for sequence in range(8):
        tables.extend(sequence, 100)
    assert tables.store is stores[1]
    assert tables.lengths == [100] * 8
