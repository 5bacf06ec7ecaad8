"""The order of summation: its definition, its link to the kernel's eight segments, and the compiled copy of it."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from dist_lowbit.comm import postfix, tree_sum
from dist_lowbit.comm.messages import SMALL
from dist_lowbit.comm.shm import bind
from dist_lowbit.comm.tree import DTYPES, slots
from dist_lowbit.core.native import native
from tests.comm.bodies import check_sum, same_bits, values
from tests.comm.conftest import require
from tests.comm.harness import ROOT

ORDERS = {
    1: "0",
    2: "(0+1)",
    3: "((0+1)+2)",
    4: "((0+1)+(2+3))",
    5: "(((0+1)+2)+(3+4))",
    6: "(((0+1)+2)+((3+4)+5))",
    7: "(((0+1)+(2+3))+((4+5)+6))",
    8: "(((0+1)+(2+3))+((4+5)+(6+7)))",
}


def written(program: list[int]) -> str:
    stack: list[str] = []
    for step in program:
        stack.append(str(step) if step >= 0 else f"({stack.pop(-2)}+{stack.pop()})")
    return stack[0]


@pytest.mark.parametrize("size", ORDERS)
def test_order(size: int) -> None:
    assert written(postfix(size)) == ORDERS[size]


@pytest.mark.parametrize("size", range(1, 17))
def test_every_rank_is_added_once_in_rank_order(size: int) -> None:
    program = postfix(size)
    assert [step for step in program if step >= 0] == list(range(size))
    assert program.count(-1) == size - 1
    _, places = slots(size)
    assert places == sorted(set(places))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_powers_of_two_are_the_top_of_the_tree_over_eight_segments(size: int) -> None:
    segments = [values(3, segment, 1000, torch.float32) for segment in range(8)]
    whole = tree_sum(segments)
    share = 8 // size

    def partial(rank: int) -> torch.Tensor:  # as the kernel adds the segments that a rank holds
        level = segments[rank * share : (rank + 1) * share]
        while len(level) > 1:
            level = [a + b for a, b in zip(level[0::2], level[1::2], strict=True)]
        return level[0]

    assert same_bits(tree_sum([partial(rank) for rank in range(size)]), whole)


def test_two_hosts_of_four_ranks_give_the_bits_of_eight() -> None:
    parts = [values(4, rank, 1000, torch.float32) for rank in range(8)]
    assert same_bits(tree_sum([tree_sum(parts[:4]), tree_sum(parts[4:])]), tree_sum(parts))


def test_sixteen_bit_sums_are_rounded_once() -> None:
    # 2048 + 1 is no fp16 number: rounding after each addition would lose both ones.
    parts = [torch.tensor([x], dtype=torch.float16) for x in (2048.0, 1.0, 0.0, 1.0)]
    assert tree_sum(parts).item() == 2050.0
    assert tree_sum(parts).dtype == torch.float16


def test_the_sum_may_go_to_a_part() -> None:
    parts = [values(1, rank, 100, torch.bfloat16) for rank in range(3)]
    expected = tree_sum(parts)
    assert tree_sum(parts, parts[1]) is parts[1]
    assert same_bits(parts[1], expected)
    alone = values(1, 0, 5, torch.float32)
    assert tree_sum([alone]).data_ptr() != alone.data_ptr()


def compiled_sum(parts: list[torch.Tensor], scalar: bool) -> torch.Tensor:
    library = native()
    assert library is not None
    order = postfix(len(parts))
    out = torch.empty_like(parts[0])
    bind(library).dlb_shm_tree_sum(
        (ctypes.c_int8 * len(order))(*order),
        len(order),
        (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
        out.data_ptr(),
        out.numel(),
        DTYPES.index(out.dtype),
        int(scalar),
    )
    return out


@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "best"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_sum_is_the_same(dtype: torch.dtype, scalar: bool) -> None:
    require("shm")
    for size in range(2, 17):
        for count in (1, 7, 8, 33, 512, 1500):
            parts = [values(size, rank, count, dtype) for rank in range(size)]
            total = compiled_sum(parts, scalar)
            assert same_bits(total, tree_sum(parts)), (size, count)
            check_sum(total, parts)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_compiled_conversions_of_every_sixteen_bit_number(dtype: torch.dtype) -> None:
    """x + 0 passes every number through widening and rounding; the sum with its neighbour rounds on every exponent."""
    require("shm")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    small = (every.float() * 2.0**-9).to(dtype)  # falls on ties and between, subnormals included
    for other in (torch.zeros_like(every), small, every.roll(1), every.flip(0)):
        scalar, best = compiled_sum([every, other], True), compiled_sum([every, other], False)
        expected = tree_sum([every, other])
        known = ~expected.isnan()  # which of two NaNs an addition passes on is the compiler's choice
        for total in (scalar, best):
            assert torch.equal(total.isnan(), ~known)
            assert same_bits(total[known], expected[known])


def test_oneccl_and_the_other_messages_have_one_border_of_small_sums() -> None:
    """Measured against one another they must do the same at the same size."""
    shim = (ROOT / "kernels" / "ccl" / "shim.cpp").read_text()
    factors = re.findall(r"constexpr size_t kSmall = (\d+) \* (\d+);", shim)
    assert [int(a) * int(b) for a, b in factors] == [SMALL]
