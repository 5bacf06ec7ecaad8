"""dist-lowbit chat."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_lowbit.core.settings import settings
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
    from dist_lowbit.comm import Group
    from dist_lowbit.engine.session import Session

# While a person thinks, rank 0 tells the others so, well within the time after which silence is a fault.
_KEEP_ALIVE_S = 5.0


def chat(
    context: typer.Context,
    directory: Checkpoint,
    ranks: Ranks = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    greedy: Greedy = False,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    seed: Seed = None,
    bind: Bind = "auto",
    device: Device = "cpu",
    decoder: Decoder = None,
    kv_cache_dtype: CacheDtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model: one line is one turn, an empty line or end of input ends."""
    check_greedy(context)
    sampling = Sampling(greedy, temperature, top_k, top_p, seed)
    check_limit(max_new_tokens)
    check_choices(decoder, kv_cache_dtype)
    code = start_ranks(directory, ranks, bind, context.obj, device)
    if code is not None:
        raise typer.Exit(code)

    from dist_lowbit.assembly.mode import mode_here
    from dist_lowbit.assembly.ranks import join_ranks
    from dist_lowbit.engine.session import open_session

    mode = mode_here(decoder=decoder, kv_cache_dtype=kv_cache_dtype, device=device)
    group, _ = join_ranks("auto", device)
    with group:
        session = open_session(directory, group, trust_remote_code=trust_remote_code, mode=mode)
        lines = Lines(sys.stdin.fileno()) if group.rank == 0 else None
        messages: list[dict[str, str]] = []
        while (line := _next_line(group, lines)) is not None:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(session, messages, max_new_tokens, sampling)})


class Lines:
    """Lines from a file descriptor, waited for with a limit.

    Not sys.stdin: it keeps lines it has read ahead to itself, and select then sees none waiting.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read, self._ended = descriptor, b"", False

    def next(self, seconds: float) -> str | None:
        """Return the next line without its end, an empty one at the end of input, None after waiting in vain."""
        while b"\n" not in self._read and not self._ended:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            more = os.read(self._descriptor, 1 << 16)
            self._read, self._ended = self._read + more, not more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode(errors="replace").strip()


def _next_line(group: Group, lines: Lines | None) -> str | None:
    """Return the next line a person typed at rank 0, on every rank; None at the end."""
    if lines is not None:
        print("> ", end="", flush=True)
    while True:
        heard: Any = None
        if lines is not None:
            line = lines.next(min(_KEEP_ALIVE_S, settings().timeout / 4))
            heard = {"waiting": True} if line is None else {"line": line}
        heard = group.broadcast_object(heard, 0)
        if "line" in heard:
            break
    if lines is not None and not heard["line"]:
        print(flush=True)  # what comes next on this terminal starts on a line of its own
    return heard["line"] or None


def _answer(session: Session, messages: list[dict[str, str]], max_new_tokens: int, sampling: Sampling) -> str:
    from dist_lowbit.engine.chat import render
    from dist_lowbit.engine.generate import generate

    leader = session.group.rank == 0

    def show(text: str) -> None:
        print(text, end="", flush=True)

    result = generate(session, render(session, messages), max_new_tokens, sampling, show if leader else None)
    if leader:
        print(flush=True)
    return result.text
