"""dist-lowbit build: what can only be built on the machine that will use it."""

from __future__ import annotations

import typer

app = typer.Typer(help="Build what can only be built on the machine that will use it.", rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Keep the names of what is built as subcommands, though there is only one."""


@app.command()
def ccl() -> None:
    """Build the oneCCL shim into the user's cache and print its path; the backend ccl does so itself at first use."""
    from dist_lowbit.core.errors import UsageError
    from dist_lowbit.kernels.ccl import ShimMissing, ensure

    try:
        print(ensure())
    except ShimMissing as error:
        raise UsageError(str(error)) from error
