"""Who the ranks are: host, process, and whether that process still lives."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.rank import start_time

from .group import Json


@dataclass(frozen=True)
class Peer:
    """One rank's process."""

    rank: int
    host: str
    machine: str  # the same for processes that see one another's pids
    pid: int
    started: int  # clock ticks since boot, against reused pids
    known_as: int = -1  # its rank in the group that this one is a part of

    @property
    def number(self) -> int:
        """The rank that sentences name."""
        return self.rank if self.known_as < 0 else self.known_as

    def __str__(self) -> str:
        return f"rank {self.number} (pid {self.pid} on {self.host})"


def myself(rank: int) -> Peer:
    """Describe this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return Peer(rank, socket.gethostname(), f"{boot}/{namespace}", os.getpid(), start_time(os.getpid()))


def to_json(peer: Peer) -> Json:
    """Return the peer as a JSON value."""
    return asdict(peer)


def from_json(value: Json, rank: int) -> Peer:
    """Read a peer back, as `rank` of a group."""
    return Peer(rank, str(value["host"]), str(value["machine"]), int(value["pid"]), int(value["started"]))


def some(peers: Sequence[Peer], ranks: Sequence[int]) -> list[Peer]:
    """Return some of the peers, numbered anew; sentences call them as before."""
    return [replace(peers[rank], rank=number, known_as=peers[rank].number) for number, rank in enumerate(ranks)]


def one_machine(peers: Sequence[Peer]) -> bool:
    """Tell whether all peers see one another's pids."""
    return len({peer.machine for peer in peers}) == 1


def open_pidfd(peer: Peer) -> int:
    """Return a pidfd of a peer on this machine, or -1 where the kernel has none to give (before 5.3, sandboxes).

    A peer that is gone already is a CommError.
    """
    try:
        descriptor = os.pidfd_open(peer.pid)
    except ProcessLookupError:
        raise CommError(f"{peer} has died before the group was complete", peer.rank) from None
    except (OSError, AttributeError):
        return -1
    try:
        alive = start_time(peer.pid) == peer.started
    except OSError:
        alive = False
    if not alive:
        os.close(descriptor)
        raise CommError(f"{peer} has died before the group was complete", peer.rank)
    return descriptor


def has_ended(pidfd: int) -> bool:
    """Tell whether a pidfd's process has ended, zombies included."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def is_stopped(peer: Peer) -> bool:
    """Tell whether a process of this machine is stopped by a signal."""
    try:
        return Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
