"""Ranks on any hosts over TCP: torch's gloo, used for its point to point messages only; `native` is its own sum."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup
from .calls import ALL_REDUCE, CODES
from .interface import own_address
from .meeting import Exchange, Meeting
from .messages import Call, MessageGroup, Tensors, Works
from .notes import Notes
from .peers import Peer, has_ended, is_stopped, open_pidfd
from .single import SingleGroup

NEWS = 0.5  # seconds for an answer of the store, whose host may be gone

# Seconds that rank 0, in whose process the store lives, stays after it gave up because of another: the others, who wait
# for rank 0 perhaps, then find that one dead and not rank 0, or read the note.
LINGER = 0.5


class GlooGroup(MessageGroup):
    """Ranks over gloo. An interrupt (Ctrl-C) is seen only when the current wait ends.

    gloo's waits cannot be looked after (one that is asked about too early has failed), so the peers and their notes are
    examined when a wait has failed.
    """

    name = "gloo"

    def __init__(
        self, rank: int, peers: Sequence[Peer], timeout: float, store: Any, address: str, notes: Notes
    ) -> None:
        super().__init__(rank, peers, timeout)
        self._store_of_splits: Any = store
        self._notes = notes
        self._address = address
        self._gloo: Any = join_gloo(rank, len(peers), timeout, store, address)
        self._splits = 0
        self._held: list[Any] = []  # buffers that gloo still reads or fills, also after a failed call
        near = [peer for peer in peers if peer.rank != rank and peer.machine == peers[rank].machine]
        self._pidfds = {peer.rank: pidfd for peer in near if (pidfd := open_pidfd(peer)) >= 0}
        self._finalizer = weakref.finalize(self, _release, list(self._pidfds.values()), os.getpid())

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if not dist.is_available() or not dist.is_gloo_available():
            return "this build of torch has no gloo"
        return None

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> GlooGroup:
        meeting.exchange(None)  # gloo would wait a long time for a rank that has died since, and not name it
        store = PrefixStore("gloo", meeting.store)
        notes = Notes(store, meeting.info.rank, len(peers), meeting.hosted_by_rank_0)
        return cls(meeting.info.rank, peers, timeout, store, own_address(meeting.info), notes)

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            return SingleGroup(self.timeout)
        name = f"split{self._splits}/{label}"
        notes = self._notes.among(name, rank, len(peers))
        store = PrefixStore(name, self._store_of_splits)
        return GlooGroup(rank, peers, self.timeout, store, self._address, notes)

    # ---- messages

    def _post(self, call: Call, sends: Tensors, receives: Tensors, tag: int, tag_from: Callable[[int], int]) -> Works:
        works: Works = []
        self._held += [sends, receives]
        rank = self.rank
        try:
            for rank, tensor in receives.items():
                if rank != self.rank and tensor.numel():
                    works.append((rank, self._gloo.recv([tensor], rank, tag_from(rank))))
            for rank, tensor in sends.items():
                if rank != self.rank and tensor.numel():
                    works.append((rank, self._gloo.send([tensor], rank, tag)))
        except RuntimeError as error:
            raise self._blame(rank, call, error) from error
        return works

    def _await(self, call: Call, works: Works) -> None:
        for rank, work in works:
            try:
                work.wait(timedelta(seconds=max(0.001, call.deadline - monotonic())))
            except RuntimeError as error:
                raise self._blame(rank, call, error) from error

    def _exchange(self, call: Call, sends: Tensors, receives: Tensors, counts: list[int] | None = None) -> None:
        super()._exchange(call, sends, receives, counts)
        self._held.clear()

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        call = self._call(ALL_REDUCE, CODES[x.dtype], x.numel(), timeout)
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=timeout)
        self._held.append({self.rank: x})
        try:
            self._gloo.allreduce([x], options).wait()
        except RuntimeError as error:
            raise self._blame((self.rank + 1) % self.size, call, error) from error
        self._held.clear()

    def _blame(self, rank: int, call: Call, error: RuntimeError) -> CommError:
        """Name the rank at fault: one whose process has ended or that gave up, else the one that did not come."""
        peer = self.peers[rank]
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        # A connection closes a moment before its process counts as ended.
        deadline = monotonic() + (0.0 if silent else 1.0)
        while True:
            ended = [other for other, descriptor in self._pidfds.items() if has_ended(descriptor)]
            if ended:
                # One that has ended after it gave up because of another said so.
                last = self._note_of(rank) if rank in ended and len(ended) > 1 and not silent else None
                if last is not None and last["rank"] is not None:
                    return CommError(f"{peer} has left the group: {last['message']}", last["rank"])
                peer = peer if rank in ended else self.peers[ended[0]]
                return CommError(f"{peer} has died; {self._me} waited for it in {call}", peer.rank)
            note = None if silent else self._note_of(rank)
            if note is not None:
                return CommError(f"{peer} has left the group: {note['message']}", note["rank"])
            if monotonic() >= deadline:
                break
            sleep(0.02)
        if silent:
            near = peer.machine == self.peers[self.rank].machine
            stopped = " (it is stopped)" if near and is_stopped(peer) else ""
            return CommError(
                f"{peer} was silent for {call.timeout:g} s{stopped}; {self._me} waited for it in {call} "
                "(DIST_LOWBIT_TIMEOUT sets the time)",
                rank,
            )
        return CommError(
            f"{peer} has closed its group or cannot be reached; {self._me} waited for it in {call} "
            f"({_first_line(error)})",
            rank,
        )

    def _note_of(self, rank: int) -> dict[str, Any] | None:
        """Return what a rank wrote when it gave up."""
        self._notes.refresh()
        deadline = monotonic() + NEWS
        while self._notes.asking and monotonic() < deadline:
            sleep(0.002)
        return self._notes.left.get(rank)

    def _leave(self) -> None:
        """Say why, then close the connections, so that nobody waits for this rank."""
        self._notes.leave(str(self._lost), self._culprit)
        self._gloo.abort()
        if self.rank == 0 and self._culprit not in (None, 0):
            sleep(LINGER)

    def close(self) -> None:
        if not self._closed():
            self._finalizer()
            self._notes.close()
            self._gloo = None
            self._store_of_splits = None


def join_gloo(rank: int, size: int, timeout: float, store: Any, address: str) -> Any:
    """Return torch's gloo group of these ranks, which all call this together; `address` is this host's own."""
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout)
    try:
        return ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise CommError(f"gloo on rank {rank} cannot connect its peers ({_first_line(error)})") from error


def _release(descriptors: list[int], owner: int) -> None:
    if os.getpid() == owner:
        for descriptor in descriptors:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
