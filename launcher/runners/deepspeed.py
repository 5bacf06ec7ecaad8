"""DeepSpeed's launcher on one machine."""

from __future__ import annotations

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
        flags = ["--num_accelerators", str(job.size), "--no_local_rank"]
        flags += ["--master_addr", job.master_addr, "--master_port", str(job.master_port)]
        flags += ["--enable_each_rank_log", job.log_dir] if job.log_dir else []
        program = bound_argv(job)
        if program != job.program.argv or job.program.kind == "program":
            flags += ["--no_python"]
        else:
            flags += ["--module"] if job.program.kind == "module" else []
            program = (job.program.target, *job.program.args)
        env = {**job.env, "DS_ACCELERATOR": job.env.get("DS_ACCELERATOR", self.accelerator)}
        return [foreign_command("deepspeed", job, (self.program, *flags, *program), env)]
