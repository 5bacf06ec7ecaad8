"""Ranks on any hosts over TCP: torch's gloo, used for its point to point messages only.

gloo's own collectives add in an order of their own and report a failure without saying whose it is. Here every rank
sends to every other, so a message that does not come names its rank, and the sum is the tree's. Up to 256 KB each rank
gathers all and adds; above, each adds one slice and sends it round.
"""

from __future__ import annotations

import json
import os
import socket
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.log import logger
from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup, cut
from .meeting import Exchange, Meeting
from .peers import Peer, has_ended, is_stopped, open_pidfd
from .single import SingleGroup
from .tree import DTYPES, tree_sum

SMALL = 256 * 1024
OPERATIONS = ("all_reduce", "all_gather", "broadcast", "barrier")
ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER = range(4)
ELEMENTS = ("fp32 numbers", "bf16 numbers", "fp16 numbers", "bytes")  # DTYPES, then what only moves
BYTES = 3
HEADER_TAG = 0
NOTE_TIMEOUT = 2.0  # seconds for a last word over the store, whose host may be gone

Tensors = dict[int, torch.Tensor]  # by peer


@dataclass(frozen=True)
class _Call:
    """One round of messages, as this rank makes it."""

    number: int
    op: int
    dtype: int
    count: int
    source: int
    timeout: float
    deadline: float

    def header(self, count: int | None = None) -> tuple[int, int, int, int, int]:
        """Return what a peer in the same call, with `count` elements, announces."""
        return (self.number, self.op, self.dtype, self.count if count is None else count, self.source)

    def __str__(self) -> str:
        return _described(self.header())


def _described(header: Sequence[int]) -> str:
    _, op, dtype, count, source = header
    what = f"{OPERATIONS[op]} of {count} {ELEMENTS[dtype]}"
    return f"{what} from rank {source}" if op == BROADCAST else what


def _tag(header: Sequence[int]) -> int:
    """Return the tag of a payload. Other calls use other tags, so no message meets a buffer of another size."""
    return 1 + zlib.crc32(repr(tuple(header)).encode()) % (2**31 - 2)


