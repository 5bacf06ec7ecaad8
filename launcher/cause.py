"""Of several ends of ranks, which caused the others; and how the ranks under another launcher tell theirs."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from .process import End

# Deaths this close to the first are weighed together: a peer's death is noticed by the others within milliseconds.
BLAME_WINDOW = 0.2
# A rank that ends with this code, or with this error uncaught, says that a peer is gone: it is not the cause.
PEER_LOST = 3
PEER_LOST_ERROR = "CommError: "


def lost_a_peer(end: End, last_words: Sequence[str]) -> bool:
    """Return whether a rank ended because another had: by its exit code, or by the last line of its stderr."""
    return not end.killed and (end.code == PEER_LOST or PEER_LOST_ERROR in (last_words[-1] if last_words else ""))


def blame(ends: Sequence[End], lost: Sequence[bool]) -> int:
    """Return which of `ends`, in the order in which they were seen, caused the others.

    A signal (but SIGABRT, which is what C++ does about a lost peer) weighs more than an exit code, and one that
    `lost` a peer weighs least; among equals the earliest counts.
    """

    def weight(index: int) -> int:
        end = ends[index]
        if end.killed and end.code != signal.SIGABRT:
            return 0
        return 2 if lost[index] else 1

    return min(range(len(ends)), key=weight)  # min keeps the first of equals


@dataclass(frozen=True)
class RankEnd:
    """The end of a rank that another launcher started, at `when` (monotonic seconds of this host).

    asked: it came after a signal of that launcher, so another rank, or the launcher itself, is the cause.
    """

    rank: int
    pid: int
    host: str
    end: End
    asked: bool
    when: float
    last_words: str

    @property
    def follows(self) -> bool:
        return lost_a_peer(self.end, [self.last_words]) or (self.end.killed and self.end.code == signal.SIGTERM)


def first_cause(ends: Sequence[RankEnd]) -> tuple[RankEnd, list[RankEnd]] | None:
    """Return the end that caused the others and those of about the same time; None if no rank failed by itself."""
    failed = sorted((e for e in ends if not e.end.ok and not e.asked), key=lambda e: e.when)
    own = [e for e in failed if not e.follows] or failed
    near = [e for e in own if e.when <= own[0].when + BLAME_WINDOW]
    if not near:
        return None
    cause = near[blame([e.end for e in near], [e.follows for e in near])]
    return cause, [e for e in near if e is not cause]


class Ends:
    """A pipe on which relay.py tells the ends of this host's ranks, each in one write of one line.

    Ranks find it by `where` (HOST:PATH:INODE) in /proc, so another launcher need not hand a descriptor on and nothing
    is left on disk; only this user can open it, and the inode tells it from the same path on another host.
    """

    def __init__(self) -> None:
        self.fd, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._told: list[RankEnd] = []
        inode = os.fstat(self._writing).st_ino
        self.where = f"{os.uname().nodename}:/proc/{os.getpid()}/fd/{self._writing}:{inode}"

    def read(self) -> list[RankEnd]:
        """Return what has been told so far."""
        for line in self._all().decode(errors="replace").split("\n")[:-1]:
            rank, pid, host, killed, code, asked, when, words = line.split(" ", 7)
            end = End(killed == "1", int(code))
            self._told.append(RankEnd(int(rank), int(pid), host, end, asked == "1", float(when), words))
        return self._told

    def _all(self) -> bytes:
        chunks: list[bytes] = []
        while True:
            try:
                chunks.append(os.read(self.fd, 1 << 16))
            except BlockingIOError:  # empty; it has no end, as the launcher holds the writing side, too
                return b"".join(chunks)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._writing)
