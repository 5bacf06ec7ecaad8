"""Start the same command once per rank."""

from __future__ import annotations

import os
import sys

from dist_lowbit.core.errors import UsageError


def in_job() -> bool:
    """Return whether this process is one of several ranks already."""
    from dist_lowbit.core.rank import discover

    return discover(os.environ).world_size > 1


def relaunch(ranks: int, bind: str) -> int:
    """Run this command line on `ranks` ranks through the launcher, rank 0 on this terminal; return the exit code."""
    from dist_lowbit.launcher.__main__ import main as launch

    if ranks < 1:
        raise UsageError(f"-n is {ranks}; expected at least 1 rank")
    own = without_ranks(sys.argv[1:])
    return launch(["-n", str(ranks), "--bind", bind, "--no-prefix", "-m", "dist_lowbit.cli", *own])


def without_ranks(argv: list[str]) -> list[str]:
    """Return a command line without its -n option: the ranks find their number in the environment."""
    result, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == "-n":
            skip = True
        elif not (word.startswith("-n") and word[2:].lstrip("=").isdigit()):
            result.append(word)
    return result