class GlooGroup(BaseGroup):
    """Ranks over gloo. An interrupt (Ctrl-C) is seen only when the current wait ends."""

    name = "gloo"

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, store: Any, address: str) -> None:
        super().__init__(rank, peers, timeout)
        self._messages: Any = store
        self._address = address
        self._gloo: Any = _connect(rank, len(peers), timeout, store, address)
        self._calls = 0
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
        return cls(meeting.info.rank, peers, timeout, store, _own_address(meeting.info))

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            return SingleGroup(self.timeout)
        store = PrefixStore(f"split{self._splits}/{label}", self._messages)
        return GlooGroup(rank, peers, self.timeout, store, self._address)

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        flat = x.detach().view(-1)
        whole = flat.numel() * flat.element_size() <= SMALL
        share = flat.numel() // self.size
        last = flat.numel() - share * (self.size - 1)
        pieces = [flat] * self.size if whole else cut(flat, [share] * (self.size - 1) + [last])
        own = pieces[self.rank]
        parts = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        dtype = DTYPES.index(x.dtype)
        call = self._call(ALL_REDUCE, dtype, flat.numel(), timeout)
        self._exchange(call, dict(enumerate(pieces)), dict(enumerate(parts)))
        tree_sum(parts, own)
        if not whole:
            call = self._call(ALL_REDUCE, dtype, flat.numel(), timeout)
            self._exchange(call, dict.fromkeys(range(self.size), own), dict(enumerate(pieces)))

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        pieces = dict(enumerate(cut(out, counts)))
        pieces[self.rank].copy_(x)
        call = self._call(ALL_GATHER, BYTES, x.numel(), timeout)
        self._exchange(call, dict.fromkeys(range(self.size), x), pieces, counts)

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        call = self._call(BROADCAST, BYTES, x.numel(), timeout, source)
        sends = dict.fromkeys(range(self.size), x) if self.rank == source else {}
        self._exchange(call, sends, {source: x})

    def _barrier(self, timeout: float) -> None:
        self._exchange(self._call(BARRIER, BYTES, 0, timeout), {}, {})

    # ---- messages

    def _call(self, op: int, dtype: int, count: int, timeout: float, source: int = 0) -> _Call:
        self._calls += 1
        return _Call(self._calls, op, dtype, count, source, timeout, monotonic() + timeout)

    def _exchange(self, call: _Call, sends: Tensors, receives: Tensors, counts: list[int] | None = None) -> None:
        """Send every peer this call's header and the payloads, all at once; compare the calls, then await payloads."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        expected = {rank: call.header(counts[rank] if counts else None) for rank in others}
        told = torch.tensor(call.header())
        heard = {rank: torch.empty_like(told) for rank in others}
        headers = self._post(call, dict.fromkeys(others, told), heard, HEADER_TAG, lambda rank: HEADER_TAG)
        payloads = self._post(call, sends, receives, _tag(call.header()), lambda rank: _tag(expected[rank]))
        self._await(call, headers)
        for rank in others:
            theirs = heard[rank].tolist()
            if tuple(theirs) != expected[rank]:
                raise CommError(
                    f"{self.peers[rank]} called {_described(theirs)} where rank {self.rank} called {call}; "
                    "all ranks must make the same calls",
                    rank,
                )
        self._await(call, payloads)
        self._held.clear()

    def _post(
        self, call: _Call, sends: Tensors, receives: Tensors, tag: int, tag_from: Callable[[int], int]
    ) -> list[tuple[int, Any]]:
        """Start messages to and from the peers; return the work of each, receives first."""
        works: list[tuple[int, Any]] = []
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

    def _await(self, call: _Call, works: list[tuple[int, Any]]) -> None:
        for rank, work in works:
            try:
                work.wait(timedelta(seconds=max(0.001, call.deadline - monotonic())))
            except RuntimeError as error:
                raise self._blame(rank, call, error) from error

    def _blame(self, rank: int, call: _Call, error: RuntimeError) -> CommError:
        """Name the rank at fault: one whose process has ended or that gave up, else the one that did not come."""
        peer = self.peers[rank]
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        # A connection closes a moment before its process counts as ended.
        deadline = monotonic() + (0.0 if silent else 1.0)
        while True:
            ended = [other for other, descriptor in self._pidfds.items() if has_ended(descriptor)]
            if ended:
                peer = peer if rank in ended else self.peers[ended[0]]
                return CommError(f"{peer} has died; rank {self.rank} waited for it in {call}", peer.rank)
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
                f"{peer} was silent for {call.timeout:g} s{stopped}; rank {self.rank} waited for it in {call} "
                "(DIST_LOWBIT_TIMEOUT sets the time)",
                rank,
            )
        return CommError(
            f"{peer} has closed its group or cannot be reached; rank {self.rank} waited for it in {call} "
            f"({_first_line(error)})",
            rank,
        )

    def _note_of(self, rank: int) -> dict[str, Any] | None:
        """Return what a rank wrote when it gave up. The store lives in rank 0 and may be gone with it."""
        try:
            key = f"left/{rank}"
            return dict(json.loads(self._messages.get(key))) if self._messages.check([key]) else None
        except RuntimeError as error:
            logger.debug("no note of rank %d: %s", rank, _first_line(error))
            return None

    def _leave(self) -> None:
        """Say why, then close the connections, so that nobody waits for this rank."""
        patience = self._messages.timeout
        self._messages.set_timeout(timedelta(seconds=NOTE_TIMEOUT))
        try:
            self._messages.set(f"left/{self.rank}", json.dumps({"message": self._lost, "rank": self._culprit}))
        except RuntimeError as error:
            logger.debug("no note left: %s", _first_line(error))
        finally:
            self._messages.set_timeout(patience)
        self._gloo.abort()

    def close(self) -> None:
        if not self._closed():
            self._finalizer()
            self._gloo = None
            self._messages = None


def _connect(rank: int, size: int, timeout: float, store: Any, address: str) -> Any:
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


def _own_address(info: RankInfo) -> str:
    """Return this host's address on the way to rank 0: the interface that the peers can reach too."""
    with socket.create_connection((info.master_addr, info.master_port), timeout=5.0) as probe:
        return str(probe.getsockname()[0])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
