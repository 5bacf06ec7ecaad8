"""dist-lowbit bench allreduce.

The launcher starts the ranks: under mpirun where mpi is measured, else locally. Rank 0 writes the lines to a file,
which this process reads when the ranks have ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.core.errors import DistLowbitError, UsageError

if TYPE_CHECKING:
    from dist_lowbit.bench.allreduce import Line, Sweep

DEADLINE = 1800.0  # seconds for all sizes of one number of ranks


def allreduce(
    backends: Annotated[str, typer.Option(help="Backends with commas between.")] = "shm,ccl,mpi,gloo",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas between.")] = "2",
    bytes: Annotated[str, typer.Option(help="Sizes with commas between; A..B doubles from A to B.")] = "4K,16K,256K,4M",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, with commas between.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Turns of each line; a median is taken over all of their runs.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Measure all-reduces over each backend, on ranks that this starts (benchmarks/README.md says how to read them)."""
    from dist_lowbit.bench.allreduce import (
        BACKENDS,
        DTYPES,
        Sweep,
        check_elements,
        sizes,
        without_mpi,
    )

    from .bench import choice, numbers

    names = [name.strip() for name in backends.split(",")]
    dtypes = [name.strip() for name in dtype.split(",")]
    for name in names:
        choice("--backends", name, BACKENDS)
    for name in dtypes:
        choice("--dtype", name, DTYPES)
    counts = numbers("--ranks", ranks)
    if min(counts) < 2:
        raise UsageError(f"--ranks is {ranks!r}; a sum over one rank takes no time, expected 2 or more")
    numbers("--rounds", str(rounds))
    messages = sizes(bytes)
    check_elements(messages, dtypes)
    reason = can_use_mpi() if "mpi" in names else None
    if reason is not None:
        names = without_mpi(names, reason)
        print(f"mpi is left out: {reason}", file=sys.stderr)
    lines = run(Sweep(names, counts, messages, dtypes, rounds))
    if as_json:
        for line in lines:
            print(json.dumps(dataclasses.asdict(line)), flush=True)
    else:
        print_table(lines)


def print_table(lines: Iterable[Line]) -> None:
    """Print lines as a table once all are measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="all-reduces: microseconds of a call, 10^9 bytes a second on each rank's bus")
    for name in ("ranks", "bytes", "dtype", "backend", "call"):
        table.add_column(name)
    for name in ("median us", "99% us", "bus GB/s"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            *map(str, (line.ranks, line.bytes, line.dtype, line.backend, line.call)),
            f"{line.median_us:.1f}",
            f"{line.p99_us:.1f}",
            f"{line.bus_gbps:.2f}",
        )
    Console().print(table)


def can_use_mpi() -> str | None:
    """Return why mpi cannot be measured here, or None."""
    from dist_lowbit.comm.mpi import MpiGroup
    from dist_lowbit.core.rank import RankInfo
    from dist_lowbit.launcher.runners import RUNNERS

    reason = MpiGroup.why_not(RankInfo(0, 2, 0, 2, "127.0.0.1", 1, "bench"))
    if reason is not None and "not installed" in reason:
        return reason
    return RUNNERS["mpirun"]().why_not()


def run(sweep: Sweep) -> Iterator[Line]:
    """Start the ranks for each of their numbers and yield the lines; raise DistLowbitError if they fail."""
    for count in sweep.ranks:
        with tempfile.TemporaryDirectory(prefix="dist_lowbit-bench-") as folder:
            yield from _run_ranks(sweep, count, Path(folder) / "lines")


def _run_ranks(sweep: Sweep, count: int, out: Path) -> list[Line]:
    from dist_lowbit.bench.allreduce import Line

    style = "mpirun" if "mpi" in sweep.backends else "local"
    request = json.dumps({**dataclasses.asdict(sweep), "out": str(out)})
    launcher = [sys.executable, "-m", "dist_lowbit.launcher", "-n", str(count), "--style", style]
    command = [*launcher, "-m", "dist_lowbit.bench.allreduce_rank", request]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    try:
        code = process.wait(DEADLINE)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        raise DistLowbitError(f"{count} ranks that were to measure all-reduces ended with exit code {code}; see above")
    return [Line(**json.loads(line)) for line in out.read_text().splitlines()]
