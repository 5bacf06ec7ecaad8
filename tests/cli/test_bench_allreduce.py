"""dist-lowbit bench allreduce: its sizes, and a run over what this machine has."""

from __future__ import annotations

import pytest

from dist_lowbit.bench.allreduce import Sweep, run, size, sizes
from dist_lowbit.core.errors import UsageError
from tests.comm.conftest import require


def test_sizes() -> None:
    assert sizes("16K,4M") == [16384, 4 << 20]
    assert sizes("4K..32K") == [4096, 8192, 16384, 32768]


@pytest.mark.parametrize("text", ["", "K", "4X", "2", "2G", "-4K", "4K..", "4.5K"])
def test_no_size_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="is no size of a message"):
        sizes(text)


def test_a_size_has_a_unit_or_none() -> None:
    assert (size("64"), size("1k"), size("1G")) == (64, 1024, 1 << 30)


@pytest.mark.slow
def test_every_way_is_measured_in_one_run() -> None:
    require("shm")
    lines = list(run(Sweep(["shm", "gloo"], [2], [4096], ["fp32", "bf16"], rounds=2)))
    ways = [(line.backend, line.call, line.dtype) for line in lines]
    assert ways == [
        ("shm", "table", "fp32"),
        ("shm", "python", "fp32"),
        ("gloo", "python", "fp32"),
        ("gloo", "native", "fp32"),
        ("shm", "python", "bf16"),
        ("gloo", "python", "bf16"),
        ("gloo", "native", "bf16"),
    ]
    for line in lines:
        assert 0 < line.median_us <= line.p99_us
        assert line.bus_gbps == pytest.approx(line.bytes / line.median_us / 1e3, rel=0.01, abs=1e-4)
