"""Where ranks find one another: a torch TCPStore at the master's address, and rounds of small JSON values over it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.core.rank import LOOPBACK, RankInfo

from .group import Json
from .peers import Peer, has_ended, open_pidfd

LEAVING = 2.0  # seconds
Exchange = Callable[[Json], list[Json]]  # one value from each rank, on each rank; all call it together


class ConnectionLost(CommError):
    """The store went away: its host, rank 0, has ended or given up."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__(
            f"rank {info.rank} lost the connection to rank 0 at {info.master_addr}:{info.master_port} while the group "
            "formed; rank 0's own message tells why",
            0,
        )


class _Worlds:
    """What the ranks say of how many they are, compared as each of them comes.

    With different numbers they would wait for ranks that do not exist, or not see one another at all.
    """

    def __init__(self, store: Store, info: RankInfo) -> None:
        self._store, self._info = store, info
        self._first: list[int] = []

    def enter(self) -> None:
        """Compare this rank's number with that of the first to come, and tell all if they differ."""
        self._store.add("came", 1)
        own = [self._info.rank, self._info.world_size]
        self._first = json.loads(self._store.compare_set("first", "", json.dumps(own)))
        if self._first[1] != own[1]:
            self._store.set("other", json.dumps(own))
        self.check()

    def check(self) -> None:
        """Raise UsageError if a rank has come that differs from the first one."""
        if not self._store.check(["other"]):
            return
        (rank, size), (other, another) = sorted([self._first, json.loads(self._store.get("other"))])
        told = self._store.add("told", 1)
        deadline = time.monotonic() + LEAVING
        # Rank 0, which may host the store, lets those read it who are here.
        while self._info.rank == 0 and told < self._store.add("came", 0) and time.monotonic() < deadline:
            time.sleep(0.005)
            told = self._store.add("told", 0)
        raise UsageError(
            f"rank {rank} was started in a world of {size} and rank {other} in one of {another}; start all ranks with "
            "one launcher"
        )


