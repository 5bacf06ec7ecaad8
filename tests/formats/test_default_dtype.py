"""The default dtype of torch has no part in a format."""

from __future__ import annotations

import pytest
import torch

from dist_lowbit.formats import FORMATS, lookup
from dist_lowbit.formats.quantizer import dequantize, quantize


@pytest.mark.parametrize("name", [name for name in FORMATS if lookup(name).codec == "codebook"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_and_numbers_are_the_same_under_any(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    want = quantize(x, lookup(name), 64)
    numbers = dequantize(want)
    torch.set_default_dtype(dtype)
    try:
        got = quantize(x, lookup(name), 64)
        again = dequantize(got)
    finally:
        torch.set_default_dtype(torch.float32)
    for part, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[part], tensor), part
    assert again.dtype == numbers.dtype == torch.float32
    assert torch.equal(again, numbers)
