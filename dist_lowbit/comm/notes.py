"""What ranks tell one another beside their calls, over the store at which they met: that one has left, and why; how far
each has come.

The store lives in some rank's process, which may be dead or stopped, and then a question to it never returns. So a
thread asks, and whoever waits for a rank looks at the last answer.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.log import logger

from .group import Json

POST_SECONDS = 2.0  # for a last word; whoever it is for may be gone


class Notes:
    """One group's notes. Not collective; every method returns at once, `leave` within POST_SECONDS."""

    def __init__(self, store: Any, rank: int, size: int, hosted: bool = False) -> None:
        self.hosted = hosted  # by rank 0 of this very group, so that a lost store tells of its end
        self._store = store
        self._rank = rank
        self._others = [peer for peer in range(size) if peer != rank]
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._asking = threading.Event()
        self.lost = False  # the store cannot be reached any more
        self.left: dict[int, Json] = {}  # by rank: {"message": ..., "rank": who was at fault}
        self.reached: dict[int, int] = {}  # by rank: the number of a call that it waits in, once it has waited long

    def among(self, label: str, rank: int, size: int) -> Notes:
        """Return the notes of a subgroup."""
        return Notes(PrefixStore(label, self._store), rank, size)

    def leave(self, message: str, culprit: int | None) -> None:
        """Tell that this rank gives the group up because of a culprit, or (None) that it closes it."""
        self._post(f"left/{self._rank}", {"message": message, "rank": culprit}).wait(POST_SECONDS)

    def reach(self, number: int) -> None:
        """Tell that this rank waits in its call `number`."""
        self._post(f"at/{self._rank}", number)

    @property
    def asking(self) -> bool:
        """Whether an answer to `refresh` is still to come."""
        return self._asking.is_set()

    def refresh(self) -> None:
        """Ask for news in the background; `left`, `reached` and `lost` change when they are there."""
        if not self._asking.is_set() and not self.lost:
            self._asking.set()
            self._submit(self._ask)

    def close(self) -> None:
        """End the thread as soon as it can."""
        self._jobs.put(None)

    def _post(self, key: str, value: Json) -> threading.Event:
        done = threading.Event()

        def post() -> None:
            try:
                self._store.set(key, json.dumps(value))
            finally:
                done.set()

        self._submit(post)
        return done

    def _ask(self) -> None:
        try:
            self.left |= {rank: json.loads(text) for rank, text in self._read("left")}
            self.reached |= {rank: int(text) for rank, text in self._read("at")}
        finally:
            self._asking.clear()

    def _read(self, topic: str) -> list[tuple[int, bytes]]:
        return [(rank, self._store.get(key)) for rank in self._others if self._store.check([key := f"{topic}/{rank}"])]

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="dist_lowbit notes", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except RuntimeError as error:
                self.lost = True
                logger.debug("the store of the notes is gone: %s", error)
