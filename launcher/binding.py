"""Which cores and memory each rank gets: arithmetic over a Topology."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .errors import LaunchError
from .topology import Core, Topology

MODES = ("auto", "none", "core", "numa", "socket")

# More ranks than this on one CPU is a slip of the finger, not a plan: tp = 16 on one CPU still starts.
RANKS_PER_CPU = 16


@dataclass(frozen=True)
class Slot:
    """One rank's place. `cpus` empty: not bound. `nodes` empty: the system's memory policy. `threads` >= 1."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    threads: int


def resolve(topology: Topology, ranks: int, mode: str) -> str:
    """Return what "auto" means for `ranks` on `topology`; any other mode is returned as it is.

    Whole NUMA nodes where each rank gets the same number of them, else cores, else (more ranks than cores) none.
    """
    if mode != "auto":
        return mode
    nodes = len(_groups(topology, "numa"))
    if ranks > 1 and nodes >= ranks and nodes % ranks == 0:
        return "numa"
    return "core" if ranks <= len(topology.usable) else "none"


def bind(topology: Topology, ranks: int, mode: str, *, hyper_threads: bool = False) -> tuple[Slot, ...]:
    """Return one Slot per rank; the sets are disjoint and together are all usable cores.

    n cores, nodes or sockets over r ranks are cut at floor(i*n/r): uneven counts leave none idle. Of each core
    the first allowed hyper-thread is taken, all of them with `hyper_threads`. Memory follows in the modes numa
    and socket where a rank has only some of the nodes. LaunchError if the ranks do not fit.
    """
    if mode not in MODES:
        raise LaunchError(f"--bind {mode} is unknown; the modes are {', '.join(MODES)}")
    _check_count(topology, ranks)
    mode = resolve(topology, ranks, mode)
    if mode == "none":
        return (Slot((), (), _threads(topology, len(topology.usable) // ranks, ranks)),) * ranks
    groups = _groups(topology, mode)
    if ranks > len(groups):
        noun = {"core": "physical core", "numa": "NUMA node", "socket": "socket"}[mode]
        wider = "--bind none" if mode == "core" else "--bind core"
        have = f"{len(groups)} {noun}{'' if len(groups) == 1 else 's'}"
        raise LaunchError(f"-n {ranks} does not fit --bind {mode}: {have} can be used here; lower -n or use {wider}")
    cuts = [i * len(groups) // ranks for i in range(ranks + 1)]
    slots = []
    for start, stop in pairwise(cuts):
        cores = [core for group in groups[start:stop] for core in group]
        cpus = tuple(sorted(cpu for core in cores for cpu in (core.cpus if hyper_threads else core.cpus[:1])))
        nodes = tuple(sorted({core.node for core in cores}))
        partial = mode in ("numa", "socket") and len(nodes) < len(topology.nodes)
        slots.append(Slot(cpus, nodes if partial else (), _threads(topology, len(cpus), ranks)))
    return tuple(slots)


def _check_count(topology: Topology, ranks: int) -> None:
    if ranks < 1:
        raise LaunchError(f"-n {ranks} does not fit: a job has at least 1 rank")
    limit = RANKS_PER_CPU * len(topology.cpus)
    if ranks > limit:
        have = f"{len(topology.cpus)} CPU{'' if len(topology.cpus) == 1 else 's'}"
        raise LaunchError(f"-n {ranks} does not fit: {have} can be used here, for at most {limit} ranks")


def _threads(topology: Topology, wanted: int, ranks: int) -> int:
    """Return a rank's thread count: `wanted`, but no more than its part of a cgroup's quota, and at least 1."""
    if topology.quota is not None:
        wanted = min(wanted, int(topology.quota / ranks))
    return max(1, wanted)


def _groups(topology: Topology, mode: str) -> list[list[Core]]:
    """Return the usable cores in the pieces that `mode` does not cut, in the topology's order."""
    if mode == "core":
        return [[core] for core in topology.usable]
    found: dict[int, list[Core]] = {}
    for core in topology.usable:
        found.setdefault(core.node if mode == "numa" else core.package, []).append(core)
    return list(found.values())
