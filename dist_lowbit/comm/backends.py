"""The table of backends, and forming a group with one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from logging import INFO, WARNING

from torch.distributed.distributed_c10d import Store

from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.core.rank import RankInfo, current
from dist_lowbit.core.settings import settings

from .base import BaseGroup
from .ccl import CclGroup
from .device import NcclGroup, XcclGroup
from .gloo import GlooGroup
from .group import Group, Json
from .hierarchical import HierarchicalGroup, layout
from .meeting import Meeting, meet
from .mpi import MpiGroup
from .peers import Peer, from_json, myself, one_machine, to_json
from .shm import ShmGroup
from .single import SingleGroup

_ALL = (SingleGroup, ShmGroup, HierarchicalGroup, CclGroup, MpiGroup, GlooGroup, NcclGroup, XcclGroup)
BACKENDS: Mapping[str, type[BaseGroup]] = {backend.name: backend for backend in _ALL}
AUTO = ("shm", "hierarchical", "ccl", "mpi", "gloo")  # best first


def why_not(info: RankInfo) -> dict[str, str | None]:
    """Return, for every backend, why this rank cannot use it; None where it can."""
    return {name: backend.why_not(info) for name, backend in BACKENDS.items()}


def _refusal(name: str, facts: list[Json], peers: list[Peer]) -> str | None:
    """Return why one of the ranks refuses the backend, or None if all take it."""
    for rank, fact in enumerate(facts):
        reason = fact["why_not"][name]
        if reason is not None:
            return f"{name} on rank {rank}: {reason}"
    if name == "shm" and not one_machine(peers):
        return "shm: the ranks are on several machines or in several containers"
    if name == "hierarchical" and isinstance(reason := layout(peers), str):
        return f"hierarchical: {reason}"
    return None


def _choose(facts: list[Json], peers: list[Peer], rank: int) -> str:
    """Return the backend's name: the same on every rank, since all decide from the same facts."""
    asked = [fact["backend"] for fact in facts]
    if len(set(asked)) > 1:
        wishes = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(asked))
        raise UsageError(f"the ranks ask for different backends ({wishes}); set DIST_LOWBIT_BACKEND alike on all")
    near = one_machine(peers)
    best = [name for name in AUTO if not (near and name == "hierarchical")]
    names = best if asked[0] == "auto" else [asked[0]]
    refusals: list[str] = []
    for name in names:
        reason = _refusal(name, facts, peers)
        if reason is None:
            if refusals and rank == 0:
                # On one machine this costs much speed, so it is said aloud; across machines it is the ordinary case.
                logger.log(WARNING if near else INFO, "%s is used instead of %s", name, "; ".join(refusals))
            return name
        refusals.append(reason)
    raise CommError(f"no backend can connect the ranks: {'; '.join(refusals)}")


def _form(meeting: Meeting, facts: list[Json], timeout: float) -> Group:
    """Choose a backend and connect the ranks with it; if that fails, all of them get to know why."""
    info = meeting.info
    peers = [from_json(fact["peer"], rank) for rank, fact in enumerate(facts)]
    group: BaseGroup | None = None
    with meeting.watching(peers):
        try:
            chosen = BACKENDS[_choose(facts, peers, info.rank)]
            group = chosen.connect(meeting, peers, timeout)
            meeting.part()
        except BaseException:
            if group is not None:
                group.close()
            meeting.leave()
            raise
    group.hold(meeting.store)
    return group


def init_group(
    backend: str = "auto",
    rank_info: RankInfo | None = None,
    timeout: float | None = None,
    *,
    prefix: str = "world",
    store: Store | None = None,
) -> Group:
    """Form a group of ranks and return it; close it when done (or use it in a `with`).

    All ranks call it together, with the same `backend` and `prefix`. `rank_info` is this rank's place, by default
    what the launcher set; for a subgroup pass another rank and world_size and a prefix of its own, or split a group.
    `backend` is a name of BACKENDS or auto: DIST_LOWBIT_BACKEND if set, else the first of shm (one machine),
    hierarchical (several), ccl, mpi and gloo that all ranks have; a warning tells why shm is not used on one machine.
    A world of one is `single` whatever the name. `timeout` (seconds, default DIST_LOWBIT_TIMEOUT) bounds the wait for
    the ranks here and is the group's default. `store` is a torch.distributed store to meet at, instead of the one at
    MASTER_ADDR:MASTER_PORT. Neither needs nor touches torch.distributed's default group; where that one meets at the
    same address, form it before this group or while this group is open. Raises CommError, UsageError.
    """
    info = current() if rank_info is None else rank_info
    name = settings().backend if backend == "auto" else backend
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"{name!r} is no backend; expected auto, {', '.join(BACKENDS)}")
    limit = settings().timeout if timeout is None else timeout
    if info.world_size == 1:
        return SingleGroup(limit)
    facts = {
        "peer": to_json(myself(info.rank)),
        "why_not": why_not(info),
        "backend": name,
    }
    meeting, answers = meet(info, limit, prefix, facts, store)
    return _form(meeting, answers, limit)


def subgroup_info(info: RankInfo, ranks: list[int]) -> RankInfo:
    """Return the place of one of `ranks` (world ranks) in the group of just these, for `init_group`."""
    if info.rank not in ranks or len(set(ranks)) != len(ranks):
        raise UsageError(f"rank {info.rank} asks for a group of ranks {ranks}; expected itself among distinct ranks")
    return replace(info, rank=ranks.index(info.rank), world_size=len(ranks), local_size=0)
