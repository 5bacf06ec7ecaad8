"""Measure all-reduces: every backend and way to call it in turns, on the same ranks.

The ranks are started by the launcher: under mpirun where mpi is measured, else locally. Rank 0 writes the lines to a
file, which this process reads when the ranks have ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_lowbit.comm.mpi import MpiGroup
from dist_lowbit.core.errors import DistLowbitError, UsageError
from dist_lowbit.core.rank import RankInfo

BACKENDS = ("shm", "ccl", "mpi", "gloo")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of an element
# What a line may time. table: the table of C functions that a decoder calls; python: Group.all_reduce; native: the
# library's own reduction, which adds in another order.
CALLS = ("table", "python", "native")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LIMIT = 1 << 30  # bytes
DEADLINE = 1800.0  # seconds for all sizes of one number of ranks


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
        raise UsageError(f"{text!r} is no size of a message; expected 4 to 1G bytes, such as 16K or 4M")
    return int(digits) * _UNITS[unit]


def sizes(text: str) -> list[int]:
    """Return the bytes of "16K,4M", or of "4K..32M", which doubles from one to the other; UsageError for others."""
    found: list[int] = []
    for word in text.split(","):
        first, dots, last = word.strip().partition("..")
        at, end = size(first), size(last if dots else first)
        if at > end:
            raise UsageError(f"{word.strip()!r} is no range of sizes: it begins above its end; write {last}..{first}")
        while at <= end:
            found.append(at)
            at *= 2
    return found


def check_elements(sizes: Sequence[int], dtypes: Sequence[str]) -> None:
    """Refuse bytes that are not a whole number of elements: another size would be measured than is told."""
    for count in sizes:
        for dtype in dtypes:
            if count % DTYPES[dtype]:
                raise UsageError(f"{count} bytes are no whole number of {dtype} elements of {DTYPES[dtype]} bytes")


def can_use_mpi() -> str | None:
    """Return why mpi cannot be measured here, or None."""
    reason = MpiGroup.why_not(RankInfo(0, 2, 0, 2, "127.0.0.1", 1, "bench"))
    if reason is not None and "not installed" in reason:
        return reason
    return None if _mpirun() else "there is no mpirun beside this Python or on PATH"


def without_mpi(backends: Sequence[str], reason: str) -> list[str]:
    """Return the others of these backends, since mpi cannot be measured; UsageError if there are none."""
    others = [name for name in backends if name != "mpi"]
    if not others:
        raise UsageError(f"mpi is the only backend asked for and cannot be measured: {reason}")
    return others


def _mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    places = [beside.parent, *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    return next((str(place) for place in places if (place / "mpirun").is_file()), None)


def run(sweep: Sweep) -> Iterator[Line]:
    """Start the ranks for each of their numbers and yield the lines; raise DistLowbitError if they fail."""
    for count in sweep.ranks:
        with tempfile.TemporaryDirectory(prefix="dist_lowbit-bench-") as folder:
            yield from _run_ranks(sweep, count, Path(folder) / "lines")


def _run_ranks(sweep: Sweep, count: int, out: Path) -> list[Line]:
    style = "mpirun" if "mpi" in sweep.backends else "local"
    request = json.dumps({**asdict(sweep), "out": str(out)})
    launcher = [sys.executable, "-m", "dist_lowbit.launcher", "-n", str(count), "--style", style]
    command = [*launcher, "-m", "dist_lowbit.bench.allreduce_rank", request]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    mpirun = _mpirun()
    if style == "mpirun" and mpirun:
        environ["PATH"] = f"{mpirun}{os.pathsep}{environ.get('PATH', '')}"
    process = subprocess.Popen(command, env=environ, stdout=sys.stderr)
    try:
        code = process.wait(DEADLINE)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        raise DistLowbitError(f"{count} ranks that were to measure all-reduces ended with exit code {code}; see above")
    return [Line(**json.loads(line)) for line in out.read_text().splitlines()]
