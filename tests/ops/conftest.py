"""Fixtures of the kernels' tests: every ISA that this CPU has, and pools of one and two threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.core.native import native_why_not
from dist_lowbit.ops import threads
from dist_lowbit.ops.library import start_pool


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """The compiled library; afterwards its ISA and its pool are as before."""
    lib = ops.library()
    if lib is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")
    before = ops.active_isa()
    yield lib
    assert before is not None
    ops.select_isa(before)
    start_pool(lib, threads.plan_here())


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240607)
