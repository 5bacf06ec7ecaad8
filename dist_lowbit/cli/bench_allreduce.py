"""dist-lowbit bench allreduce."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.core.errors import UsageError

if TYPE_CHECKING:
    from dist_lowbit.bench.allreduce import Line


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
        can_use_mpi,
        check_elements,
        run,
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
