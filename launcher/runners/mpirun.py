"""The mpirun of Intel MPI, MPICH (Hydra) and Open MPI: one word, three dialects."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..job import Command, Job
from .foreign import bound_argv, find_program, foreign_command

DIALECTS = ("intel", "mpich", "openmpi")


def dialect_of(version: str) -> str | None:
    """Return which of DIALECTS prints `version` for `mpirun --version`, None if none does."""
    if "Intel(R) MPI" in version:
        return "intel"
    if "Open MPI" in version or "OpenRTE" in version:
        return "openmpi"
    return "mpich" if "HYDRA" in version else None


@dataclass(frozen=True)
class MpirunRunner:
    """Starts the ranks by `program`, which speaks `dialect`; `answer` is what it said when it spoke none."""

    program: str | None
    dialect: str | None
    answer: str = ""
    root: bool = False

    name = "mpirun"

    @classmethod
    def find(cls) -> MpirunRunner:
        """Find mpirun and ask it which it is."""
        program = find_program("mpirun")
        if program is None:
            return cls(None, None)
        env = os.environ | _siblings_on_path(program, os.environ.get("PATH", ""))
        try:
            done = subprocess.run(
                [program, "--version"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return cls(program, None, str(error))
        said = done.stdout + done.stderr
        return cls(program, dialect_of(said), said.strip().partition("\n")[0], os.geteuid() == 0)

    def backend_exists(self) -> bool:
        return self.why_not() is None

    def why_not(self) -> str | None:
        if self.program is None:
            return "mpirun is neither beside this Python nor on PATH; `pip install impi-rt` brings Intel MPI's"
        if self.dialect is None:
            return f"{self.program} is none of Intel MPI, MPICH and Open MPI: --version says {self.answer!r}"
        return None

    def command(self, job: Job) -> list[Command]:
        """Return the one mpirun. The ranks learn who they are from it, so RANK and its like are not set.

        Its own prefix (-prepend-rank, --tag-output) stands before every piece that it reads, also in the middle of a
        line, so the trampoline makes the lines.
        """
        assert self.program is not None, self.why_not()
        assert self.dialect is not None, self.why_not()
        flags = {"intel": self._intel, "mpich": self._mpich, "openmpi": self._openmpi}[self.dialect](job)
        program = bound_argv(job, cpus=self.dialect == "openmpi")
        argv = (self.program, *flags, *_hosts(job, self.dialect), "-n", str(job.size), *program)
        return [foreign_command("mpirun", job, argv, _siblings_on_path(self.program, os.environ.get("PATH", "")))]

    def _intel(self, job: Job) -> list[str]:
        if job.bind == "none":
            pin = {"I_MPI_PIN": "0"}
        else:
            masks = (hex(sum(1 << cpu for cpu in spec.cpus)) for spec in job.ranks)
            pin = {"I_MPI_PIN": "1", "I_MPI_PIN_DOMAIN": f"[{','.join(masks)}]"}
        return _genv({**job.env, **pin})

    def _mpich(self, job: Job) -> list[str]:
        sets = ",".join("+".join(map(str, spec.cpus)) for spec in job.ranks)
        return ["-bind-to", "none" if job.bind == "none" else f"user:{sets}", *_genv(job.env)]

    def _openmpi(self, job: Job) -> list[str]:
        # Its own binding knows no uneven sets, so it is off and the trampoline binds. Slots are our business, too.
        flags = ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
        flags += ["--allow-run-as-root"] if self.root else []
        return flags + [part for name, value in job.env.items() for part in ("-x", f"{name}={value}")]


def _hosts(job: Job, dialect: str) -> list[str]:
    """Return the flags that name the hosts; none where all ranks are here."""
    if not job.hosts:
        return []
    pairs = ",".join(f"{host}:{ranks}" for host, ranks in zip(job.hosts, job.counts, strict=True))
    return ["--host" if dialect == "openmpi" else "-hosts", pairs]


def _genv(env: Mapping[str, str]) -> list[str]:
    return [part for name, value in env.items() for part in ("-genv", name, value)]


def _siblings_on_path(program: str, path: str) -> dict[str, str]:
    """Return the PATH that `program` needs, if another: a wheel's mpirun calls its siblings by name."""
    folder = os.path.dirname(program)
    return {} if folder in path.split(os.pathsep) else {"PATH": os.pathsep.join([folder, path or os.defpath])}
