"""Casts to fp16 and bf16 round to nearest even in every ISA, and keep a NaN's sign and upper bits, made quiet."""

from __future__ import annotations

import ctypes

import pytest
import torch
from fused_cases import isa_names

from dist_lowbit import ops
from dist_lowbit.ops import fused
from dist_lowbit.ops.fused import Finish, Rows

NAN = 0x7F800000  # above it, without the sign, are the NaNs


def narrowed(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp32 numbers, given as int32 bits, as the bits of dtype (int16): torch's cast, and the rule for NaN."""
    rest = bits & 0x7FFFFFFF
    sign = (bits >> 16) & 0x8000
    nan = 0x7E00 | ((rest >> 13) & 0x3FF) if dtype == torch.float16 else (rest >> 16) | 0x40
    numbers = bits.view(torch.float32).to(dtype).view(torch.int16)
    return torch.where(rest > NAN, (sign | nan).to(torch.int16), numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_cast_to_nearest_even_and_nan_stays(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Every upper half of an fp32 number, with lower halves around the ties of both types."""
    lower = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    bits = (upper[:, None] | lower).flatten()[:-3]  # ragged: the tail of a row is code of its own
    want = narrowed(bits, dtype)
    for isa in isa_names():
        ops.select_isa(isa)
        got = fused.rows_apply(Rows(bits.view(torch.float32)[None]), Finish(dtype=dtype))
        assert torch.equal(got[0].view(torch.int16), want), isa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plain", [0, 1])
def test_a_sum_of_one_rank_is_what_was_put_in(dtype: torch.dtype, plain: int, library: ctypes.CDLL) -> None:
    """All 65536 of them to fp32 and back, as sums over ranks do: the same, but for NaNs that were not quiet."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    quiet = 0x200 if dtype == torch.float16 else 0x40
    want = torch.where(torch.isnan(x.view(dtype)), x | quiet, x)
    out, program = torch.empty_like(x), (ctypes.c_int8 * 1)(0)
    sources = (ctypes.c_void_p * 1)(x.data_ptr())
    number = {torch.bfloat16: 1, torch.float16: 2}[dtype]  # enum of kernels/cpu/shm.h
    library.dlb_shm_tree_sum(
        program, ctypes.c_int(1), sources, ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(x.numel()), number, plain
    )
    assert torch.equal(out, want)
