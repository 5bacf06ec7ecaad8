"""dist-lowbit bench allreduce: its sizes, and a run over what this machine has."""

from __future__ import annotations

import pytest

from dist_lowbit.bench.allreduce import Sweep, size, sizes, without_mpi
from dist_lowbit.cli.bench_allreduce import run
from dist_lowbit.core.errors import UsageError
from tests.cli.command_line import Cli
from tests.comm.conftest import require


def test_sizes() -> None:
    assert sizes("16K,4M") == [16384, 4 << 20]
    assert sizes("4K..32K") == [4096, 8192, 16384, 32768]


@pytest.mark.parametrize("text", ["", "K", "4X", "2", "2G", "-4K", "4K..", "4.5K"])
def test_no_size_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"--bytes holds .*; expected sizes of 4 to 1G bytes"):
        sizes(text)


def test_a_size_has_a_unit_or_none() -> None:
    assert (size("64"), size("1k"), size("1G")) == (64, 1024, 1 << 30)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--bytes", "32M..4K"], "--bytes holds '32M..4K', which begins above its end; write 4K..32M"),
        (["--bytes", "5"], "--bytes holds 5, no whole number of fp32 elements of 4 bytes"),
        (["--bytes", "4K,7", "--dtype", "bf16"], "--bytes holds 7, no whole number of bf16 elements of 2 bytes"),
        (["--backends", "shm,tcp"], "--backends is 'tcp'; expected shm or ccl or mpi or gloo"),
        (["--ranks", "1"], "--ranks is '1'; a sum over one rank takes no time, expected 2 or more"),
        (["--rounds", "0"], "--rounds is '0'; expected numbers of 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_start(cli: Cli, words: list[str], text: str) -> None:
    done = cli("bench", "allreduce", *words)
    assert done.code == 2
    assert text in done.sentence()


def test_mpi_alone_is_not_left_out_silently() -> None:
    assert without_mpi(["shm", "mpi", "gloo"], "there is no mpirun") == ["shm", "gloo"]
    with pytest.raises(UsageError, match="--backends names mpi alone, which cannot be measured: there is no mpirun"):
        without_mpi(["mpi"], "there is no mpirun")


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
