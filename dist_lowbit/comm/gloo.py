"""Ranks on any hosts over TCP: torch's gloo, used for its point to point messages only.

gloo's own collectives add in an order of their own and report a failure without saying whose it is. Here every rank
sends to every other, so a message that does not come names its rank, and the sum is the tree's. Up to 256 KB each rank
gathers all and adds; above, each adds one slice and sends it round.
"""

from __future__ import annotations

import os
import socket
import weakref
import zlib
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup
from .meeting import Exchange, Meeting
from .peers import Peer, has_ended, is_stopped, open_pidfd
from .single import SingleGroup
from .tree import DTYPES, tree_sum

SMALL = 256 * 1024
OPERATIONS = ("all_reduce", "all_gather", "broadcast", "barrier")
HEADER_TAG = 0
Header = tuple[int, int, int, int, int]  # number of the call, operation, dtype (3: bytes), count, source


def _tag(header: Header, stage: int) -> int:
    """Return the tag of a call's payload. Calls that differ use different tags, so no message meets a wrong buffer."""
    text = repr((header, stage)).encode()
    return 1 + zlib.crc32(text) % (2**31 - 2)


class GlooGroup(BaseGroup):
    """Ranks over gloo. An interrupt (Ctrl-C) is seen only when the current wait ends."""

    name = "gloo"

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, process_group: Any, store: Any) -> None:
        super().__init__(rank, peers, timeout)
        self._gloo = process_group
        self._store = store
        self._calls = 0
        self._splits = 0
        self._abandoned: list[Any] = []  # buffers of a failed call, which gloo may still hold
        machine = peers[rank].machine
        near = [peer for peer in peers if peer.rank != rank and peer.machine == machine]
        self._pidfds = {peer.rank: fd for peer in near if (fd := open_pidfd(peer)) >= 0}
        self._finalizer = weakref.finalize(self, _release, list(self._pidfds.values()), os.getpid())

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if not dist.is_available() or not dist.is_gloo_available():
            return "this build of torch has no gloo"
        return None

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> GlooGroup:
        address = _own_address(meeting.info)
        return cls._form(meeting.info.rank, peers, dist.PrefixStore("gloo", meeting.store), address, timeout)

    @classmethod
    def _form(cls, rank: int, peers: Sequence[Peer], store: Any, address: str, timeout: float) -> GlooGroup:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout)
        try:
            process_group = dist.ProcessGroupGloo(store, rank, len(peers), options)
        except RuntimeError as error:
            raise CommError(f"gloo on rank {rank} cannot connect its peers ({_first_line(error)})") from error
        group = cls(rank, peers, timeout, process_group, store)
        group._address = address
        return group

    _address = ""

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            return SingleGroup(self.timeout)
        store = dist.PrefixStore(f"split{self._splits}/{label}", self._store)
        return self._form(rank, peers, store, self._address, self.timeout)

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        header = self._header(0, DTYPES.index(x.dtype), x.numel())
        flat = x.detach().view(-1)
        if flat.numel() * flat.element_size() <= SMALL:
            parts = [flat if rank == self.rank else torch.empty_like(flat) for rank in range(self.size)]
            self._exchange(header, dict.fromkeys(range(self.size), flat), dict(enumerate(parts)), timeout)
            tree_sum(parts, flat)
            return
        cuts = [flat.numel() * rank // self.size for rank in range(self.size + 1)]
        slices = {rank: flat[cuts[rank] : cuts[rank + 1]] for rank in range(self.size)}
        own = slices[self.rank]
        parts = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        self._exchange(header, slices, dict(enumerate(parts)), timeout)
        tree_sum(parts, own)
        self._exchange(header, dict.fromkeys(range(self.size), own), slices, timeout, stage=1)

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        pieces = dict(enumerate(out.split(counts)))
        pieces[self.rank].copy_(x)
        header = self._header(1, 3, x.numel())
        self._exchange(header, dict.fromkeys(range(self.size), x), pieces, timeout, counts=counts)

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        header = self._header(2, 3, x.numel(), source)
        sends = dict.fromkeys(range(self.size), x) if self.rank == source else {}
        self._exchange(header, sends, {} if self.rank == source else {source: x}, timeout)

    def _barrier(self, timeout: float) -> None:
        self._exchange(self._header(3, 3, 0), {}, {}, timeout)

    def _header(self, op: int, dtype: int, count: int, source: int = 0) -> Header:
        self._calls += 1
        return (self._calls, op, dtype, count, source)

    # ---- messages

    def _exchange(
        self,
        header: Header,
        sends: dict[int, torch.Tensor],
        receives: dict[int, torch.Tensor],
        timeout: float,
        counts: list[int] | None = None,
        stage: int = 0,
    ) -> None:
        """Send to and receive from the peers, all at once. Stage 0 also compares the calls."""
        deadline = monotonic() + timeout
        others = [rank for rank in range(self.size) if rank != self.rank]
        expected = {rank: (*header[:3], counts[rank] if counts else header[3], header[4]) for rank in others}
        told = torch.tensor(header)
        heard = {rank: torch.empty_like(told) for rank in others}
        self._abandoned = [told, heard, sends, receives]
        gloo, works = self._gloo, []
        waits: list[tuple[int, str, Any]] = []
        try:
            for rank in others:
                if stage == 0:
                    waits.append((rank, "header", gloo.recv([heard[rank]], rank, HEADER_TAG)))
                if rank in receives and receives[rank].numel():
                    work = gloo.recv([receives[rank]], rank, _tag(expected[rank], stage))
                    waits.append((rank, "payload", work))
            for rank in others:
                if stage == 0:
                    works.append((rank, gloo.send([told], rank, HEADER_TAG)))
                if rank in sends and sends[rank].numel():
                    works.append((rank, gloo.send([sends[rank]], rank, _tag(header, stage))))
        except RuntimeError as error:
            raise self._blame(rank, header, timeout, error) from error
        for rank, part, work in sorted(waits, key=lambda wait: wait[1]):  # headers first
            self._wait(rank, work, header, deadline, timeout)
            if part == "header" and (theirs := tuple(heard[rank].tolist())) != expected[rank]:
                raise CommError(
                    f"{self.peers[rank]} called {_call(theirs)} where rank {self.rank} called {_call(header)}; "
                    "all ranks must make the same calls",
                    rank,
                )
        for rank, work in works:
            self._wait(rank, work, header, deadline, timeout)
        self._abandoned = []

    def _wait(self, rank: int, work: Any, header: Header, deadline: float, timeout: float) -> None:
        try:
            work.wait(timedelta(seconds=max(0.001, deadline - monotonic())))
        except RuntimeError as error:
            raise self._blame(rank, header, timeout, error) from error

    def _blame(self, rank: int, header: Header, timeout: float, error: RuntimeError) -> CommError:
        """Name the rank at fault: one whose process has ended, else the one whose message did not come."""
        call = _call(header)
        ended = [other for other, descriptor in self._pidfds.items() if has_ended(descriptor)]
        if ended:
            peer = self.peers[rank if rank in ended else ended[0]]
            return CommError(f"{peer} has died; rank {self.rank} waited for it in {call}", peer.rank)
        peer = self.peers[rank]
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            near = peer.machine == self.peers[self.rank].machine
            stopped = " (it is stopped)" if near and is_stopped(peer) else ""
            return CommError(
                f"{peer} was silent for {timeout:g} s{stopped}; rank {self.rank} waited for it in {call} "
                "(DIST_LOWBIT_TIMEOUT sets the time)",
                rank,
            )
        detail = _first_line(error)
        return CommError(f"{peer} has left the group or cannot be reached; rank {self.rank} was in {call} ({detail})", rank)

    def _leave(self) -> None:
        self._gloo.abort()

    def close(self) -> None:
        if not self._closed():
            self._finalizer()
            self._gloo = None
            self._store = None


def _release(descriptors: list[int], owner: int) -> None:
    if os.getpid() == owner:
        for descriptor in descriptors:
            os.close(descriptor)


def _own_address(info: RankInfo) -> str:
    """Return this host's address on the way to rank 0: the interface that the peers can reach too."""
    with socket.create_connection((info.master_addr, info.master_port), timeout=5.0) as probe:
        return str(probe.getsockname()[0])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _call(header: Sequence[int]) -> str:
    _, op, dtype, count, source = header
    what = ("fp32 numbers", "bf16 numbers", "fp16 numbers", "bytes")[dtype]
    return f"{OPERATIONS[op]} of {count} {what}" + (f" from rank {source}" if OPERATIONS[op] == "broadcast" else "")
