"""What is to run, as values: a Program, one RankSpec per rank, the Job, and the Commands that a style makes of it."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .binding import Slot
from .errors import LaunchError
from .topology import format_cpulist

LAUNCH_ID = "DIST_LOWBIT_LAUNCH_ID"

# Names that tell a rank who it is: the launcher sets them, so --env may not.
CONTRACT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    LAUNCH_ID,
)

# What another launcher may have left in the environment. A rank that inherits it takes itself for a part of that
# job: torch's env:// waits for an agent's store, an MPI library for the process manager behind PMI_FD.
STALE = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|GROUP_RANK|GROUP_WORLD_SIZE"
    r"|ROLE_.*|TORCHELASTIC_.*|PMI_.*|PMIX_(RANK|NAMESPACE|SERVER_.*)|OMPI_COMM_WORLD_.*|PALS_.*|MPI_LOCAL.*)"
)


@dataclass(frozen=True)
class Program:
    """What each rank runs. `kind`: "script" (python FILE), "module" (python -m NAME) or "program" (as it is)."""

    kind: str
    target: str
    args: tuple[str, ...] = ()
    python: str = "python"

    @property
    def argv(self) -> tuple[str, ...]:
        before = {"script": (self.python,), "module": (self.python, "-m"), "program": ()}[self.kind]
        return (*before, self.target, *self.args)


@dataclass(frozen=True)
class RankSpec:
    """One rank. `env` comes on top of the inherited environment; empty `cpus` or `nodes` mean not bound."""

    rank: int
    local_rank: int
    host: str
    env: Mapping[str, str]
    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    command: tuple[str, ...]

    def describe(self) -> str:
        """Return one line for people: where the rank runs."""
        cores = f"CPUs {format_cpulist(self.cpus)}" if self.cpus else "any CPU allowed"
        memory = f"memory of NUMA node {format_cpulist(self.nodes)}" if self.nodes else "any memory"
        return f"host {self.host}, {cores}, {memory}"


@dataclass(frozen=True)
class Job:
    """A job on one host. `env` is what all ranks share; `bind` is resolved (never "auto")."""

    program: Program
    ranks: tuple[RankSpec, ...]
    bind: str
    host: str
    master_addr: str
    master_port: int
    launch_id: str
    env: Mapping[str, str]
    prefix: bool = True
    log_dir: str | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Command:
    """One process that the launcher starts and watches: a rank (local style) or another launcher (`rank` None)."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    rank: int | None = None
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    prefix: bool = True  # False: owns the launcher's stdin and stdout, so a terminal and partial lines work
    log: str | None = None  # its output goes to LOG.out and LOG.err as well
    death_signal: int = signal.SIGKILL  # what it gets when the launcher itself is killed

    def shell(self) -> str:
        """Return the line to type into a shell for the same process (binding apart)."""
        env = [f"{k}={shlex.quote(v)}" for k, v in self.env.items()]
        return " ".join(["env", *env, shlex.join(self.argv)]) if env else shlex.join(self.argv)


@dataclass(frozen=True)
class Place:
    """Where ranks meet and how the job is told from others."""

    host: str
    master_port: int
    launch_id: str
    master_addr: str = "127.0.0.1"
    user_env: Mapping[str, str] = field(default_factory=dict)


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without what another launcher left there."""
    return {k: v for k, v in environ.items() if STALE.fullmatch(k) is None}


def parse_env(items: Sequence[str]) -> dict[str, str]:
    """Return the variables of the `--env K=V` options; LaunchError for another form or a name of the contract."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--env {item!r} is not of the form NAME=VALUE")
        if name in CONTRACT:
            other = "; use --master-port" if name == "MASTER_PORT" else ""
            raise LaunchError(f"--env {name} is refused: the launcher sets {name} for each rank{other}")
        if "\0" in value:
            raise LaunchError(f"--env {name} is refused: its value holds a zero byte")
        found[name] = value
    return found


def make_job(
    program: Program,
    slots: Sequence[Slot],
    place: Place,
    environ: Mapping[str, str],
    *,
    bind: str,
    prefix: bool = True,
    log_dir: str | None = None,
) -> Job:
    """Return the job of `program` on `slots`.

    `environ` is looked at only for what the user has set already: those values win over the launcher's defaults
    (OMP_NUM_THREADS, PYTHONUNBUFFERED so that the last lines of a killed rank are seen, PYTHONFAULTHANDLER so that
    a crash shows where), and `place.user_env` wins over both.
    """
    shared = {
        "WORLD_SIZE": str(len(slots)),
        "LOCAL_WORLD_SIZE": str(len(slots)),
        "LOCAL_SIZE": str(len(slots)),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        LAUNCH_ID: place.launch_id,
    }
    defaults = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    # A style that has one environment for all ranks takes the smallest: ranks in step wait for the slowest.
    threads = {"OMP_NUM_THREADS": str(min(slot.threads for slot in slots))}
    ranks = []
    for rank, slot in enumerate(slots):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
        own |= _unset({"OMP_NUM_THREADS": str(slot.threads)} | defaults, environ) | dict(place.user_env)
        ranks.append(RankSpec(rank, rank, place.host, own, slot.cpus, slot.nodes, program.argv))
    rendezvous = {name: shared[name] for name in ("MASTER_ADDR", "MASTER_PORT", LAUNCH_ID)}
    return Job(
        program=program,
        ranks=tuple(ranks),
        bind=bind,
        host=place.host,
        master_addr=place.master_addr,
        master_port=place.master_port,
        launch_id=place.launch_id,
        env=rendezvous | _unset(threads | defaults, environ) | dict(place.user_env),
        prefix=prefix,
        log_dir=log_dir,
    )


def _unset(defaults: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in defaults.items() if name not in environ}
