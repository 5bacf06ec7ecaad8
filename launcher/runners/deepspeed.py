"""DeepSpeed's launcher on one machine."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass

from ..job import Command, Job
from .foreign import bound_argv, find_program, foreign_command


@dataclass(frozen=True)
class DeepspeedRunner:
    """Starts the ranks by `program`, None where DeepSpeed is missing; `accelerator` is DS_ACCELERATOR."""

    program: str | None
    accelerator: str = "cpu"

    name = "deepspeed"

    @classmethod
    def find(cls) -> DeepspeedRunner:
        """Find the deepspeed script."""
        return cls(find_program("deepspeed"), os.environ.get("DS_ACCELERATOR", "cpu"))

    def backend_exists(self) -> bool:
        return self.why_not() is None

    def why_not(self) -> str | None:
        if self.program is None:
            return "deepspeed is neither beside this Python nor on PATH; `pip install deepspeed` brings it"
        return None

    def command(self, job: Job) -> list[Command]:
        """Return the one deepspeed.

        Its --bind_cores_to_rank needs the numactl program, ignores the cpuset and drops the remainder of an uneven
        split, so the trampoline binds. --no_local_rank: a script gets the arguments that it was given and no more.
        """
        assert self.program is not None, self.why_not()
        if len(job.counts) > 1:
            start, flags = _node_launcher(job)
        else:
            start, flags = (self.program,), ["--num_accelerators", str(len(job.ranks)), "--no_local_rank"]
        flags += ["--master_addr", job.master_addr, "--master_port", str(job.master_port)]
        flags += ["--no_python"]
        env = {**job.env, "DS_ACCELERATOR": job.env.get("DS_ACCELERATOR", self.accelerator)}
        return [foreign_command("deepspeed", job, (*start, *flags, *bound_argv(job)), env)]


def _node_launcher(job: Job) -> tuple[tuple[str, ...], list[str]]:
    """Return how one of several hosts starts its ranks: by what `deepspeed` itself runs on each host of a hostfile."""
    world = {f"node{node}": list(range(ranks)) for node, ranks in enumerate(job.counts)}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    start = (job.program.python, "-u", "-m", "deepspeed.launcher.launch")
    return start, ["--world_info", encoded, "--node_rank", str(job.node), "--no_local_rank"]
