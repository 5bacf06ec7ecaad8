"""dist-lowbit generate."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lowbit.engine.sampling import Sampling, check_limit

from .launch import check_choices, start_ranks
from .options import (
    Bind,
    CacheDtype,
    Checkpoint,
    Decoder,
    Device,
    Greedy,
    Ranks,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    check_greedy,
)

if TYPE_CHECKING:
    from dist_lowbit.engine.generate import Generation


def generate(
    context: typer.Context,
    directory: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option(help="The text to go on from. Default: none, the model begins by itself.")
    ] = None,
    ranks: Ranks = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 48,
    greedy: Greedy = False,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    seed: Seed = None,
    bind: Bind = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    device: Device = "cpu",
    decoder: Decoder = None,
    kv_cache_dtype: CacheDtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text from a prompt, and say how fast."""
    check_greedy(context)
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
        ids = encode(session, prompt or "")
        if leader and prompt is None:
            print("no --prompt: starting from the model's beginning-of-text token", file=sys.stderr)

        def show(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        waiting = [prompt or ""]  # until the first token: warnings come before

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
