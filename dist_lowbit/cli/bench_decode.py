"""dist-lowbit bench decode."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.core.errors import UsageError

from .bench import choice
from .launch import check_settings, launch_ranks, started
from .options import Bind, Device

if TYPE_CHECKING:
    from dist_lowbit.bench.decode import Breakdown, Line


def decode(
    context: typer.Context,
    shape: Annotated[
        str, typer.Option(help="llama-1b, llama2-7b, llama3-8b, llama2-70b/8, ..., or a model directory.")
    ] = "llama-1b",
    low_bit: Annotated[str | None, typer.Option(help="Format of the random weights. Default: sym_int4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Elements of K per scale; -1: a row. Default: 64.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each rank. Default: its cores.")] = None,
    tp: Annotated[int | None, typer.Option(help="Ranks to start and split the model over.")] = None,
    bind: Bind = "auto",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    num_beams: Annotated[int, typer.Option(help="Also run generate with so many of --batch's rows as beams.")] = 1,
    decoder: Annotated[str | None, typer.Option(help="native, torch, auto, or off: Hugging Face's forward.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of the decoder's cache: fp32, fp16 (the default, as llama.cpp's), bf16, int8.")
    ] = None,
    device: Device = "cpu",
    peer: Annotated[str | None, typer.Option(help="llama.cpp: also measure it, in turns (extra bench).")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each way to run.")] = 3,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Say where each rank's time goes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Measure a whole model: time to first token, time between tokens, memory (see benchmarks/README.md)."""
    choice("--peer", peer, ["llama.cpp"])
    check_settings(device)
    _check_threads(threads, tp)
    code = launch_ranks(tp, bind, context.obj, "--tp", device)
    if code is not None:
        raise typer.Exit(code)

    from dist_lowbit import ops
    from dist_lowbit.assembly.mode import mode_here
    from dist_lowbit.assembly.ranks import join_ranks
    from dist_lowbit.bench.decode import Run, run

    what = Run(
        *(shape, low_bit, group_size, threads or ops.plan_here().count, prompt, new, batch, peer is not None, rounds),
        breakdown=breakdown,
        num_beams=num_beams,
    )
    mode = mode_here(decoder=decoder, kv_cache_dtype=kv_cache_dtype, device=device)
    group, _ = join_ranks("auto", device)
    with group:
        lines = list(run(what, group, mode))
        if group.rank == 0 and as_json:
            for line in lines:
                print(json.dumps(dataclasses.asdict(line)), flush=True)
        elif group.rank == 0:
            print_table(lines)


def _check_threads(threads: int | None, tp: int | None) -> None:
    """Refuse more threads than all ranks together have cores for, before any is started."""
    from dist_lowbit import ops

    if threads is None or started():
        return
    cores, ranks = ops.plan_here({}).count, tp or 1
    if threads < 1 or threads * ranks > max(cores, ranks):
        raise UsageError(f"--threads is {threads} for each of {ranks} rank(s); this process may use {cores} core(s)")


def print_table(lines: Iterable[Line]) -> None:
    """Print lines as a table."""
    from rich.console import Console
    from rich.table import Table

    rows = list(lines)
    head = rows[0]
    table = Table(
        title=f"{head.shape}: {head.batch} x {head.prompt} tokens, then {head.new} each; "
        f"{head.tp} rank(s) of {head.threads} thread(s); memory reads at {head.read_gbps:.1f} GB/s"
    )
    table.add_column("run by")
    table.add_column("format")
    for name in ("prefill tok/s", "decode tok/s (least - most)", "TTFT ms", "ITL ms p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for name in ("of read", "outside kernels", "peak MiB"):
        table.add_column(name, justify="right")
    for line in rows:
        outside = line.outside_kernels_fraction
        table.add_row(
            line.how if line.peer is None else f"{line.peer} ({line.how})",
            line.low_bit,
            f"{line.prefill_tokens_per_s:.1f}",
            f"{line.decode_tokens_per_s:.2f} ({line.slowest_decode_tokens_per_s:.2f} - "
            f"{line.fastest_decode_tokens_per_s:.2f})",
            f"{line.ttft_ms:.1f}",
            *(f"{value:.2f}" for value in (line.itl_p50_ms, line.itl_p90_ms, line.itl_p99_ms)),
            f"{line.fraction_of_read:.2f}",
            "-" if outside is None else f"{outside:.3f}",
            f"{line.peak_rss_bytes / 2**20:.0f}",
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
    for line in rows:
        if line.breakdown is not None:
            _print_breakdown(line.breakdown, line.how)


def _print_breakdown(breakdown: Breakdown, how: str) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{how}: where the milliseconds of a step go; rank {breakdown.slowest} is the slowest")
    table = Table()
    for name in ("rank", "linear", "attention", "reduce", "wait", "outside kernels"):
        table.add_column(name, justify="right")
    for row in breakdown.ranks:
        parts = (row.linear_ms, row.attention_ms, row.reduce_ms, row.wait_ms, row.outside_ms)
        table.add_row(str(row.rank), *(f"{part:.3f}" for part in parts))
    Console().print(table)
