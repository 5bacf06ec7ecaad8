"""A split Linear is the whole Linear: every format, cut along N and along K, with and without bias, on 1 to 8 ranks."""

from __future__ import annotations

import pytest
import torch

from dist_lowbit.comm import SingleGroup
from dist_lowbit.formats import FORMATS, dequantize
from tests.bounds import cast_bound, linear_bound, reorder_bound
from tests.parallel.split_cases import CASES, Case, PartGroup, by_parts, operands, part, split_of

WHOLE_SEGMENTS = (1, 2, 4, 8)  # degrees whose ranks hold whole segments: the order of the sum is the same


def whole_linear(case: Case, x: torch.Tensor, weight, bias: torch.Tensor | None, compute: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Return the result of one rank."""
    return part(case, weight, bias, split_of(case, weight.group_size, 1), SingleGroup(), compute)(x)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=Case.named)
def test_split_is_whole(case: Case, format: str) -> None:
    row = FORMATS[format]
    x, weight, bias = operands(case, format)
    for compute in ("int8", "fp32"):
        exact = row.integer and compute == "int8"
        bound = reorder_bound(x, weight, compute)
        for b in (None, bias):
            want = whole_linear(case, x, weight, b, compute)
            for tp in (2, 3, 4, 8) if exact and b is None else (2, 3, 4):
                found = by_parts(case, x, weight, b, tp, compute)
                if exact and (tp in WHOLE_SEGMENTS or case.axis == 0):
                    assert torch.equal(found, want), tp
                else:
                    # Adding the bias rounds each of the two results once more.
                    limit = bound if b is None else cast_bound(want, bound, torch.float32, roundings=2)
                    assert bool(((found.double() - want.double()).abs() <= limit).all()), tp


@pytest.mark.parametrize("format", FORMATS)
def test_whole_is_right(format: str) -> None:
    # What the parts are compared with is itself within the bound of the exact product.
    case = Case(33, 576, 1)
    x, weight, _ = operands(case, format)
    for compute in ("int8", "fp32"):
        found = whole_linear(case, x, weight, None, compute)
        error = (found.double() - x.double() @ dequantize(weight).double().T).abs()
        assert bool((error <= linear_bound(x, weight, compute)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_partial_sums_are_not_rounded_to_the_dtype_of_activations(dtype: torch.dtype) -> None:
    case = Case(70, 576, 1)
    x, weight, bias = operands(case, "sym_int8")
    x = x.to(dtype)
    want = whole_linear(case, x, weight, bias, "int8")
    assert want.dtype == dtype
    full = whole_linear(case, x.float(), weight, bias, "int8")
    assert torch.equal(want, full.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_unpack_gives_the_part_back(format: str) -> None:
    for case in CASES:
        _, weight, _ = operands(case, format)
        split = split_of(case, weight.group_size, 3)
        for rank in range(3):
            linear = part(case, weight, None, split, PartGroup(rank), "int8")
            ((start, stop),) = split.ranges[rank]
            assert linear.unpack().equal(weight.split(case.axis, start, stop))
