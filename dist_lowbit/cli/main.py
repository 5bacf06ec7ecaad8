"""The dist-lowbit command (typer: the usual choice for typed command lines)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from dist_lowbit.core.errors import DistLowbitError, UsageError
from dist_lowbit.core.log import configure
from dist_lowbit.core.settings import settings
from dist_lowbit.core.version import __version__

from . import chat, convert, doctor, generate, inspect

app = typer.Typer(
    name="dist-lowbit",
    help="Low-bit LLM inference, tensor-parallel over CPU sockets and GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    configure(settings().log)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # a -- among the script's own words is the script's
        "help_option_names": [],
    },
    add_help_option=False,
)
def run(context: typer.Context) -> None:
    """Start a script once per rank: dist-lowbit run -n 2 script.py ... (--help for all options)."""
    from dist_lowbit.launcher.__main__ import main as launch

    raise typer.Exit(launch(list(context.args)))


app.command()(convert.convert)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(inspect.inspect)
app.command()(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. An intended error is one line on stderr."""
    try:
        app(args=list(argv) if argv is not None else None)
    except SystemExit as end:  # how the command line parser ends, whatever the outcome
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except KeyboardInterrupt:
        return 130
    except DistLowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UsageError.exit_code
    return 0
