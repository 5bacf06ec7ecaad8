"""What the tests of the compiled kernels share: the library or a skip, its ISAs, and a thread count for a while."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_lowbit import ops
from dist_lowbit.core.native import native_why_not
from dist_lowbit.ops.library import start_pool


def library() -> ctypes.CDLL:
    """Return the compiled library, or skip the test."""
    found = ops.library()
    if found is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")
    return found


@contextmanager
def each_isa() -> Iterator[list[int]]:
    """Give the numbers of the ISAs that this machine runs; the active one is back afterwards."""
    lib = library()
    active = lib.dlb_isa_active()
    try:
        yield [i for i in range(lib.dlb_isa_count()) if lib.dlb_isa_supported(i)]
    finally:
        lib.dlb_isa_select(active)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with a pool of `count` threads."""
    lib = library()
    start_pool(lib, ops.ThreadPlan(count, ()))
    try:
        yield
    finally:
        start_pool(lib, ops.plan_here())
