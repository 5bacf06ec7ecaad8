"""Ranks that run the bodies of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lowbit.core.native import native_why_not
from tests.comm.harness import Farm


@pytest.fixture(scope="session")
def decoder_ranks(model_farm: Farm) -> Callable[..., tuple[Path, list[Any]]]:
    """Return a function that runs a body on ranks and returns their folder and values."""
    if native_why_not() is not None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")

    def run(body: str, size: int, timeout: float = 300.0, **args: Any) -> tuple[Path, list[Any]]:
        outcome = model_farm.run(body, size, args, timeout=timeout, environ={"OMP_NUM_THREADS": "1"})
        assert not outcome.late, f"ranks {outcome.late} did not end\n{outcome.output}"
        assert not outcome.errors, "\n".join([*outcome.errors.values(), outcome.output])
        return outcome.folder, [outcome.values[rank] for rank in range(size)]

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch's own operations on the calling thread: its pool costs more than these small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
