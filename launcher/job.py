"""What is to run, as values: a Program, one RankSpec per rank, the Job, and the Commands that a style makes of it."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .backend import backend_defaults
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
    prefer: bool = False  # memory comes from `nodes` first, not only
    mask: Mapping[str, str] = field(default_factory=dict)  # what shows it one device; a part of `env`

    def describe(self) -> str:
        """Return one line for people: where the rank runs."""
        cores = f"CPUs {format_cpulist(self.cpus)}" if self.cpus else "any CPU allowed"
        memory = f"memory of NUMA node {format_cpulist(self.nodes)}" if self.nodes else "any memory"
        first = " first" if self.prefer else ""
        devices = "".join(f", {name}={value}" for name, value in self.mask.items())
        return f"host {self.host}, {cores}, {memory}{first}{devices}"


@dataclass(frozen=True)
class Job:
    """A job as one host starts it: `ranks` are those of this host, `env` is what all ranks share.

    bind: resolved, never "auto". counts: the ranks of each host. node: which of them this is. hosts: their names, where
    a style starts them all from here.
    """

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
    counts: tuple[int, ...] = ()
    node: int = 0
    hosts: tuple[str, ...] = ()
    name: str = ""  # tells one of several instances
    stdin: bool = True  # rank 0 reads what the launcher reads
    ends: str = ""  # where ranks that another launcher starts tell their end

    @property
    def size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(self.counts)


@dataclass(frozen=True)
class Command:
    """One process that the launcher starts and watches: a rank (local style) or another launcher (`rank` None).

    prefix: what stands before each of its lines; None: it owns the launcher's stdout, so that a terminal and partial
    lines work. stdin: "own" is the launcher's, "none" /dev/null, "held" a pipe that is closed to ask for an end.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    rank: int | None = None
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    prefer: bool = False
    prefix: str | None = None
    stdin: str = "own"
    title: str = ""  # how messages call it, if not by its rank or name
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
    counts: tuple[int, ...] = ()  # ranks on each host; empty: all are here
    node: int = 0
    hosts: tuple[str, ...] = ()
    stdin: bool = True


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


def parse_forwarded(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the `-x NAME` options name; LaunchError for one that is not set."""
    missing = [name for name in names if name not in environ]
    if missing:
        raise LaunchError(f"-x {missing[0]} is refused: it is not set here; --env {missing[0]}=VALUE sets it")
    return parse_env([f"{name}={environ[name]}" for name in names])


def make_job(
    program: Program,
    slots: Sequence[Slot],
    place: Place,
    environ: Mapping[str, str],
    *,
    bind: str,
    prefix: bool = True,
    log_dir: str | None = None,
    masks: Sequence[Mapping[str, str]] = (),
    name: str = "",
    style: str = "local",
) -> Job:
    """Return the job of `program` on `slots`, the ranks of this host.

    `environ` is looked at only for what the user has set already: those values win over the launcher's defaults
    (OMP_NUM_THREADS, PYTHONUNBUFFERED so that the last lines of a killed rank are seen, PYTHONFAULTHANDLER so that
    a crash shows where, and what oneCCL wants where it is the backend), and `place.user_env` wins over both.
    """
    counts = place.counts or (len(slots),)
    shared = {
        "WORLD_SIZE": str(sum(counts)),
        "LOCAL_WORLD_SIZE": str(len(slots)),
        "LOCAL_SIZE": str(len(slots)),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        LAUNCH_ID: place.launch_id,
    }
    user = dict(place.user_env)
    defaults = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | backend_defaults({**environ, **user}, style)
    # A style that has one environment for all ranks takes the smallest: ranks in step wait for the slowest.
    threads = {"OMP_NUM_THREADS": str(min(slot.threads for slot in slots))}
    ranks = []
    for local, (slot, mask) in enumerate(zip(slots, masks or [{}] * len(slots), strict=True)):
        rank = sum(counts[: place.node]) + local
        own = {"RANK": str(rank), "LOCAL_RANK": str(local), **shared, **mask}
        own |= _unset({"OMP_NUM_THREADS": str(slot.threads)} | defaults, environ) | user
        ranks.append(RankSpec(rank, local, place.host, own, slot.cpus, slot.nodes, program.argv, slot.prefer, mask))
    rendezvous = {name: shared[name] for name in ("MASTER_ADDR", "MASTER_PORT", LAUNCH_ID)}
    return Job(
        program=program,
        ranks=tuple(ranks),
        bind=bind,
        host=place.host,
        master_addr=place.master_addr,
        master_port=place.master_port,
        launch_id=place.launch_id,
        env=rendezvous | _unset(threads | defaults, environ) | user,
        prefix=prefix,
        log_dir=log_dir,
        counts=counts,
        node=place.node,
        hosts=place.hosts,
        name=name,
        stdin=place.stdin,
    )


def _unset(defaults: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in defaults.items() if name not in environ}
