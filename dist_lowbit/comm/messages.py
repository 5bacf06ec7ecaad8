"""Collectives made of messages from rank to rank, for backends that can send and receive.

Libraries' own collectives add in an order of their own and report a failure without saying whose it is. Here every rank
sends to every other, so a message that does not come names its rank, and the sum is the tree's. Up to 256 KB each rank
gathers all and adds; above, each adds one slice and sends it round.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from dist_lowbit.core.errors import CommError

from .base import BaseGroup, cut
from .calls import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, BYTES, CODES, described
from .tree import tree_sum

# Bytes up to which each rank adds everything; above, each adds one slice. It decides the time, not the bits. The shim
# of oneCCL has the same (tests/comm/test_tree.py); shm compares the bytes of all ranks together with its own border.
SMALL = 256 * 1024
HEADER_TAG = 0
TAGS = 2**31 - 2

Tensors = dict[int, torch.Tensor]  # by peer
Works = list[tuple[int, Any]]  # what the library gives for a message under way, and the peer


@dataclass(frozen=True)
class Call:
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
        return described(self.op, self.dtype, self.count, self.source)


class MessageGroup(BaseGroup):
    """A Group over a backend's messages."""

    _calls = 0

    # ---- what a backend supplies

    @abstractmethod
    def _post(self, call: Call, sends: Tensors, receives: Tensors, tag: int, tag_from: Callable[[int], int]) -> Works:
        """Start messages to and from the peers; return those under way, receives first.

        Entries of this rank and empty ones are left out. The tensors must live until the messages have gone.
        """

    @abstractmethod
    def _await(self, call: Call, works: Works) -> None:
        """Return when the messages have gone and come; raise CommError naming the rank of one that does not."""

    def _tag(self, header: Sequence[int]) -> int:
        """Return the tag of a payload. Other calls use other tags, so no message meets a buffer of another size."""
        return 1 + zlib.crc32(repr(tuple(header)).encode()) % TAGS

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        flat = x.detach().view(-1)
        whole = flat.numel() * flat.element_size() <= SMALL
        share = flat.numel() // self.size
        last = flat.numel() - share * (self.size - 1)
        pieces = [flat] * self.size if whole else cut(flat, [share] * (self.size - 1) + [last])
        own = pieces[self.rank]
        parts = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        call = self._call(ALL_REDUCE, CODES[x.dtype], flat.numel(), timeout)
        self._exchange(call, dict(enumerate(pieces)), dict(enumerate(parts)))
        tree_sum(parts, own)
        if not whole:
            call = self._call(ALL_REDUCE, CODES[x.dtype], flat.numel(), timeout)
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

    def _call(self, op: int, dtype: int, count: int, timeout: float, source: int = 0) -> Call:
        self._calls += 1
        return Call(self._calls, op, dtype, count, source, timeout, monotonic() + timeout)

    def _exchange(self, call: Call, sends: Tensors, receives: Tensors, counts: list[int] | None = None) -> None:
        """Send every peer this call's header and the payloads, all at once; compare the calls, then await payloads."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        expected = {rank: call.header(counts[rank] if counts else None) for rank in others}
        told = torch.tensor(call.header())
        heard = {rank: torch.empty_like(told) for rank in others}
        headers = self._post(call, dict.fromkeys(others, told), heard, HEADER_TAG, lambda rank: HEADER_TAG)
        own_tag = self._tag(call.header())
        payloads = self._post(call, sends, receives, own_tag, lambda rank: self._tag(expected[rank]))
        self._await(call, headers)
        for rank in others:
            theirs = heard[rank].tolist()
            if tuple(theirs) != expected[rank]:
                raise CommError(
                    f"{self.peers[rank]} called {described(*theirs[1:])} where {self._me} called {call}; "
                    "all ranks must make the same calls",
                    rank,
                )
        self._await(call, payloads)
