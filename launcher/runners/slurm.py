"""srun inside a Slurm allocation: one step of the job is the ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import LaunchError
from ..job import Command, Job
from .foreign import bound_argv, find_program, foreign_command

# Below Linux's ephemeral range, so that no client socket sits on it; jobs of one host differ in their ids.
PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given: the nodes' names, and the CPUs of this node."""

    job: str
    nodes: tuple[str, ...]
    cpus_here: int | None

    def port(self) -> int:
        """Return a port that follows from the job's number."""
        return PORTS[int(self.job) % len(PORTS)]


def expand_nodes(text: str) -> tuple[str, ...]:
    """Return the names in a list such as "n[01-03,7],login1": ranges keep their leading zeros."""
    found: list[str] = []
    for item in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[]*)*", text):
        names = [""]
        for plain, inside in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            endings = [plain] if plain else [number for part in inside.split(",") for number in _range(part, text)]
            names = [name + ending for name in names for ending in endings]
        found += names
    return tuple(found)


def _range(part: str, text: str) -> list[str]:
    first, _, last = part.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise LaunchError(f"SLURM_JOB_NODELIST is {text!r}; expected names such as n[01-03,7]")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Return the allocation that `environ` describes, None outside of one."""
    job = environ.get("SLURM_JOB_ID", "")
    nodes = environ.get("SLURM_JOB_NODELIST", environ.get("SLURM_NODELIST", ""))
    if not job.isdigit() or not nodes:
        return None
    cpus = environ.get("SLURM_CPUS_ON_NODE", "")
    return Allocation(job, expand_nodes(nodes), int(cpus) if cpus.isdigit() else None)


@dataclass(frozen=True)
class SlurmRunner:
    """Starts the ranks by `program`, None where there is no srun, inside `given`, None outside an allocation."""

    program: str | None
    given: Allocation | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    name = "slurm"

    @classmethod
    def find(cls) -> SlurmRunner:
        """Find srun and the allocation."""
        return cls(find_program("srun"), allocation(os.environ), os.environ)

    def backend_exists(self) -> bool:
        return self.why_not() is None

    def why_not(self) -> str | None:
        if self.program is None:
            return "srun is not on PATH"
        if self.given is None:
            return "this is no Slurm allocation (no SLURM_JOB_ID); start it by sbatch, or inside salloc"
        return None

    def command(self, job: Job) -> list[Command]:
        """Return the one srun. Ranks learn who they are from SLURM_PROCID and its like.

        Every node is taken to be like this one. srun's own binding is off, as it knows no uneven sets, but it must be
        told to give the tasks all CPUs of the node: since Slurm 22.05 a step does not inherit --cpus-per-task.
        """
        assert self.program is not None, self.why_not()
        flags = ["--nodes", str(len(job.counts)), "--ntasks", str(job.size)]
        flags += ["--ntasks-per-node", str(len(job.ranks))]
        flags += ["--distribution", "block", "--cpu-bind", "none", "--kill-on-bad-exit=1", "--unbuffered"]
        if self.given is not None and self.given.cpus_here:
            flags += ["--cpus-per-task", str(max(1, self.given.cpus_here // len(job.ranks)))]
        flags += ["--export", "ALL"]
        argv = (self.program, *flags, *bound_argv(job))
        return [foreign_command("srun", job, argv, job.env)]
