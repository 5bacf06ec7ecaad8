"""Who am I among the ranks of this job: read from the environment that a launcher sets.

`discover` is pure: the same mapping gives the same answer. `current` reads this process's environment.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import UsageError

Environ = Mapping[str, str]

# Derived ports lie below Linux's ephemeral range (32768 and up), so no client socket sits on them.
PORTS = range(20000, 32000)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Processes that start ranks, as /proc/<pid>/comm shows them (15 characters).
STARTERS = (
    *("hydra_pmi_proxy", "pmi_proxy", "mpirun", "mpiexec", "mpiexec.hydra"),
    *("orted", "prted", "prterun", "slurmstepd", "palsd", "torchrun", "deepspeed"),
)


@dataclass(frozen=True)
class RankInfo:
    """One rank's place in the job. A local_size of 0 means that the launcher does not tell it."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    source: str  # which launcher's variables these are
    hosted: bool = False  # the launcher itself listens at the master's port (torchrun's agent)
    attempt: int = 0  # how often the launcher has restarted the ranks


@dataclass(frozen=True)
class _Style:
    source: str
    rank: str
    sizes: tuple[str, ...]
    local_ranks: tuple[str, ...]
    local_sizes: tuple[str, ...]
    jobs: tuple[str, ...] = ()  # variables that all ranks of one job share and no other job has


