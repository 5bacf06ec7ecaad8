"""The dist-lowbit command (typer: the usual choice for typed command lines)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.main

from dist_lowbit.core.errors import DistLowbitError, UsageError
from dist_lowbit.core.log import configure
from dist_lowbit.core.settings import settings
from dist_lowbit.core.version import __version__

from . import bench, bench_allreduce, bench_decode, build, chat, convert, doctor, generate, inspect

_BadCommandLine: Any = typer.BadParameter.__base__  # typer shows this class of its parser only through its children

app = typer.Typer(
    name="dist-lowbit",
    help="Low-bit LLM inference, tensor-parallel over CPU sockets.",
    add_completion=False,
    rich_markup_mode=None,  # its boxes cut long names of options short
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
bench.app.command()(bench_allreduce.allreduce)
bench.app.command()(bench_decode.decode)
app.add_typer(bench.app, name="bench")
app.add_typer(build.app, name="build")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. An intended error is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a reader that has left can still be answered for
    except BrokenPipeError:
        # Nobody reads on: end as the shell's tools do, and let the interpreter's own last flush go nowhere.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(words: list[str]) -> int:
    try:
        # Without standalone mode: usage errors of the command line come here like all others, to be one line too.
        code = typer.main.get_command(app).main(
            words or ["--help"], prog_name="dist-lowbit", standalone_mode=False, obj=words
        )
    except SystemExit as end:  # how typer itself ends when nobody reads on
        raise BrokenPipeError from end
    except typer.Abort:
        return 130
    except _BadCommandLine as error:
        return _tell(_with_value(error), error.exit_code)
    except DistLowbitError as error:
        return _tell(error.with_option(), error.exit_code)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        return _tell(f"{error.filename}: {error.strerror}", UsageError.exit_code)
    return code if isinstance(code, int) else 0


def _with_value(error: Any) -> str:
    """Return what typer says of a bad command line, with the word that it could not read where it leaves that out."""
    message: str = error.format_message()
    found = [each["input"] for each in getattr(error.__cause__, "errors", list)()]  # pydantic's, which typer asks
    return f"{message}; found {found[0]!r}" if found else message


def _tell(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
