"""Every backend gives the same bits and the same behaviour: one list of checks, run on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lowbit.comm import BACKENDS, SingleGroup, why_not
from tests.comm import bodies
from tests.comm.conftest import PAIR, require, require_mpirun
from tests.comm.harness import Farm, Outcome, run_under_mpirun

SIZES = (2, 3, 4)
QUICK = (2, 3)  # hierarchical has 4 among the quick tests
SHARED = [name for name in BACKENDS if name in ("shm", "ccl", "gloo")]  # the others have runs of their own


def outcome_of(farm: Farm, sizes: tuple[int, ...]) -> Outcome:
    """Processes run every check over every backend, in groups of so many of them."""
    here = [name for name in SHARED if why_not(PAIR)[name] is None]
    return farm.run("conformance", max(sizes), {"backends": here, "sizes": list(sizes)}, timeout=100)


@pytest.fixture(scope="module")
def outcome(farm: Farm) -> Outcome:
    return outcome_of(farm, QUICK)


@pytest.fixture(scope="module")
def outcome_of_four(farm: Farm) -> Outcome:
    return outcome_of(farm, (4,))


def check_backend(outcome: Outcome, backend: str, size: int, check: str) -> None:
    require(backend)
    assert not outcome.errors, next(iter(outcome.errors.values()))
    assert outcome.values.keys() >= set(range(size)), outcome.output
    assert all(f"{backend}-{size}-{check}" in outcome.values[rank] for rank in range(size))


@pytest.mark.parametrize("check", bodies.CHECKS)
@pytest.mark.parametrize("size", QUICK)
@pytest.mark.parametrize("backend", SHARED)
def test_backend(outcome: Outcome, backend: str, size: int, check: str) -> None:
    check_backend(outcome, backend, size, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", bodies.CHECKS)
@pytest.mark.parametrize("backend", SHARED)
def test_backend_of_four_ranks(outcome_of_four: Outcome, backend: str, check: str) -> None:
    check_backend(outcome_of_four, backend, 4, check)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_under_mpirun(tmp_path: Path, size: int) -> None:
    """MPI, and oneCCL over MPI, on ranks that mpirun starts; with 4 of them also groups of 2 and 3."""
    require_mpirun()
    backends = ["mpi"] + (["ccl"] if why_not(PAIR)["ccl"] is None else [])
    sizes = [n for n in SIZES if n <= size]
    seen = run_under_mpirun(tmp_path, "conformance", size, {"backends": backends, "sizes": sizes})
    assert not seen.errors, next(iter(seen.errors.values()))
    for n in sizes:
        digests = {seen.values[rank][f"{name}-{n}-fingerprints"] for rank in range(n) for name in backends}
        assert digests == {bodies.fingerprints_of(n)}


@pytest.mark.parametrize("backend", ["nccl", "xccl"])
def test_a_gpu_for_each_rank(farm: Farm, backend: str) -> None:
    require(backend)
    seen = farm.run("conformance", 2, {"backends": [backend], "sizes": [2]}, timeout=100)
    assert not seen.errors, next(iter(seen.errors.values()))
    assert seen.values[0][f"{backend}-2-fingerprints"] == bodies.fingerprints_of(2)


def test_the_class_behind_nccl_and_xccl(farm: Farm) -> None:
    """Its sums, gathers and splits; the GPU and its library are for machines that have them."""
    require("shm")
    seen = farm.run("device", 3, timeout=60)
    assert not seen.errors, next(iter(seen.errors.values()))
    digests = {value["fingerprints"] for value in seen.values.values()}
    assert digests == {bodies.fingerprints_of(3)}


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


def check_same_bits(outcome: Outcome, size: int) -> None:
    """All ranks and backends have the tree's bits."""
    digests = {
        value
        for report in outcome.values.values()
        for name, value in report.items()
        if name.endswith(f"-{size}-fingerprints")
    }
    assert digests == {bodies.fingerprints_of(size)}


@pytest.mark.parametrize("size", QUICK)
def test_all_ranks_and_backends_give_the_same_bits(outcome: Outcome, size: int) -> None:
    check_same_bits(outcome, size)


@pytest.mark.slow
def test_all_four_ranks_and_backends_give_the_same_bits(outcome_of_four: Outcome) -> None:
    check_same_bits(outcome_of_four, 4)


@pytest.mark.parametrize("check", bodies.CHECKS)
def test_single(check: str) -> None:
    with SingleGroup() as group:
        bodies.CHECKS[check](group)
