"""Which backends this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lowbit.comm import BACKENDS
from dist_lowbit.core.native import native_why_not
from dist_lowbit.core.rank import RankInfo
from tests.comm.harness import Farm, mpirun

OPTIONAL = ("ccl", "mpi", "nccl", "xccl")  # what needs packages or hardware that a machine may lack
PAIR = RankInfo(0, 2, 0, 2, "127.0.0.1", 1, "test")


def require(backend: str) -> None:
    """Skip where two ranks of this machine cannot use the backend."""
    reason = BACKENDS[backend].why_not(PAIR)
    if reason is None:
        return
    if native_why_not() is not None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")
    if backend in OPTIONAL:
        pytest.skip(f"no backend {backend}: {reason}")
    pytest.fail(f"{backend}: {reason}")


def require_mpirun() -> None:
    """Skip where there is no mpi4py with an mpirun beside it."""
    require("shm")
    if importlib.util.find_spec("mpi4py") is None or not Path(mpirun()).exists():
        pytest.skip("no backend mpi: mpi4py or mpirun is not installed")


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Real ranks."""
    helper = Farm(tmp_path_factory.mktemp("ranks"))
    yield helper
    helper.close()
