"""The executor in C++: the bits of the one of torch operations, for programs of every kind, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.decoder.native import NativeDecoder
from dist_lowbit.decoder.torch_decoder import TorchDecoder
from dist_lowbit.ops.library import start_pool
from tests.decoder.program_kinds import ELEMENTS, KINDS, LARGE, ROUTED
from tests.decoder.tiny_programs import Builder, Kind, Runner, mixed, tokens
from tests.e2e.bodies import digest

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = KINDS[0]
NEW = 6  # tokens fed one by one


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native_why_not() is not None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")


@pytest.fixture
def pool() -> Iterator[Callable[[int], None]]:
    """Return a function that sets the number of the kernels' threads; ISA and pool are as before afterwards."""
    library, before = ops.library(), ops.active_isa()
    assert library is not None
    assert before is not None
    yield lambda count: start_pool(library, ops.ThreadPlan(count, ()))
    start_pool(library, ops.plan_here())
    ops.select_isa(before)


def by_both(kind: Kind, dtype: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    program = Builder(kind).program()
    assert NativeDecoder.why_not(program, dtype, "cpu") is None
    found, wanted = (mixed(executor(program), kind, program, dtype) for executor in (NativeDecoder, TorchDecoder))
    assert bool(wanted.isfinite().all())
    assert float(wanted.std()) > 0.1
    return found, wanted


@pytest.mark.parametrize("kind", [*KINDS, *ROUTED, *ELEMENTS], ids=lambda kind: kind.name)
def test_the_bits_of_torch_operations(kind: Kind) -> None:
    # Formats that are no integers too: both executors call the same product with the same rows.
    found, wanted = by_both(kind)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", [PLAIN, KINDS[2]], ids=lambda kind: kind.name)
def test_every_type_of_cache(kind: Kind, dtype: str) -> None:
    found, wanted = by_both(kind, dtype)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", [PLAIN, KINDS[4], ROUTED[1], *LARGE], ids=lambda kind: kind.name)
def test_company_chunks_threads_and_isa_change_no_bit(kind: Kind, pool: Callable[[int], None]) -> None:
    program, text = Builder(kind).program(), tokens(40, kind.vocab)
    pool(1)
    wanted = Runner(NativeDecoder(program), program, 1)
    wanted.feed({0: text})
    best = ops.active_isa()
    for isa, threads in (("scalar", 1), (best, 2), (best, 3), (best, 5)):
        ops.select_isa(str(isa))
        pool(threads)
        runner = Runner(NativeDecoder(program), program, 3, "fp32")
        at = 0
        for count in (1, 30, 2, 1, 6):
            runner.feed({2: tokens(2, kind.vocab, at), 0: text[at : at + count], 1: [at]})
            at += count
        assert torch.equal(runner.all(), wanted.all()), (isa, threads)


def test_more_rows_than_a_slice_holds(pool: Callable[[int], None]) -> None:
    # 600 rows go through the layers in two slices, cut within the third sequence; few rows are wanted.
    kind = replace(PLAIN, layers=2, heads=2, kv_heads=1)
    program = Builder(kind).program()
    texts = [tokens(count, kind.vocab, count) for count in (3, 290, 307)]
    pool(2)
    whole = Runner(NativeDecoder(program), program, 3, "fp16")
    found = whole.feed(dict(enumerate(texts)))
    last = Runner(NativeDecoder(program), program, 3, "fp16")
    assert torch.equal(last.feed(dict(enumerate(texts)), last_only=True), found[[2, 292, 599]])
    for sequence, text in enumerate(texts):
        alone = Runner(NativeDecoder(program), program, 1, "fp16")
        for at in range(0, len(text), 100):
            alone.feed({0: text[at : at + 100]})
        assert torch.equal(alone.all(), whole.all(sequence))
    # A row far on reads several chunks of keys, which threads share.
    again = Runner(NativeDecoder(program), program, 1, "fp16")
    again.feed({0: texts[2][:-1]})
    assert torch.equal(again.feed({0: texts[2][-1:]}), found[599:])


def test_hidden_states_and_given_embeddings() -> None:
    program = Builder(PLAIN).program()
    native, torch_one = (Runner(e(program), program, 1) for e in (NativeDecoder, TorchDecoder))
    text = tokens(9, PLAIN.vocab)
    assert torch.equal(native.feed({0: text}, logits=False), torch_one.feed({0: text}, logits=False))
    embeds = program.embed(torch.tensor(text)).float()
    steps = [replace(runner.step({0: text}), ids=None, embeds=embeds) for runner in (native, torch_one)]
    found, wanted = native.executor.step(steps[0], True), torch_one.executor.step(steps[1], True)
    assert torch.equal(found, wanted)


def test_frequencies_that_go_by_the_length() -> None:
    def of_length(highest: int) -> tuple[torch.Tensor, float]:
        return 1.0 / (10000.0 + 100.0 * highest) ** (torch.arange(0, 32, 2).float() / 32), 1.0 + highest / 100

    kind = replace(PLAIN, rope={"dim": 32, "interleaved": False, "dynamic": of_length})
    found, wanted = by_both(kind)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [3, 200, 7]}, "token ids run from 3 to 200; expected 0 to 199"),
        ({"ids": [3, -1, 7]}, "token ids run from -1 to 7"),
        ({"positions": [0, 1, -2]}, "positions run from -2 to 1"),
        ({"row_begin": [0, 0]}, "row_begin is"),
        ({"row_begin": [0, 2]}, "row_begin is"),
        ({"lengths": [2]}, "lengths are"),
        ({"lengths": [33]}, "lengths are"),
        ({"table": [[99]]}, "a block beyond the 4 of the store"),
        ({"wanted": [1, 1]}, "wanted is"),
        ({"wanted": [3]}, "wanted is"),
        ({"ids": [3, 4]}, "ids holds 2, expected 3"),
        ({"ids": None}, "neither ids nor embeds"),
    ],
)
def test_a_bad_step_is_refused_before_anything_is_written(change: dict[str, Any], message: str) -> None:
    program = Builder(PLAIN).program()
    runner = Runner(NativeDecoder(program), program, 1)
    step = runner.step({0: [3, 5, 7]})
    given = {name: None if value is None else torch.tensor(value, dtype=getattr(step, name).dtype)
             for name, value in change.items()}  # fmt: skip
    with pytest.raises(UsageError, match=message):
        runner.executor.step(replace(step, **given), True)
    assert all(not bool(tensor.any()) for tensor in step.store.tensors())
    runner.executor.step(step, True)


