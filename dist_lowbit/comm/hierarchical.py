"""Ranks of several machines: shared memory within each, one leader per machine between them.

A sum is added on every machine first and then over the machines. Where this is another order than the tree's (machines
with different numbers of ranks, or three machines of two) the group is refused, so the bits are always those of a flat
backend.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup
from .ccl import CclGroup
from .gloo import GlooGroup
from .meeting import Exchange, Meeting
from .mpi import MpiGroup, never_finalize
from .notes import Notes
from .peers import Peer, one_machine, some
from .shm import ShmGroup
from .single import SingleGroup
from .tree import ADD, postfix

OUTER: tuple[type[BaseGroup], ...] = (CclGroup, MpiGroup, GlooGroup)  # between machines, best first
LEADERS = 5.0  # seconds that the others of a machine give their leader to tell what the other machines did
NEWS = 0.5  # seconds for the note of one who has left to arrive


def composes(hosts: int, ranks: int) -> bool:
    """Tell whether the tree over `hosts` of the trees over `ranks` each is the tree over all of them."""
    inner = postfix(ranks)
    within = {host: [step if step == ADD else step + host * ranks for step in inner] for host in range(hosts)}
    nested = [step for outer in postfix(hosts) for step in (within[outer] if outer != ADD else [ADD])]
    return nested == postfix(hosts * ranks)


def layout(peers: Sequence[Peer]) -> list[list[int]] | str:
    """Return the ranks of each machine, in order, or why they cannot form a hierarchy."""
    machines: dict[str, list[int]] = {}
    for peer in peers:
        machines.setdefault(peer.machine, []).append(peer.rank)
    hosts = list(machines.values())
    if len(hosts) == 1:
        return "all ranks are on one machine"
    if [rank for host in hosts for rank in host] != list(range(len(peers))):
        return "the ranks of a machine are not numbered one after another"
    sizes = sorted({len(host) for host in hosts})
    if sizes == [1]:
        return "there is one rank on each machine"
    if len(sizes) > 1 or not composes(len(hosts), sizes[0]):
        counts = ", ".join(str(len(host)) for host in hosts)
        return f"the machines have {counts} ranks, and adding machine by machine would give other bits"
    return hosts


class HierarchicalGroup(BaseGroup):
    """A shm group on each machine and a group of their first ranks."""

    name = "hierarchical"

    def __init__(
        self, meeting: Meeting, peers: Sequence[Peer], timeout: float, inner: BaseGroup, outer: BaseGroup | None
    ) -> None:
        super().__init__(meeting.info.rank, peers, timeout)
        self.inner = inner
        self.outer = outer  # the leaders have it
        self._meeting = meeting
        self._local = inner.size
        self._notes = Notes(PrefixStore("notes", meeting.store), self.rank, self.size, meeting.hosted_by_rank_0)
        self._splits = 0

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if info.local_size == info.world_size:
            return "all ranks are on one machine"
        local = info.local_size or 2
        return ShmGroup.why_not(replace(info, world_size=local, local_size=local))

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> HierarchicalGroup:
        hosts = layout(peers)
        if isinstance(hosts, str):
            raise CommError(f"hierarchical: {hosts}")
        outer_class = _between(meeting)
        outer_class.prepare()
        rank = meeting.info.rank
        host = next(number for number, ranks in enumerate(hosts) if rank in ranks)
        inner: BaseGroup | None = None
        outer: BaseGroup | None = None
        try:
            near = meeting.apart(f"machine{host}", hosts[host].index(rank), len(hosts[host]), near=True)
            inner = ShmGroup.connect(near, some(peers, hosts[host]), timeout)
            if inner.rank == 0:
                leaders = [ranks[0] for ranks in hosts]
                between = meeting.apart("leaders", host, len(hosts), near=False)
                outer = outer_class.connect(between, some(peers, leaders), timeout)
            inner.barrier(timeout + LEADERS)
        except BaseException:
            for group in (outer, inner):
                if group is not None:
                    group.close()
            raise
        return cls(meeting, peers, timeout, inner, outer)

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            return SingleGroup(self.timeout)
        # Subgroups may be of different kinds, so each has a meeting of its own.
        meeting = self._meeting.apart(f"split{self._splits}/{label}", rank, len(peers), near=one_machine(peers))
        with meeting.watching(peers):
            if one_machine(peers):
                return ShmGroup.connect(meeting, peers, self.timeout)
            if isinstance(layout(peers), str):
                return _between(meeting).connect(meeting, peers, self.timeout)
            return HierarchicalGroup.connect(meeting, peers, self.timeout)

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        # 16-bit numbers are rounded once, at the end, as the tree does.
        wide = x if x.dtype == torch.float32 else x.float()
        self._inside(lambda: self.inner._all_reduce(wide, timeout))
        self._over(lambda outer: outer._all_reduce(wide, timeout))
        self._inside(lambda: self.inner._broadcast(_bytes(wide), 0, timeout + LEADERS))
        if wide is not x:
            x.copy_(wide)

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        self._inside(lambda: self.inner._all_reduce(x, timeout))
        self._over(lambda outer: outer._all_reduce_native(x, timeout))
        self._inside(lambda: self.inner._broadcast(_bytes(x), 0, timeout + LEADERS))

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        n = self._local
        blocks = [sum(counts[start : start + n]) for start in range(0, self.size, n)]
        host = self.rank // n
        start = sum(blocks[:host])
        block = out[start : start + blocks[host]]
        self._inside(lambda: self.inner._all_gather(x, block, counts[host * n : host * n + n], timeout))
        self._over(lambda outer: outer._all_gather(block.clone(), out, blocks, timeout))
        self._inside(lambda: self.inner._broadcast(out, 0, timeout + LEADERS))

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        host, place = divmod(source, self._local)
        if self.rank // self._local == host and place:
            self._inside(lambda: self.inner._broadcast(x, place, timeout))
        self._over(lambda outer: outer._broadcast(x, host, timeout))
        self._inside(lambda: self.inner._broadcast(x, 0, timeout + LEADERS))

    def _barrier(self, timeout: float) -> None:
        self._inside(lambda: self.inner._barrier(timeout))
        self._over(lambda outer: outer._barrier(timeout))
        self._inside(lambda: self.inner._barrier(timeout + LEADERS))

    # ---- errors and the end

    def _inside(self, call: Any) -> None:
        first = self.rank - self.rank % self._local
        self._named_errors(call, lambda rank: first + rank)

    def _over(self, call: Any) -> None:
        outer = self.outer
        if outer is not None:
            self._named_errors(lambda: call(outer), lambda rank: rank * self._local)

    def _named_errors(self, call: Any, world: Any) -> None:
        """Make a call of a part; an error names the rank of this group that is at fault, however far away."""
        try:
            call()
        except CommError as error:
            rank = None if error.rank is None else world(error.rank)
            self._notes.refresh()
            deadline = time.monotonic() + NEWS
            while self._notes.asking and time.monotonic() < deadline:
                time.sleep(0.005)
            told = [(who, note) for who, note in self._notes.left.items() if note["rank"] is not None]
            told.sort(key=lambda entry: " has left the group" in entry[1]["message"])  # who saw it comes first
            if not told:
                raise CommError(str(error), rank) from error
            who, note = told[0]
            if " has left the group" in note["message"]:
                raise CommError(note["message"], note["rank"]) from error
            raise CommError(f"{self.peers[who]} has left the group: {note['message']}", note["rank"]) from error

    def _leave(self) -> None:
        self._notes.leave(str(self._lost), self.rank if self._culprit is None else self._culprit)
        for group in (self.outer, self.inner):
            if group is not None:
                group.abandon(str(self._lost))
        never_finalize()  # a leader's MPI has left it out

    def close(self) -> None:
        if not self._closed():
            for group in (self.outer, self.inner):
                if group is not None:
                    group.close()
            self._notes.close()


def _between(meeting: Meeting) -> type[BaseGroup]:
    """Return the best backend that every rank of the meeting can use between machines."""
    answers = meeting.exchange([backend.why_not(meeting.info) for backend in OUTER])
    for number, backend in enumerate(OUTER):
        if all(answer[number] is None for answer in answers):
            return backend
    reasons = "; ".join(f"{backend.name}: {why}" for backend, why in zip(OUTER, answers[0], strict=True))
    raise CommError(f"no backend connects the machines ({reasons})")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(-1).view(torch.uint8)
