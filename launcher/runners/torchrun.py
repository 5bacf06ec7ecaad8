"""torchrun: PyTorch's elastic launcher, without restarts."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

from ..job import Command, Job
from .foreign import bound_argv, find_program, foreign_command


@dataclass(frozen=True)
class TorchrunRunner:
    """Starts the ranks by `program` (an argv), None where PyTorch is missing."""

    program: tuple[str, ...] | None

    name = "torchrun"

    @classmethod
    def find(cls) -> TorchrunRunner:
        """Find torchrun, or this Python's torch (which is not imported)."""
        script = find_program("torchrun")
        if script is not None:
            return cls((script,))
        if importlib.util.find_spec("torch") is not None:
            return cls((sys.executable, "-m", "torch.distributed.run"))
        return cls(None)

    def backend_exists(self) -> bool:
        return self.why_not() is None

    def why_not(self) -> str | None:
        if self.program is None:
            return "torchrun is neither beside this Python nor on PATH, and this Python has no torch"
        return None

    def command(self, job: Job) -> list[Command]:
        """Return the one torchrun. Its own --numa-binding wants GPUs, so the trampoline binds.

        Its own prefix (--tee) stands in the middle of lines, so the trampoline makes those, too.
        """
        assert self.program is not None, self.why_not()
        flags = ["--nnodes", str(len(job.counts)), "--nproc-per-node", str(len(job.ranks)), "--max-restarts", "0"]
        flags += ["--node-rank", str(job.node)] if len(job.counts) > 1 else []
        flags += ["--master-addr", job.master_addr, "--master-port", str(job.master_port)]
        flags += ["--no-python"]
        return [foreign_command("torchrun", job, (*self.program, *flags, *bound_argv(job)), job.env)]