class Meeting:
    """The ranks of one group while it forms. All call `exchange` and `part` together."""

    def __init__(
        self,
        store: Store,
        info: RankInfo,
        timeout: float,
        hosted_by_rank_0: bool = False,
        worlds: _Worlds | None = None,
    ) -> None:
        self.store = store
        self._worlds = worlds
        self.hosted_by_rank_0 = hosted_by_rank_0  # so that the store ends with it
        self.info = info
        self.timeout = timeout
        self._round = 0
        self._pidfds: dict[int, int] = {}

    def apart(self, label: str, rank: int, size: int, near: bool) -> Meeting:
        """Return a meeting of some of the ranks, as its `rank`; `near`: they are all on one machine."""
        local_rank, local_size = (rank, size) if near else (0, 1)
        info = replace(self.info, rank=rank, world_size=size, local_rank=local_rank, local_size=local_size)
        return Meeting(PrefixStore(label, self.store), info, self.timeout)

    def exchange(self, value: Json) -> list[Json]:
        """Return every rank's value; a rank that does not come within the timeout is a CommError naming it."""
        self._round += 1
        try:
            keys = self._announce(str(self._round), json.dumps(value))
            self._wait(keys)
            return [json.loads(self.store.get(key)) for key in keys]
        except DistNetworkError as error:
            raise ConnectionLost(self.info) from error

    def part(self) -> None:
        """End the meeting. Rank 0, which may host the store, returns only when the others have read all they need."""
        try:
            keys = self._announce("parted", "")
            if self.info.rank == 0:
                self._wait(keys)
        except DistNetworkError as error:
            raise ConnectionLost(self.info) from error

    def leave(self) -> None:
        """End a failed meeting. Rank 0 gives the living others a moment to read what went wrong."""
        try:
            keys = self._announce("parted", "")
            deadline = time.monotonic() + LEAVING
            while self.info.rank == 0 and time.monotonic() < deadline:
                late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                if all(self._is_dead(rank) for rank in late):
                    break
                time.sleep(0.005)
        except DistNetworkError as error:
            logger.debug("the meeting is over already: %s", error)

    def _is_dead(self, rank: int) -> bool:
        return self._pidfds.get(rank, -1) >= 0 and has_ended(self._pidfds[rank])

    @contextmanager
    def watching(self, peers: Sequence[Peer]) -> Iterator[None]:
        """Notice meanwhile if one of the peers on this machine dies."""
        own = peers[self.info.rank]
        near = [peer for peer in peers if peer.machine == own.machine and peer.rank != own.rank]
        self._pidfds = {peer.rank: open_pidfd(peer) for peer in near}
        try:
            yield
        finally:
            for pidfd in self._pidfds.values():
                if pidfd >= 0:
                    os.close(pidfd)
            self._pidfds = {}

    def _announce(self, topic: str, text: str) -> list[str]:
        keys = [f"{topic}/{rank}" for rank in range(self.info.world_size)]
        self.store.set(keys[self.info.rank], text)
        return keys

    def _wait(self, keys: list[str]) -> None:
        # Asking again and again, not Store.wait: that one shuts out signals and logs a stack trace at its timeout.
        deadline = time.monotonic() + self.timeout
        pause = 0.001
        while not self.store.check(keys):
            if self._worlds is not None:
                self._worlds.check()
            late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            dead = [rank for rank in late if self._is_dead(rank)]
            if dead and not self.store.check([keys[dead[0]]]):
                raise CommError(f"rank {dead[0]} has died while the group formed", dead[0])
            if late and time.monotonic() > deadline:
                raise CommError(
                    f"rank {', '.join(map(str, late))} of {self.info.world_size} did not come to "
                    f"{self.info.master_addr}:{self.info.master_port} within {self.timeout:g} s; "
                    "check that all ranks were started and see the same MASTER_ADDR and MASTER_PORT",
                    late[0],
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def _listen(info: RankInfo, timeout: timedelta) -> TCPStore:
    """Host the store. On one host it listens to this host alone; torch by itself would listen to the world."""
    taken = f"rank 0 cannot listen at {info.master_addr}:{info.master_port}"
    host, port = info.master_addr, info.master_port
    if host not in LOOPBACK:
        try:
            return TCPStore(host, port, None, True, timeout, False, True)
        except RuntimeError as error:
            raise CommError(f"{taken} ({str(error).splitlines()[0]}); set MASTER_PORT to a free port", 0) from error
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as busy:
        listener.close()
        try:  # torch.distributed of this very process may listen there: then it is shared
            return TCPStore(host, port, None, True, timeout, False, True)
        except RuntimeError:
            raise CommError(f"{taken} ({busy}); set MASTER_PORT to a free port", 0) from busy
    return TCPStore(host, port, None, True, timeout, False, True, listener.detach())


def _join(info: RankInfo, timeout: float) -> TCPStore:
    """Connect to the store, waiting for it to come up."""
    address = (info.master_addr, info.master_port)
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(address, timeout=min(timeout, 5.0)).close()
            return TCPStore(*address, None, False, timedelta(seconds=timeout), False)
        except (OSError, DistNetworkError) as error:
            if time.monotonic() > deadline:
                raise CommError(
                    f"rank {info.rank} finds no rank 0 at {info.master_addr}:{info.master_port} within {timeout:g} s "
                    f"({str(error).splitlines()[0]}); check MASTER_ADDR and MASTER_PORT and that rank 0 was started",
                    0,
                ) from error
            time.sleep(0.05)


def meet(
    info: RankInfo, timeout: float, prefix: str, facts: Json, store: Store | None = None
) -> tuple[Meeting, list[Json]]:
    """Bring all ranks together and return the meeting with every rank's `facts`.

    `store` is one that the caller has (any torch.distributed store), else rank 0 opens one at the master's address.
    Groups are told apart by `prefix` and by how often all ranks have met under it.
    """
    deadline = time.monotonic() + timeout
    while True:
        hosting = info.rank == 0 and not info.hosted
        base = store or (_listen(info, timedelta(seconds=timeout)) if hosting else _join(info, timeout))
        try:
            name = f"dist_lowbit/{prefix}/{info.attempt}"
            arrival = base.add(f"{name}/arrivals", 1) - 1
            own = store is None and not info.hosted
            worlds = _Worlds(PrefixStore(f"{name}/worlds", base), info)
            worlds.enter()
            meeting = Meeting(PrefixStore(f"{name}/{arrival // info.world_size}", base), info, timeout, own, worlds)
            return meeting, meeting.exchange(facts)
        except (DistNetworkError, ConnectionLost) as error:
            # Rank 0 may just be closing the store of an earlier group: meet again at its next one.
            if hosting or store is not None or time.monotonic() > deadline:
                raise ConnectionLost(info) from error