def test_a_position_beyond_the_learned_ones_is_refused() -> None:
    kind = next(kind for kind in KINDS if kind.positions)
    program = Builder(kind).program()
    runner = Runner(NativeDecoder(program), program, 1)
    step = runner.step({0: [3]})
    assert program.positions is not None
    runner.executor.step(replace(step, positions=torch.tensor([len(program.positions) - 3], dtype=torch.int32)), True)
    beyond = replace(step, positions=torch.tensor([len(program.positions) - 2], dtype=torch.int32))
    with pytest.raises(UsageError, match="positions run from"):
        runner.executor.step(beyond, True)


def test_times_memory_and_closing() -> None:
    program = Builder(PLAIN).program()
    decoder = NativeDecoder(program)
    runner = Runner(decoder, program, 1)
    runner.feed({0: tokens(20, PLAIN.vocab)})
    held = decoder.workspace_bytes
    times = decoder.times(reset=True)
    assert (times.steps, times.rows, times.wait) == (1, 20, 0)
    assert min(times.linear, times.attention) > 0
    assert times.total == times.linear + times.attention + times.reduce + times.other
    runner.feed({0: [5]})
    assert decoder.times().rows == 1
    assert decoder.workspace_bytes == held > 0
    decoder.close()
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        runner.feed({0: [5]})


def test_what_it_does_not_take() -> None:
    program = Builder(PLAIN).program()
    attention = program.layers[0].attention
    wide = replace(program, layers=(replace(program.layers[0], attention=replace(attention, head_dim=2048)),))
    other = replace(program, lm_head=Builder(PLAIN).program().lm_head)
    other.lm_head.kernel = "reference"
    for given, dtype, device, why in (
        (program, "fp32", "xpu", "it runs on the CPU, not on xpu"),
        (program, "fp8", "cpu", "kv_cache_dtype is 'fp8'"),
        (wide, "fp32", "cpu", "layer 0: heads have 2048 elements"),
        (other, "fp32", "cpu", "the Linear lm_head runs on kernel 'reference'"),
    ):
        found = NativeDecoder.why_not(given, dtype, device)
        assert str(found).startswith(why)
    with pytest.raises(UsageError, match="heads have 2048 elements"):
        NativeDecoder(wide)


RANKS = ("plain", "fused", "parallel", "shared")


@pytest.mark.slow  # the quick tier has the families of test_families on two ranks
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_ranks_give_the_bits_of_one(decoder_ranks: Callable[..., tuple[Path, list[Any]]], tp: int) -> None:
    # Heads, inner sizes and the vocabulary do not divide by the ranks; of four, one has no head of `fused`.
    kinds = {kind.name: kind for kind in (*KINDS, *ROUTED)}
    found = decoder_ranks("native_digests", tp, kinds=RANKS)[1]
    alone = {name: digest(native(kinds[name])) for name in RANKS}
    if tp in (2, 4):
        assert found == [alone] * tp
    else:  # three ranks add in another order, but all alike
        assert all(one == found[0] for one in found)


def test_a_lost_rank_ends_the_step_by_name(decoder_ranks: Callable[..., tuple[Path, list[Any]]]) -> None:
    found = decoder_ranks("lose_a_rank", 2)[1][0]
    # Rank 1 had slept for 200 ms before the second step.
    assert 0.15e9 < found["wait"] <= found["reduce"]
    assert len(found["heard"]) == 2
    assert all("rank 1" in text for text in found["heard"]), found["heard"]


def native(kind: Kind) -> torch.Tensor:
    program = Builder(kind).program()
    return mixed(NativeDecoder(program), kind, program)
