"""Messages from one rank to another for torch.distributed's backend "ccl": torch's gloo, beside the group.

They may be under way while the caller goes on, come from any rank and carry a tag, as torch.distributed promises.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import LOOPBACK, RankInfo

from .base import BaseGroup
from .gloo import join_gloo
from .group import Group
from .interface import own_address
from .peers import one_machine

_Work: Any = dist.Work  # torch's stubs know no Python subclass


def _failed(error: RuntimeError, peer: str, rank: int | None, me: str, timeout: float) -> CommError:
    reason = str(error).splitlines()[0]
    end = f"was silent for {timeout:g} s" if "timed out" in reason.lower() else "has died or closed its group"
    return CommError(f"{peer} {end}; {me} waited for it in a message from one rank to another ({reason})", rank)


class Message(_Work):  # type: ignore[misc]
    """One message under way. `peer` is the rank at the other end in words."""

    def __init__(self, work: Any, me: str, peer: str, rank: int | None, timeout: float) -> None:
        super().__init__()
        self._work = work
        self._me = me
        self._peer = peer
        self._rank = rank
        self._timeout = timeout

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when it has gone or come; a peer that has died or is silent is a CommError."""
        try:
            return bool(self._work.wait(timeout) if timeout else self._work.wait())
        except RuntimeError as error:
            raise _failed(error, self._peer, self._rank, self._me, self._timeout) from error

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def is_success(self) -> bool:
        return bool(self._work.is_success())

    def source_rank(self) -> int:
        """Return the rank that a message from anyone came from."""
        return int(self._work._source_rank())

    _source_rank = source_rank


class Messages:
    """Sends and receives between the ranks of a group; all of them make it together, and each may use it alone."""

    def __init__(self, group: Group, info: RankInfo, store: Any, timeout: float) -> None:
        assert isinstance(group, BaseGroup)
        self._peers = group.peers
        self._me = f"rank {group.rank}"
        self._timeout = timeout
        try:
            address = own_address(info)
        except OSError:  # the ranks met at some other place than the master's address
            address = LOOPBACK[0] if one_machine(group.peers) else socket.gethostname()
        self._gloo = join_gloo(group.rank, group.size, timeout, PrefixStore("messages", store), address)

    @staticmethod
    def possible(group: Group) -> bool:
        """Tell whether there are other ranks, and gloo to reach them."""
        return group.size > 1 and dist.is_gloo_available()

    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int) -> Message:
        """Start sending one tensor to rank `to`."""
        return self._message(lambda: self._gloo.send(list(tensors), to, tag), to)

    def receive(self, tensors: Sequence[torch.Tensor], source: int | None, tag: int) -> Message:
        """Start receiving into one tensor from rank `source`, or from whichever rank sends."""
        if source is None:
            return self._message(lambda: self._gloo.recv_anysource(list(tensors), tag), None)
        return self._message(lambda: self._gloo.recv(list(tensors), source, tag), source)

    def _message(self, start: Callable[[], Any], peer: int | None) -> Message:
        name = "each of its peers" if peer is None else str(self._peers[peer])
        try:
            return Message(start(), self._me, name, peer, self._timeout)
        except RuntimeError as error:
            raise _failed(error, name, peer, self._me, self._timeout) from error

    def close(self) -> None:
        """Close the connections."""
        self._gloo = None
