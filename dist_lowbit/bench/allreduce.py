"""What `dist-lowbit bench allreduce` measures: every backend and way to call it in turns, on the same ranks.

The command starts the ranks, which run allreduce_rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_lowbit.core.errors import UsageError

BACKENDS = ("shm", "ccl", "mpi", "gloo")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of an element
# What a line may time. table: the table of C functions that a decoder calls; python: Group.all_reduce; native: the
# library's own reduction, which adds in another order.
CALLS = ("table", "python", "native")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LIMIT = 1 << 30  # bytes


@dataclass(frozen=True)
class Line:
    """Times are of one call, the slowest rank's; `bus_gbps` is what each rank sends and receives at least (2 (n-1)/n of
    the bytes), in 10^9 bytes a second."""

    backend: str
    ranks: int
    bytes: int
    dtype: str
    call: str
    median_us: float
    p99_us: float
    bus_gbps: float
    runs: int


@dataclass(frozen=True)
class Sweep:
    """What to measure."""

    backends: Sequence[str] = BACKENDS
    ranks: Sequence[int] = (2,)
    bytes: Sequence[int] = (4096, 16384, 262144, 4194304)
    dtypes: Sequence[str] = ("fp32",)
    rounds: int = 7


def size(text: str) -> int:
    """Return the bytes of "4K", "1M" or "300"."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    digits = text[: len(text) - len(unit)]
    if not digits.isdecimal() or unit not in _UNITS or not 4 <= int(digits) * _UNITS[unit] <= _LIMIT:
        raise UsageError(f"--bytes holds {text!r}; expected sizes of 4 to 1G bytes, such as 16K or 4M")
    return int(digits) * _UNITS[unit]


def sizes(text: str) -> list[int]:
    """Return the bytes of "16K,4M", or of "4K..32M", which doubles from one to the other; UsageError for others."""
    found: list[int] = []
    for word in text.split(","):
        first, dots, last = word.strip().partition("..")
        at, end = size(first), size(last if dots else first)
        if at > end:
            raise UsageError(f"--bytes holds {word.strip()!r}, which begins above its end; write {last}..{first}")
        while at <= end:
            found.append(at)
            at *= 2
    return found


def check_elements(sizes: Sequence[int], dtypes: Sequence[str]) -> None:
    """Refuse bytes that are not a whole number of elements: another size would be measured than is told."""
    for count in sizes:
        for dtype in dtypes:
            if count % DTYPES[dtype]:
                raise UsageError(f"--bytes holds {count}, no whole number of {dtype} elements of {DTYPES[dtype]} bytes")


def without_mpi(backends: Sequence[str], reason: str) -> list[str]:
    """Return the others of these backends, since mpi cannot be measured; UsageError if there are none."""
    others = [name for name in backends if name != "mpi"]
    if not others:
        raise UsageError(f"--backends names mpi alone, which cannot be measured: {reason}")
    return others
