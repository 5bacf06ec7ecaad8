"""Ranks that each have a GPU: torch's NCCL (NVIDIA) and XCCL (Intel), for tensors where they are.

The sum is the tree's: tensors are gathered, or their slices exchanged, and added on the GPU; `native` is the library's
own. Objects and other small things on the CPU travel through the GPU. These libraries cannot tell two different calls
from one another: a rank that makes another call is a silent one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from time import monotonic, sleep
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup, cut
from .calls import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, BYTES, CODES, described
from .meeting import Exchange, Meeting
from .messages import SMALL
from .notes import Notes
from .peers import Peer
from .single import SingleGroup
from .tree import tree_sum
from .watch import Watch

NAP = 0.0001  # seconds
LOOK = 0.02  # seconds between two looks at the peers


class DeviceGroup(BaseGroup):
    """A Group over one of torch's process groups."""

    device_type: ClassVar[str]

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, store: Any, place: int, notes: Notes) -> None:
        super().__init__(rank, peers, timeout)
        self.device_types = ("cpu", self.device_type)
        self._messages = store
        self._place = place  # which GPU of this machine
        self._calls = 0
        self._splits = 0
        self._watch = Watch(rank, peers, notes, timeout)
        self._works: Any = self._connected(PrefixStore("works", store), rank, len(peers))

    @classmethod
    @abstractmethod
    def _connected(cls, store: Any, rank: int, size: int) -> Any:
        """Return torch's process group."""

    @classmethod
    def _device(cls, place: int) -> torch.device:
        count = getattr(torch, cls.device_type).device_count()
        return torch.device(cls.device_type, place % count)

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> DeviceGroup:
        meeting.exchange(None)
        info = meeting.info
        notes = Notes(PrefixStore("device", meeting.store), info.rank, len(peers), meeting.hosted_by_rank_0)
        return cls(info.rank, peers, timeout, PrefixStore(cls.name, meeting.store), info.local_rank, notes)

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            return SingleGroup(self.timeout)
        name = f"split{self._splits}/{label}"
        notes = self._watch.notes.among(name, rank, len(peers))
        return type(self)(rank, peers, self.timeout, PrefixStore(name, self._messages), self._place, notes)

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        self._begin((ALL_REDUCE, CODES[x.dtype], x.numel(), 0), timeout)
        flat = self._there(x).view(-1)
        if flat.numel() * flat.element_size() <= SMALL:
            tree_sum(self._gathered(flat, flat.numel()), flat)
        else:
            share = -(-flat.numel() // self.size)
            padded = torch.cat([flat, flat.new_zeros(share * self.size - flat.numel())])
            parts = torch.empty_like(padded)
            self._wait(self._works.alltoall_base(parts, padded, [], [], dist.AllToAllOptions()))
            slices = self._gathered(tree_sum(cut(parts, [share] * self.size)), share)
            flat.copy_(torch.cat(slices)[: flat.numel()])
        x.view(-1).copy_(flat)

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        self._begin((ALL_REDUCE, CODES[x.dtype], x.numel(), 0), timeout)
        there = self._there(x)
        self._wait(self._works.allreduce([there], dist.AllreduceOptions()))
        x.copy_(there)

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        self._begin((ALL_GATHER, BYTES, x.numel(), 0), timeout)
        parts = self._gathered(self._there(x), max(counts))
        out.copy_(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        self._begin((BROADCAST, BYTES, x.numel(), source), timeout)
        there = self._there(x)
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._wait(self._works.broadcast([there], options))
        x.copy_(there)

    def _barrier(self, timeout: float) -> None:
        self._begin((BARRIER, BYTES, 0, 0), timeout)
        self._gathered(torch.zeros(1, dtype=torch.uint8, device=self._device(self._place)), 1)

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the GPU; x itself if it lies on it."""
        return x.detach().to(self._device(self._place))

    def _gathered(self, x: torch.Tensor, most: int) -> list[torch.Tensor]:
        """Return every rank's flat tensor, filled up to `most` elements."""
        own = x if x.numel() == most else torch.cat([x, x.new_zeros(most - x.numel())])
        parts = [torch.empty_like(own) for _ in range(self.size)]
        if most:
            self._wait(self._works.allgather([parts], [own]))
        return parts

    def _begin(self, call: tuple[int, int, int, int], timeout: float) -> None:
        self._calls += 1
        self._watch.call, self._watch.limit = described(*call), timeout

    def _wait(self, work: Any) -> None:
        began = looked = monotonic()
        while not work.is_completed():
            now = monotonic()
            if now - looked > LOOK:
                looked = now
                self._watch.examine(self._calls, now - began)
            sleep(NAP)
        work.wait()

    # ---- the end

    def _leave(self) -> None:
        self._watch.notes.leave(str(self._lost), self.rank if self._culprit is None else self._culprit)
        self._works.abort()

    def close(self) -> None:
        was_lost = self._lost is not None
        if not self._closed():
            if not was_lost:
                self._watch.notes.leave("it was closed", None)
            self._works = None
            self._watch.notes.close()
            self._watch.close()


class NcclGroup(DeviceGroup):
    """Ranks with NVIDIA GPUs."""

    name = "nccl"
    device_type = "cuda"

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if not dist.is_nccl_available():
            return "this build of torch has no NCCL"
        return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"

    @classmethod
    def _connected(cls, store: Any, rank: int, size: int) -> Any:
        library = distributed_c10d.ProcessGroupNCCL
        return library(store, rank, size, library.Options())


class XcclGroup(DeviceGroup):
    """Ranks with Intel GPUs."""

    name = "xccl"
    device_type = "xpu"

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if not dist.is_xccl_available():
            return "this build of torch has no XCCL (PyTorch's index for Intel GPUs has builds that do)"
        return None if torch.xpu.is_available() else "torch sees no Intel GPU"

    @classmethod
    def _connected(cls, store: Any, rank: int, size: int) -> Any:
        library = distributed_c10d.ProcessGroupXCCL
        return library(store, rank, size, library.Options())
