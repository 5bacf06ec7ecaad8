"""What a measurement must know of the machine: its last-level cache, its cores, and how fast it reads memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.ops.library import start_pool
from dist_lowbit.ops.threads import ThreadPlan

_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Where the kernel does not say how large the caches are (some containers): more than most sockets have.
_UNKNOWN_CACHE = 64 << 20
_READ_BYTES = 1 << 30
_PIECE = 64 << 20  # milliseconds of reading: hundreds of times what it takes to start the threads
# Between two uses of a byte this many caches' worth of others pass by, so it is gone by any policy of replacement.
_CACHES = 4


def cache_bytes(cpus: set[int] | None = None, root: Path = _CPUS) -> int:
    """Return the bytes of all last-level caches that the cpus (None: those of this process) can fill together."""
    found: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0) if cpus is None else cpus):
        levels = []
        for index in (root / f"cpu{cpu}/cache").glob("index[0-9]*"):
            try:
                text = (index / "size").read_text().strip()
                shared = (index / "shared_cpu_list").read_text().strip()
                levels.append((int((index / "level").read_text()), shared, int(text[:-1]) * _UNITS[text[-1]]))
            except (OSError, ValueError, KeyError, IndexError):
                continue  # an index that does not tell its size is not counted
        if levels:
            _, shared, size = max(levels)
            found[shared] = size
    return sum(found.values()) or _UNKNOWN_CACHE


def beyond_cache(cache: int | None = None) -> int:
    """Return how many bytes to cycle through, so that every one of them comes from memory."""
    return _CACHES * (cache_bytes() if cache is None else cache)


def require_kernels() -> None:
    """Refuse to measure without compiled kernels: the reference is a definition, not a contender."""
    if ops.library() is None:
        raise KernelError(f"there is nothing to measure: {native_why_not()}")


def check_threads(count: int) -> None:
    """Refuse more threads than this process has physical cores, or fewer than one."""
    most = ops.plan_here({}).count
    if not 1 <= count <= most:
        raise UsageError(f"--threads is {count}; expected 1 to {most}, the physical cores that this process may use")


def check_isa(name: str) -> None:
    """Refuse an instruction set that the library or this processor lacks."""
    able = [isa for isa, supported, _ in ops.isas() if supported]
    if name not in able:
        raise UsageError(f"--isa is {name!r}; expected one that this processor has: {', '.join(able)}")


@contextlib.contextmanager
def kernels_on(isa: str | None, threads: int) -> Iterator[ThreadPlan]:
    """Run the kernels of this process on an instruction set (None: the active one) and a number of threads."""
    lib, before = ops.library(), ops.active_isa()
    assert lib is not None
    assert before is not None
    plan = ThreadPlan(threads, ops.plan_here({}).cpus[:threads])
    try:
        start_pool(lib, plan)
        ops.select_isa(isa or before)
        yield plan
    finally:
        ops.select_isa(before)
        start_pool(lib, ops.plan_here())


class MemoryReader:
    """Measures how fast the pool's threads read memory, with AVX2 loads (plain ones on processors without).

    Holds 1 GiB, or several times the caches where they are that large. `size` is for tests.
    """

    def __init__(self, size: int | None = None) -> None:
        self._buffer = torch.empty(size or max(_READ_BYTES, beyond_cache()), dtype=torch.uint8)
        self._buffer.fill_(1)  # a page that was never written is the one page of zeros, and comes from the cache
        self._isa = [name for name, supported, _ in ops.isas() if supported][-1]

    def gbps(self) -> list[float]:
        """Read the buffer once; return 10^9 bytes a second for each 64 MiB of it.

        Pieces, because a median over them leaves out those in which another process had a core, as the median over
        the runs of a kernel does: one rate of the whole pass would not, and would make every kernel look fast.
        """
        lib, active = ops.library(), ops.active_isa()
        assert lib is not None
        assert active is not None
        ops.select_isa(self._isa)
        rates = []
        for piece in torch.split(self._buffer, _PIECE):
            started = time.perf_counter()
            lib.dlb_read_all(piece.data_ptr(), piece.numel())
            rates.append(piece.numel() / (time.perf_counter() - started) / 1e9)
        ops.select_isa(active)
        return rates
