"""Every backend gives the same bits and the same behaviour: one list of checks, run on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lowbit.comm import BACKENDS, SingleGroup, why_not
from tests.comm import bodies
from tests.comm.conftest import PAIR, require, require_mpirun
from tests.comm.harness import Farm, Outcome, run_under_mpirun

SIZES = (2, 3, 4)
SHARED = [name for name in BACKENDS if name in ("shm", "ccl", "gloo")]  # the others have runs of their own


@pytest.fixture(scope="module")
def outcome(farm: Farm) -> Outcome:
    """Four processes run every check over every backend, in groups of 2, 3 and 4 of them."""
    here = [name for name in SHARED if why_not(PAIR)[name] is None]
    args = {"backends": here, "sizes": list(SIZES)}
    return farm.run("conformance", max(SIZES), args, timeout=100)


@pytest.mark.parametrize("check", bodies.CHECKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", SHARED)
def test_backend(outcome: Outcome, backend: str, size: int, check: str) -> None:
    require(backend)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert sorted(outcome.values) == list(range(max(SIZES))), outcome.output
    assert all(f"{backend}-{size}-{check}" in outcome.values[rank] for rank in range(size))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_under_mpirun(tmp_path: Path, outcome: Outcome, size: int) -> None:
    """MPI, and oneCCL over MPI, on ranks that mpirun starts; with 4 of them also groups of 2 and 3."""
    require_mpirun()
    backends = ["mpi"] + (["ccl"] if why_not(PAIR)["ccl"] is None else [])
    sizes = [n for n in SIZES if n <= size]
    seen = run_under_mpirun(tmp_path, "conformance", size, {"backends": backends, "sizes": sizes})
    assert not seen.errors, next(iter(seen.errors.values()))
    for n in sizes:
        digests = {seen.values[rank][f"{name}-{n}-fingerprints"] for rank in range(n) for name in backends}
        assert digests == {outcome.values[0][f"shm-{n}-fingerprints"]}


@pytest.mark.parametrize("backend", ["nccl", "xccl"])
def test_a_gpu_for_each_rank(farm: Farm, outcome: Outcome, backend: str) -> None:
    require(backend)
    seen = farm.run("conformance", 2, {"backends": [backend], "sizes": [2]}, timeout=100)
    assert not seen.errors, next(iter(seen.errors.values()))
    assert seen.values[0][f"{backend}-2-fingerprints"] == outcome.values[0]["shm-2-fingerprints"]


def test_the_class_behind_nccl_and_xccl(farm: Farm, outcome: Outcome) -> None:
    """Its sums, gathers and splits; the GPU and its library are for machines that have them."""
    require("shm")
    seen = farm.run("device", 3, timeout=60)
    assert not seen.errors, next(iter(seen.errors.values()))
    digests = {value["fingerprints"] for value in seen.values.values()}
    assert digests == {outcome.values[0]["shm-3-fingerprints"]}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_thousand_random_operations(farm: Farm, size: int) -> None:
    """334 for each number of ranks, over every backend that needs no launcher of its own."""
    require("shm")
    backends = [name for name in SHARED if why_not(PAIR)[name] is None]
    outcome = farm.run("many_operations", size, {"backends": backends, "sizes": [size], "operations": 334}, timeout=110)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert outcome.values == {key: [f"{name}-{size}" for name in backends] for key in range(size)}


@pytest.mark.slow
def test_a_thousand_random_operations_over_mpi(tmp_path: Path) -> None:
    require_mpirun()
    args = {"backends": ["mpi"], "sizes": list(SIZES), "operations": 334}
    seen = run_under_mpirun(tmp_path, "many_operations", max(SIZES), args, timeout=110)
    assert not seen.errors, next(iter(seen.errors.values()))
    assert seen.values[0] == [f"mpi-{size}" for size in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 8, 16])
def test_more_ranks_than_cores(farm: Farm, size: int) -> None:
    require("shm")
    outcome = farm.run("conformance", size, {"backends": ["shm"], "sizes": [size]}, timeout=100)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert len({report[f"shm-{size}-fingerprints"] for report in outcome.values.values()}) == 1
    assert len(outcome.values) == size


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_and_backends_give_the_same_bits(outcome: Outcome, size: int) -> None:
    digests = {
        value
        for report in outcome.values.values()
        for name, value in report.items()
        if name.endswith(f"-{size}-fingerprints")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("check", bodies.CHECKS)
def test_single(check: str) -> None:
    with SingleGroup() as group:
        bodies.CHECKS[check](group)
