"""dist-lowbit generate."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.engine.sampling import Sampling, check_limit

from .launch import CACHE_HELP, DECODER_HELP, check_choices, start_ranks

if TYPE_CHECKING:
    from dist_lowbit.engine.generate import Generation


def generate(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A low-bit checkpoint.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    ranks: Annotated[
        int | None, typer.Option("-n", help="Ranks to start. Default: those this process was started with, else one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 48,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    temperature: Annotated[float, typer.Option(help="Flattens (above 1) or sharpens the distribution.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many most likely tokens; 0 is off.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of so much probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    bind: Annotated[str, typer.Option(help="Bind ranks to: auto, none, core, numa, socket.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    device: Annotated[str, typer.Option(help="Run on cpu, cuda or xpu, each rank on one.")] = "cpu",
    decoder: Annotated[str | None, typer.Option(help=DECODER_HELP)] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help=CACHE_HELP)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
) -> None:
    """Generate text from a prompt, and say how fast."""
    sampling = Sampling(greedy, temperature, top_k, top_p, seed)
    check_limit(max_new_tokens)
    check_choices(decoder, kv_cache_dtype)
    code = start_ranks(directory, ranks, bind, context.obj, device)
    if code is not None:
        raise typer.Exit(code)

    from dist_lowbit.assembly.mode import mode_here
    from dist_lowbit.assembly.ranks import join_ranks
    from dist_lowbit.engine.generate import encode
    from dist_lowbit.engine.generate import generate as run
    from dist_lowbit.engine.session import open_session

    mode = mode_here(decoder=decoder, kv_cache_dtype=kv_cache_dtype, device=device)
    group, _ = join_ranks("auto", device)
    with group:
        session = open_session(directory, group, trust_remote_code=trust_remote_code, mode=mode)
        leader = group.rank == 0
        ids = encode(session, prompt)

        def show(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        waiting = [prompt]  # until the first token: warnings come before

        def go_on(text: str) -> None:
            show(waiting.pop() + text if waiting else text)

        result = run(session, ids, max_new_tokens, sampling, go_on if leader and not as_json else None)
        if leader and waiting and not as_json:
            show(waiting.pop())
        if leader and as_json:
            print(json.dumps(dataclasses.asdict(result)), flush=True)
        elif leader:
            print(flush=True)
            print_timing(result)


def print_timing(result: Generation) -> None:
    """Print how fast a generation was, and the peak memory of each rank."""
    peaks = "  ".join(f"rank {rank} {peak / 2**20:.0f} MiB" for rank, peak in enumerate(result.peak_rss_bytes))
    lines = [
        "",
        f"{len(result.tokens)} tokens after {result.prompt_tokens} of the prompt ({result.finish_reason})",
        f"TTFT {result.ttft_ms:.1f} ms   mean ITL {result.itl_ms:.2f} ms   {result.tokens_per_s:.1f} tokens/s",
        f"peak memory  {peaks}",
    ]
    print(os.linesep.join(lines), flush=True)
