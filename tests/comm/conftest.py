"""Which backends this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_lowbit.comm import BACKENDS
from dist_lowbit.core.native import native_why_not
from dist_lowbit.core.rank import RankInfo
from tests.comm.harness import Farm

OPTIONAL = ("ccl",)  # what needs packages or hardware that a machine may lack
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


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Real ranks."""
    helper = Farm(tmp_path_factory.mktemp("ranks"))
    yield helper
    helper.close()
