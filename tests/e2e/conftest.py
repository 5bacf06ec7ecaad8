"""Ranks, and the models that they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lowbit.core.native import native_why_not
from tests.comm.harness import Farm
from tests.e2e.tiny import FAMILIES, write_stranger, write_tiny

# One thread a rank: up to eight ranks share the machine. Results do not depend on it.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Skip where the kernels are missing: pure torch gives the same bits, in many times the time."""
    if native_why_not() is not None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")


@pytest.fixture(scope="session")
def ranks(model_farm: Farm) -> Callable[..., tuple[Path, list[Any]]]:
    """Return a function that runs a body on ranks and returns their folder (with what they say) and values."""

    def run(body: str, size: int, timeout: float = 100.0, **args: Any) -> tuple[Path, list[Any]]:
        outcome = model_farm.run(body, size, args, timeout=timeout, environ=ONE_THREAD)
        assert not outcome.late, f"ranks {outcome.late} did not end\n{outcome.output}"
        assert not outcome.errors, "\n".join([*outcome.errors.values(), outcome.output])
        return outcome.folder, [outcome.values[rank] for rank in range(size)]

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the directories of the tiny models, by family."""
    folder = tmp_path_factory.mktemp("tiny")
    models = {family: str(write_tiny(folder, family)) for family in FAMILIES}
    return models | {"gpt2": str(write_stranger(folder))}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch's own operations on the calling thread: its pool costs more than these small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
