"""dist-lowbit bench linear."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.core.errors import UsageError

if TYPE_CHECKING:
    from dist_lowbit.bench.linear import Line

app = typer.Typer(help="Measure kernels and whole steps on this machine.", rich_markup_mode=None)


def numbers(option: str, text: str) -> list[int]:
    """Return the positive numbers of a list such as "1,4,32"; anything else is a UsageError naming the option."""
    found = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise UsageError(f"{option} is {text!r}; expected numbers of 1 or more with commas between, such as 1,4")
        found.append(int(word))
    return found


def choice(option: str, value: str | None, allowed: Iterable[str]) -> None:
    """Refuse a value that is none of those allowed; None stands for the option left out."""
    names = list(allowed)
    if value is not None and value not in names:
        raise UsageError(f"{option} is {value!r}; expected {' or '.join(names)}")


@app.command()
def linear(
    format: Annotated[str, typer.Option(help="Formats with commas between, or all.")] = "sym_int4",
    n: Annotated[str, typer.Option(help="Out features, with commas between.")] = "4096,11008",
    k: Annotated[str, typer.Option(help="In features, with commas between.")] = "4096",
    m: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "1,4,32,256",
    group_size: Annotated[int | None, typer.Option(help="Elements of K per scale; -1: a row. Default: 64.")] = None,
    threads: Annotated[str | None, typer.Option(help="Threads, with commas between. Default: all cores.")] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction sets, with commas between. Default: the best.")] = None,
    compute: Annotated[str, typer.Option(help="Activations of codes: int8 or fp32.")] = "int8",
    peer: Annotated[str | None, typer.Option(help="torch: also measure torch's operators, in turns.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each line; a median is taken over all of their runs.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Measure matrix products against the memory's read bandwidth (benchmarks/README.md says how to read them)."""
    choice("--peer", peer, ["torch"])
    choice("--compute", compute, ["int8", "fp32"])
    sizes = {name: numbers(f"--{name}", text) for name, text in (("n", n), ("k", k), ("m", m))}
    counts = None if threads is None else numbers("--threads", threads)
    numbers("--rounds", str(rounds))

    from dist_lowbit import ops
    from dist_lowbit.bench.linear import Sweep, formats_named, run

    ops.limit_torch()  # this process is ours: the cores belong to the kernels' own pool
    sweep = Sweep(
        formats_named(format),
        n=sizes["n"],
        k=sizes["k"],
        m=sizes["m"],
        threads=counts or [ops.plan_here().count],
        isas=(None,) if isa is None else [name.strip() for name in isa.split(",")],
        group_size=group_size,
        compute=compute,
        peer=peer is not None,
        rounds=rounds,
    )
    if as_json:
        for line in run(sweep):
            print(json.dumps(dataclasses.asdict(line)), flush=True)
    else:
        print_table(run(sweep))


def print_table(lines: Iterable[Line]) -> None:
    """Print lines as a table once all are measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="matrix products: medians, 10^9 bytes and operations a second")
    for name in ("format", "m", "n", "k", "group", "threads", "isa"):
        table.add_column(name)
    for name in ("median us", "10% - 90%", "GB/s", "read GB/s", "of read", "GOPS"):
        table.add_column(name, justify="right")
    for line in lines:
        what = line.format if line.peer is None else f"{line.peer} ({line.peer_isa})"
        table.add_row(
            *map(str, (what, line.m, line.n, line.k, line.group_size, line.threads, line.isa)),
            f"{line.median_us:.1f}",
            f"{line.p10_us:.1f} - {line.p90_us:.1f}",
            f"{line.gbps:.1f}",
            f"{line.read_gbps:.1f}",
            f"{line.fraction_of_read:.2f}",
            f"{line.gops:.1f}",
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
