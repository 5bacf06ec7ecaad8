"""Looking after a wait for other ranks: who has died, who has left, who is silent for too long."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeVar

from dist_lowbit.core.errors import CommError

from .notes import Notes
from .peers import Peer, has_ended, is_stopped, open_pidfd

T = TypeVar("T")

GRACE = 0.3  # seconds that a message of one who has gone may still be on its way
TELL = 0.5  # seconds of waiting, after which a rank tells the others in which call it waits


def _release(descriptors: list[int], owner: int) -> None:
    if os.getpid() == owner:
        for descriptor in descriptors:
            os.close(descriptor)


class Watch:
    """What one rank of a group knows of its peers while it waits for them.

    `call` and `limit` describe the current wait, for the sentences; whoever waits calls `examine`, or `look` from
    compiled code, every few milliseconds.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], notes: Notes, timeout: float) -> None:
        self.call = "a call of compiled code"
        self.limit = timeout
        self.notes = notes
        self._rank = rank
        self._peers = peers
        near = [peer for peer in peers if peer.rank != rank and peer.machine == peers[rank].machine]
        self._pidfds = {peer.rank: pidfd for peer in near if (pidfd := open_pidfd(peer)) >= 0}
        self._suspects: dict[int, tuple[float, CommError]] = {}
        self._told = 0
        self._kept: BaseException | None = None
        self.close = weakref.finalize(self, _release, list(self._pidfds.values()), os.getpid())

    def run(self, call: str, function: Callable[[], T]) -> T:
        """Return what `function` returns, which waits for the peers without an end: a thread runs it."""
        done: list[T] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                done.append(function())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="dist_lowbit waits", daemon=True)
        began = monotonic()
        self.call = call
        thread.start()
        while not done and not failed:
            thread.join(0.01)
            if thread.is_alive():
                self.examine(0, monotonic() - began)
        if failed:
            raise failed[0]
        return done[0]

    def look(self, number: int, waited: float) -> int:
        """Examine on behalf of compiled code, which no exception may pass; return 1 if the wait must end."""
        try:
            self.examine(number, waited)
        except BaseException as error:  # also Ctrl-C
            self._kept = error
            return 1
        return 0

    def raise_kept(self) -> None:
        """Raise what ended a wait of compiled code."""
        if self._kept is not None:
            raise self._kept

    def examine(self, number: int, waited: float, awaited: Sequence[int] | None = None) -> None:
        """Raise CommError naming the rank for which waiting is in vain: by default any of the peers may be it.

        `number` counts the calls of the group; `waited` is in seconds.
        """
        everyone = [peer.rank for peer in self._peers if peer.rank != self._rank]
        ranks = everyone if awaited is None else list(awaited)
        now = monotonic()
        gone = self._gone(everyone)
        for rank, error in gone:
            since, _ = self._suspects.setdefault(rank, (now, error))
            if rank in ranks and now - since >= GRACE:
                # One that went before may be why this one did; a group that was closed is nobody's fault.
                causes = [self._suspects[other] for other, _ in gone if other == rank or other not in self.notes.left]
                raise min(causes, key=lambda suspect: suspect[0])[1]
        for rank, note in list(self.notes.left.items()):
            if note["rank"] is not None:
                raise CommError(f"{self._peers[rank]} has left the group: {note['message']}", note["rank"])
        if waited > self.limit:
            raise self._silent(ranks, number)
        self.notes.refresh()
        if waited >= TELL and self._told < number:
            self._told = number
            self.notes.reach(number)

    def _gone(self, ranks: list[int]) -> list[tuple[int, CommError]]:
        """Return those of the ranks that will send no more, though what they sent may still arrive."""
        waits = f"rank {self._peers[self._rank].number} waited for it in {self.call}"
        gone: dict[int, str] = {}
        if self.notes.lost and 0 in ranks and self.notes.hosted:
            gone[0] = "has closed its group or cannot be reached"
        gone |= {rank: "has closed its group" for rank in ranks if rank in self.notes.left}
        gone |= {rank: "has died" for rank in ranks if rank in self._pidfds and has_ended(self._pidfds[rank])}
        return [(rank, CommError(f"{self._peers[rank]} {what}; {waits}", rank)) for rank, what in gone.items()]

    def _silent(self, ranks: list[int], number: int) -> CommError:
        """Name a rank that has not come to this call, as far as the notes tell."""
        peers = [self._peers[rank] for rank in ranks]
        machine = self._peers[self._rank].machine
        stopped = [peer for peer in peers if peer.machine == machine and is_stopped(peer)]
        behind = [peer for peer in peers if self.notes.reached.get(peer.rank, -1) < number]
        peer = [*stopped, *behind, *peers][0]
        note = " (it is stopped)" if stopped else ""
        return CommError(
            f"{peer} was silent for {self.limit:g} s{note}; rank {self._peers[self._rank].number} waited for it in "
            f"{self.call} (DIST_LOWBIT_TIMEOUT sets the time)",
            peer.rank,
        )
