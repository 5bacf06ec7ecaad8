"""The styles: each is a class that turns a Job into Commands. A new style is one class and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..job import Command, Job
from .deepspeed import DeepspeedRunner
from .local import LocalRunner
from .mpirun import MpirunRunner
from .slurm import SlurmRunner
from .torchrun import TorchrunRunner


class Runner(Protocol):
    """A style of starting ranks."""

    @property
    def name(self) -> str: ...

    def backend_exists(self) -> bool:
        """Return whether this machine has what the style needs."""
        ...

    def why_not(self) -> str | None:
        """Return one sentence on what is missing, None if nothing is."""
        ...

    def command(self, job: Job) -> list[Command]:
        """Return the processes to start, without starting any."""
        ...


RUNNERS: dict[str, Callable[[], Runner]] = {
    "local": LocalRunner,
    "mpirun": MpirunRunner.find,
    "torchrun": TorchrunRunner.find,
    "deepspeed": DeepspeedRunner.find,
    "slurm": SlurmRunner.find,
}
