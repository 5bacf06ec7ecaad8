"""Progress on whatever takes longer than a second: rank 0, and only on a terminal (rich, the usual choice)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
_PATIENCE = 1.0  # seconds before a bar appears


def track(items: Iterable[T], what: str, rank: int = 0) -> Iterator[T]:
    """Yield items, showing a bar named `what` once they have taken longer than a second."""
    if rank != 0 or not sys.stderr.isatty():
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    started = time.monotonic()
    bar: Progress | None = None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started > _PATIENCE:
                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(what, total=total)
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