# In order of precedence. Slurm is no row: its variables also stand in the shell that starts another launcher.
_STYLES = (
    _Style("environment", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Style(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Style(
        "pals",
        "PALS_RANKID",
        ("PMI_SIZE", "WORLD_SIZE", "PALS_LOCAL_SIZE"),
        ("PALS_LOCAL_RANKID",),
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        ("PALS_APID",),
    ),
    _Style(
        "pmi",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)


def _number(environ: Environ, name: str) -> int:
    text = environ[name]
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}; expected a whole number from the launcher") from None
    if number < 0:
        raise UsageError(f"{name} is {number}; expected 0 or more from the launcher")
    return number


def _first(environ: Environ, names: tuple[str, ...]) -> int | None:
    return next((_number(environ, name) for name in names if name in environ), None)


def _read(style: _Style, environ: Environ) -> RankInfo | None:
    """Return what one style's variables say, or None where they are absent."""
    if style.rank not in environ:
        return None
    size = _first(environ, style.sizes)
    if size is None:
        wanted = " or ".join(style.sizes)
        raise UsageError(f"{style.rank} is set and {wanted} is not; start all ranks with one launcher or set both")
    rank = _number(environ, style.rank)
    local_rank = _first(environ, style.local_ranks)
    local_size = _first(environ, style.local_sizes)
    return _complete(style.source, rank, size, local_rank, local_size, environ)


def _complete(
    source: str, rank: int, size: int, local_rank: int | None, local_size: int | None, environ: Environ
) -> RankInfo:
    addr = environ.get("MASTER_ADDR", "")
    if size < 1 or rank >= size:
        raise UsageError(
            f"the launcher's variables ({source}) say rank {rank} of {size}; expected a rank below the size"
        )
    one_host = size == 1 or addr in LOOPBACK or (not addr and local_size in (None, size))
    if local_size is None:
        local_size = size if one_host else 0
    if local_rank is None:
        if not one_host:
            raise UsageError(
                f"the launcher's variables ({source}) give no local rank and MASTER_ADDR is {addr or 'not set'}; "
                "set LOCAL_RANK and LOCAL_WORLD_SIZE for each rank"
            )
        local_rank = rank
    if local_size > size or (local_size and local_rank >= local_size):
        raise UsageError(
            f"the launcher's variables ({source}) say local rank {local_rank} of {local_size} in a world of {size}; "
            "expected a local rank below the local size and a local size of at most the world's"
        )
    return RankInfo(rank, size, local_rank, local_size, addr, 0, source)


def _slurm_local_size(environ: Environ) -> int | None:
    """Return the tasks on this node from a list such as `2(x3),1`, whose entries follow the node numbers."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in environ:
        return None
    node = _number(environ, "SLURM_NODEID")
    for part in text.split(","):
        tasks, _, repeat = part.rstrip(")").partition("(x")
        if not tasks.isdecimal() or (repeat and not repeat.isdecimal()):
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected entries such as 2 or 2(x3)")
        node -= int(repeat or 1)
        if node < 0:
            return int(tasks)
    return None


def _slurm(environ: Environ) -> RankInfo | None:
    """Return what srun says inside a step of several tasks; elsewhere its variables describe another process."""
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    size = _first(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    if size is None or size < 2:
        return None
    local_rank = _first(environ, ("SLURM_LOCALID",))
    rank = _number(environ, "SLURM_PROCID")
    return _complete("slurm", rank, size, local_rank, _slurm_local_size(environ), environ)


def _named(info: RankInfo) -> str:
    return f"rank {info.rank} of {info.world_size} ({info.source})"


def _choose(environ: Environ) -> RankInfo | None:
    found = [info for style in _STYLES if (info := _read(style, environ)) is not None]
    slurm = _slurm(environ)
    if not found:
        return slurm
    first = found[0]
    # torchrun inside mpirun or srun is one launcher on each host: the inner one counts.
    if first.source == "environment" and "TORCHELASTIC_RUN_ID" in environ:
        hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = _first(environ, ("TORCHELASTIC_RESTART_COUNT",)) or 0
        return replace(first, source="torchrun", hosted=hosted, attempt=attempt)
    for other in found[1:]:
        if (other.rank, other.world_size) != (first.rank, first.world_size):
            raise UsageError(
                f"the environment says both {_named(first)} and {_named(other)}; "
                "remove the variables that another launcher left behind"
            )
    return first


def _port(environ: Environ, info: RankInfo, job: str) -> int:
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 65536:
            raise UsageError(f"MASTER_PORT is {port}; expected a port from 1 to 65535")
        return port
    jobs = [name for style in _STYLES if style.source == info.source for name in style.jobs if name in environ]
    if info.source == "slurm":
        jobs = ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    key = " ".join(environ.get(name, "") for name in jobs) or job
    digest = hashlib.sha256(f"{info.source} {info.world_size} {key}".encode()).digest()
    return PORTS[int.from_bytes(digest[:8], "big") % len(PORTS)]


def discover(environ: Environ, job: str = "") -> RankInfo:
    """Return this rank's place in the job from a launcher's variables; a world of one where there are none.

    Known: RANK and friends (torchrun, deepspeed, our launcher), Open MPI, PALS, PMI (Intel MPI, MPICH), and Slurm
    inside a step of several tasks, in this order. Without MASTER_ADDR ranks of one host meet at 127.0.0.1; without
    MASTER_PORT the port follows from the job's id or from `job`, a text that the ranks of this job share and no other
    job has. Contradictions and halves are a UsageError.
    """
    info = _choose(environ)
    if info is None:
        if environ.get("WORLD_SIZE", "1") != "1":
            size = environ["WORLD_SIZE"]
            raise UsageError(f"WORLD_SIZE is {size} and no RANK is set; start the ranks with a launcher or unset it")
        return RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "none")
    if info.world_size == 1:
        return replace(info, master_addr=info.master_addr or "127.0.0.1")
    addr = info.master_addr
    if not addr:
        if info.local_size != info.world_size:
            raise UsageError(
                f"{info.world_size} ranks run on several hosts ({info.local_size} on this one) and MASTER_ADDR is not "
                "set; set it and MASTER_PORT to an address of rank 0's host"
            )
        addr = "127.0.0.1"
    return replace(info, master_addr=addr, master_port=_port(environ, info, job))


def _read_stat(pid: int) -> list[str]:
    # The command's name in the second field may hold blanks and brackets: the fields start after its last one.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: with the pid it names one process for ever."""
    return int(_read_stat(pid)[19])


def job_key(pid: int) -> str:
    """Return a text that the ranks of this host's job share: the process that started them, and when.

    That is the nearest ancestor known to start ranks (ranks may be wrapped in shells), else the parent.
    """

    def name(process: int) -> str:
        return Path(f"/proc/{process}/comm").read_text().strip()

    try:
        parent = int(_read_stat(pid)[1])
        ancestor = parent
        while ancestor > 1 and name(ancestor) not in STARTERS:
            ancestor = int(_read_stat(ancestor)[1])
        chosen = ancestor if ancestor > 1 else parent
        return f"{chosen}:{start_time(chosen)}" if chosen > 0 else "init"
    except OSError as error:
        raise UsageError(f"cannot read /proc to find this job's launcher ({error}); set MASTER_PORT") from error


def current() -> RankInfo:
    """Return this process's place in its job."""
    info = discover(os.environ)
    if info.world_size == 1 or "MASTER_PORT" in os.environ:
        return info
    return discover(os.environ, job_key(os.getpid()))
