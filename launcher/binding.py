"""Which cores and memory each rank gets: arithmetic over a Topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .errors import LaunchError
from .topology import Core, Topology

MODES = ("auto", "none", "core", "numa", "socket")
MEMORIES = ("near", "hbm")

# More ranks than this on one CPU is a slip of the finger, not a plan: tp = 16 on one CPU still starts.
RANKS_PER_CPU = 16


@dataclass(frozen=True)
class Slot:
    """One rank's place. `cpus` empty: not bound. `nodes` empty: the system's memory policy. `threads` >= 1.

    Memory comes from `nodes` only or, where `prefer` is set, from there first.
    """

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    threads: int
    prefer: bool = False


def auto_ranks(topology: Topology) -> int:
    """Return the number of ranks that "-n auto" means on CPUs: one for each NUMA node with usable cores."""
    return len(_groups(topology.usable, "numa"))


def resolve(topology: Topology, ranks: int, mode: str) -> str:
    """Return what "auto" means for `ranks` on `topology`; any other mode is returned as it is.

    Whole NUMA nodes where each rank gets the same number of them, else cores, else (more ranks than cores) none.
    """
    if mode != "auto":
        return mode
    nodes = len(_groups(topology.usable, "numa"))
    if ranks > 1 and nodes >= ranks and nodes % ranks == 0:
        return "numa"
    return "core" if ranks <= len(topology.usable) else "none"


def bind(
    topology: Topology,
    ranks: int,
    mode: str,
    *,
    hyper_threads: bool = False,
    memory: str = "near",
    near: Sequence[int | None] = (),
) -> tuple[Slot, ...]:
    """Return one Slot per rank; the sets are disjoint and together are all usable cores.

    n cores, nodes or sockets over r ranks are cut at floor(i*n/r): uneven counts leave none idle. Of each core
    the first allowed hyper-thread is taken, all of them with `hyper_threads`. Memory follows in the modes numa
    and socket where a rank has only some of the nodes. memory "hbm": it comes first from the nodes without cores that
    are nearest. near: the NUMA node of each rank's GPU; in the modes auto and numa the ranks of a node then share that
    node's cores. LaunchError if the ranks do not fit.
    """
    if mode not in MODES:
        raise LaunchError(f"--bind {mode} is unknown; the modes are {', '.join(MODES)}")
    _check_count(topology, ranks)
    slots = None
    if mode in ("auto", "numa") and near:
        slots = _bind_near(topology, near, hyper_threads)
    if slots is None:
        slots = _bind_evenly(topology, ranks, resolve(topology, ranks, mode), hyper_threads)
    return _with_hbm(topology, slots) if memory == "hbm" else slots


def _bind_evenly(topology: Topology, ranks: int, mode: str, hyper_threads: bool) -> tuple[Slot, ...]:
    if mode == "none":
        return (Slot((), (), _threads(topology, len(topology.usable) // ranks, ranks)),) * ranks
    groups = _groups(topology.usable, mode)
    if ranks > len(groups):
        noun = {"core": "physical core", "numa": "NUMA node", "socket": "socket"}[mode]
        wider = "--bind none" if mode == "core" else "--bind core"
        have = f"{len(groups)} {noun}{'' if len(groups) == 1 else 's'}"
        raise LaunchError(f"-n {ranks} does not fit --bind {mode}: {have} can be used here; lower -n or use {wider}")
    cuts = [i * len(groups) // ranks for i in range(ranks + 1)]
    pieces = ([core for group in groups[start:stop] for core in group] for start, stop in pairwise(cuts))
    return tuple(_slot(topology, cores, mode in ("numa", "socket"), ranks, hyper_threads) for cores in pieces)


def _bind_near(topology: Topology, near: Sequence[int | None], hyper_threads: bool) -> tuple[Slot, ...] | None:
    """Cut each node's cores among the ranks whose GPU is there; None where a node is unknown or has too few cores."""
    cores_of = {group[0].node: group for group in _groups(topology.usable, "numa")}
    slots = []
    for rank, node in enumerate(near):
        cores = [] if node is None else cores_of.get(node, [])
        sharing = near.count(node)
        place = near[:rank].count(node)
        own = cores[place * len(cores) // sharing : (place + 1) * len(cores) // sharing]
        if not own:
            return None
        slots.append(_slot(topology, own, True, len(near), hyper_threads))
    return tuple(slots)


def _slot(topology: Topology, cores: Sequence[Core], with_memory: bool, ranks: int, hyper_threads: bool) -> Slot:
    cpus = tuple(sorted(cpu for core in cores for cpu in (core.cpus if hyper_threads else core.cpus[:1])))
    nodes = tuple(sorted({core.node for core in cores}))
    partial = with_memory and len(nodes) < len(topology.nodes)
    return Slot(cpus, nodes if partial else (), _threads(topology, len(cpus), ranks))


def _with_hbm(topology: Topology, slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Let the memory of each rank come first from the nodes without cores next to its own."""
    if not topology.memories:
        raise LaunchError("--memory hbm does not fit: no NUMA node here has memory and no cores (HBM in flat mode)")
    node_of = {cpu: core.node for core in topology.cores for cpu in core.cpus}
    found = []
    for slot in slots:
        own = {node_of[cpu] for cpu in slot.cpus} or set(topology.nodes)
        nodes = tuple(sorted(memory for memory, near in topology.memories if near in own))
        found.append(replace(slot, nodes=nodes, prefer=True) if nodes else slot)
    return tuple(found)


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


def _groups(cores: Sequence[Core], mode: str) -> list[list[Core]]:
    """Return cores in the pieces that `mode` does not cut, in their order."""
    if mode == "core":
        return [[core] for core in cores]
    found: dict[int, list[Core]] = {}
    for core in cores:
        found.setdefault(core.node if mode == "numa" else core.package, []).append(core)
    return list(found.values())
