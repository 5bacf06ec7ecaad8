"""dist-lowbit chat."""

from __future__ import annotations

import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .launch import in_job, relaunch

if TYPE_CHECKING:
    from dist_lowbit.comm import Group
    from dist_lowbit.engine import Session

# While a person thinks, rank 0 tells the others so, well within the time after which silence is a fault.
_KEEP_ALIVE_S = 5.0


def chat(
    directory: Annotated[Path, typer.Argument(help="A low-bit checkpoint.")],
    ranks: Annotated[
        int | None, typer.Option("-n", help="Ranks to start. Default: those this process was started with, else one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    temperature: Annotated[float, typer.Option(help="Flattens (above 1) or sharpens the distribution.")] = 0.8,
    bind: Annotated[str, typer.Option(help="Bind ranks to: none, core, numa, socket.")] = "none",
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
) -> None:
    """Talk with a model: one line is one turn, an empty line or end of input ends."""
    if ranks is not None and not in_job():
        from dist_lowbit.assembly.paths import require_checkpoint

        require_checkpoint(directory)
        if ranks != 1:
            raise typer.Exit(relaunch(ranks, bind))

    from dist_lowbit.assembly.ranks import join_ranks
    from dist_lowbit.engine import Sampling, open_session

    sampling = Sampling(greedy, temperature)
    group, _ = join_ranks(ranks if ranks is not None else "auto")
    with group:
        session = open_session(directory, group, trust_remote_code=trust_remote_code)
        messages: list[dict[str, str]] = []
        while (line := _next_line(group)) is not None:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(session, messages, max_new_tokens, sampling)})


def _next_line(group: Group) -> str | None:
    """Return the next line a person typed at rank 0, on every rank; None at the end."""
    if group.rank == 0:
        print("> ", end="", flush=True)
    while True:
        heard: Any = None
        if group.rank == 0:
            ready, _, _ = select.select([sys.stdin], [], [], _KEEP_ALIVE_S)
            heard = {"line": sys.stdin.readline().strip()} if ready else {"waiting": True}
        heard = group.broadcast_object(heard, 0)
        if "line" in heard:
            return heard["line"] or None


def _answer(session: Session, messages: list[dict[str, str]], max_new_tokens: int, sampling: Any) -> str:
    from dist_lowbit.engine import generate
    from dist_lowbit.engine.chat import render

    leader = session.group.rank == 0

    def show(text: str) -> None:
        print(text, end="", flush=True)

    result = generate(session, render(session.tokenizer, messages), max_new_tokens, sampling, show if leader else None)
    if leader:
        print(flush=True)
    return result.text
