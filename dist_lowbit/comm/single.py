"""The group of one rank: every collective is the identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_lowbit.core.rank import RankInfo

from .base import BaseGroup
from .meeting import Exchange, Meeting
from .peers import Peer, myself


class SingleGroup(BaseGroup):
    """A world of one; needs no partner, so it can be made without a meeting."""

    name = "single"

    def __init__(self, timeout: float = 60.0) -> None:
        super().__init__(0, [myself(0)], timeout)

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        return None if info.world_size == 1 else f"a world of {info.world_size} ranks is more than one"

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> SingleGroup:
        return cls(timeout)

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        return

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        out.copy_(x)

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        return

    def _barrier(self, timeout: float) -> None:
        return

    def _leave(self) -> None:
        return

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> SingleGroup:
        return SingleGroup(self.timeout)

    def close(self) -> None:
        self._closed()
