"""Ranks that an MPI launcher has started, over mpi4py: its messages; `native` is MPI's own sum, of fp32.

MPI's waits spin and have no end, so messages are tested for instead, with a look at the peers in between.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from os import sched_yield
from time import monotonic, sleep
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import RankInfo

from . import segment
from .base import BaseGroup
from .calls import ALL_REDUCE, CODES
from .meeting import Exchange, Meeting
from .messages import Call, MessageGroup, Tensors, Works
from .notes import Notes
from .peers import Peer
from .single import SingleGroup
from .watch import Watch

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PALS_SIZE", "PMIX_SIZE")  # how launchers tell the size of their world
# What Intel MPI 2021.18 takes of /dev/shm for each rank of a host: 2.1 to 4.5 MiB were seen with 2 to 16 ranks.
SHARED = 5 << 20
SPIN = 0.0001  # seconds of testing without a pause
YIELD = 0.005  # seconds of testing that lets others run
NAP = 0.0002  # seconds
LOOK = 0.02  # seconds between two looks at the peers


def started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Tell whether an MPI launcher has started this process."""
    return any(name in environ for name in SIZES) or "PMIX_RANK" in environ


def no_room(info: RankInfo, environ: Mapping[str, str]) -> str | None:
    """Return why MPI would be killed by SIGBUS for want of shared memory, or None where there is enough."""
    local = info.local_size or info.world_size
    if local == 1 or environ.get("I_MPI_FABRICS") == "ofi":
        return None
    return segment.no_room(SHARED * local, purpose="MPI's shared memory, which kills its ranks then")


def _finalize(mpi: Any) -> None:
    if not mpi.Is_finalized():
        mpi.Finalize()


@cache
def start() -> tuple[Any, weakref.finalize[..., Any] | None]:
    """Import MPI, which starts it in this process; return the module and, where its end is ours, what ends it.

    Finalizers run last come first, so those of groups that use MPI run before this one.
    """
    ours = "mpi4py.MPI" not in sys.modules
    if ours:
        import mpi4py

        mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI, weakref.finalize(start, _finalize, MPI) if ours else None


def never_finalize() -> None:
    """Leave MPI_Finalize out at the end, if MPI was started: it would wait for ranks that are gone."""
    if not start.cache_info().currsize:
        return
    _, end = start()
    if end is not None:
        end.detach()


class MpiGroup(MessageGroup):
    """Ranks over MPI. After a lost group the process ends without MPI_Finalize, and the launcher ends the job."""

    name = "mpi"

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, notes: Notes, places: list[int]) -> None:
        super().__init__(rank, peers, timeout)
        self._watch = Watch(rank, peers, notes, timeout)
        self._mpi, _ = start()
        self._splits = 0
        self._held: list[Any] = []  # buffers of messages under way, also after a failed call
        self._places = places  # in MPI_COMM_WORLD, by rank
        world = self._mpi.COMM_WORLD
        members = world.group.Incl(places)
        self._comm: Any = self._watch.run("the forming of the group", lambda: world.Create_group(members))
        self._tags = int(self._comm.Get_attr(self._mpi.TAG_UB) or 32767) - 1

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        try:
            metadata.version("mpi4py")
        except metadata.PackageNotFoundError:
            return 'the package mpi4py is not installed (pip install "dist-lowbit[mpi]")'
        if not started_by_mpi(os.environ):
            return "the ranks were not started by an MPI launcher (mpirun, srun --mpi)"
        return no_room(info, os.environ)

    @classmethod
    def prepare(cls) -> None:
        start()

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> MpiGroup:
        world = start()[0].COMM_WORLD
        own: dict[str, Any] = {"place": world.rank, "size": world.size}
        answers = meeting.exchange(own)
        places = [int(answer["place"]) for answer in answers]
        if len(set(places)) != len(places):
            raise CommError(
                f"MPI on rank {meeting.info.rank} sees a world of {world.size} and not its {len(places)} ranks; use "
                "the mpirun of the MPI that mpi4py runs with"
            )
        notes = Notes(PrefixStore("mpi", meeting.store), meeting.info.rank, len(peers), meeting.hosted_by_rank_0)
        return cls(meeting.info.rank, peers, timeout, notes, places)

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            exchange(None)
            return SingleGroup(self.timeout)
        notes = self._watch.notes.among(f"split{self._splits}/{label}", rank, len(peers))
        places = exchange(self._places[self.rank])
        return MpiGroup(rank, peers, self.timeout, notes, places)

    # ---- messages

    def _tag(self, header: Sequence[int]) -> int:
        return 1 + super()._tag(header) % self._tags

    def _buffer(self, x: torch.Tensor) -> list[Any]:
        return [self._mpi.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size()), self._mpi.BYTE]

    def _post(self, call: Call, sends: Tensors, receives: Tensors, tag: int, tag_from: Callable[[int], int]) -> Works:
        works: Works = []
        self._held += [sends, receives]
        for rank, tensor in receives.items():
            if rank != self.rank and tensor.numel():
                works.append((rank, self._comm.Irecv(self._buffer(tensor), rank, tag_from(rank))))
        for rank, tensor in sends.items():
            if rank != self.rank and tensor.numel():
                works.append((rank, self._comm.Isend(self._buffer(tensor), rank, tag)))
        return works

    def _await(self, call: Call, works: Works) -> None:
        self._watch.call, self._watch.limit = str(call), call.timeout
        began = looked = monotonic()
        while works := [(rank, work) for rank, work in works if not work.Test()]:
            now = monotonic()
            if now - began > SPIN:
                sched_yield() if now - began < YIELD else sleep(NAP)
            if now - looked > LOOK:
                looked = now
                self._watch.examine(call.number, now - began, sorted({rank for rank, _ in works}))

    def _exchange(self, call: Call, sends: Tensors, receives: Tensors, counts: list[int] | None = None) -> None:
        super()._exchange(call, sends, receives, counts)
        self._held.clear()

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        if x.dtype != torch.float32:  # MPI has no type for the others
            self._all_reduce(x, timeout)
            return
        call = self._call(ALL_REDUCE, CODES[x.dtype], x.numel(), timeout)
        self._held.append(x)
        buffer = [self._buffer(x)[0], x.numel(), self._mpi.FLOAT]
        self._await(call, [((self.rank + 1) % self.size, self._comm.Iallreduce(self._mpi.IN_PLACE, buffer))])
        self._held.clear()

    # ---- the end

    def _leave(self) -> None:
        never_finalize()
        self._watch.notes.leave(str(self._lost), self.rank if self._culprit is None else self._culprit)

    def close(self) -> None:
        was_lost = self._lost is not None
        if not self._closed():
            if not was_lost:
                self._watch.notes.leave("it was closed", None)
                if not self._mpi.Is_finalized():
                    self._comm.Free()
            self._watch.notes.close()
            self._watch.close()
