"""The command line: `python -m launcher -n 2 script.py`, `dist-lowbit run -n 2 script.py`."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from .binding import MODES, bind, resolve
from .errors import LaunchError
from .job import Job, Place, Program, inherited, make_job, parse_env
from .port import Port
from .runners import RUNNERS, Runner
from .topology import Topology, from_text, read_machine
from .watch import Watch

USAGE = """%(prog)s -n N [options] script.py [args ...]
       %(prog)s -n N [options] -m module [args ...]
       %(prog)s -n N [options] [--no-python] [--] program [args ...]"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="dist-lowbit run",
        usage=USAGE,
        allow_abbrev=False,
        description="Start N ranks of a program on this machine, bound to their cores and memory; the first that "
        "fails ends all.",
    )
    add = parser.add_argument
    add("-n", dest="ranks", metavar="N", required=True, help="number of ranks")
    add("--bind", choices=MODES, default="auto", help="what a rank gets whole pieces of; auto: NUMA nodes where each "
        "rank gets as many, else cores, else (more ranks than cores) none")  # fmt: skip
    add("--hyper-threads", action="store_true", help="bind to all hyper-threads of a core, not to its first")
    add("--style", choices=list(RUNNERS), default="local", help="who starts the ranks (default: local, the launcher)")
    add("--dry-run", action="store_true", help="print each rank's environment, cores and command; start nothing")
    add("--topology", metavar="FILE", help="with --dry-run: the machine recorded in FILE by lscpu -p=CPU,CORE,SOCKET,"
        "NODE, instead of this one")  # fmt: skip
    add("--log-dir", metavar="DIR", help="write each rank's output to DIR/rankR.out and .err as well")
    add("--master-port", metavar="P", help="port of the rendezvous (default: a free one)")
    add("--env", metavar="K=V", action="append", default=[], help="set a variable for all ranks; may be repeated")
    add("--no-prefix", action="store_true", help="give rank 0 the terminal: no [0] before its lines, no waiting for "
        "whole ones")  # fmt: skip
    add("--grace", metavar="SECONDS", default="3", help="from SIGTERM to SIGKILL when the job must end (default: 3)")
    add("--no-python", action="store_true", help="run the program as it is, even if it ends in .py")
    add("-m", dest="module", metavar="module", help="run a module, as python -m does; ends the options")
    return parser


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the launcher's own options and the rest: the program and its arguments, which nobody else may read."""
    flags = {"--hyper-threads", "--dry-run", "--no-prefix", "--no-python", "-h", "--help"}
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "--":
            return list(argv[:i]), list(argv[i + 1 :])
        if not word.startswith("-") or word == "-":
            break
        if word == "-m":
            return list(argv[: i + 2]), list(argv[i + 2 :])
        attached = "=" in word or (word.startswith("-n") and word != "-n")
        i += 1 if word in flags or attached else 2
    return list(argv[:i]), list(argv[i:])


def find_program(options: argparse.Namespace, rest: Sequence[str]) -> Program:
    """Return what to run: a module, a Python script, or a program that is executable or on PATH."""
    if options.module is not None:
        if options.no_python:
            raise LaunchError("-m and --no-python exclude each other: a module is run by python")
        return Program("module", options.module, tuple(rest), sys.executable)
    if not rest:
        raise LaunchError("nothing to run: give a script, -m module, or -- program")
    target, args = rest[0], tuple(rest[1:])
    path = Path(target)
    if not options.no_python and path.exists() and (path.suffix in (".py", ".pyz") or path.is_dir()):
        if path.is_dir() and not (path / "__main__.py").exists():
            raise LaunchError(f"{target} is a directory without __main__.py, so python cannot run it")
        return Program("script", target, args, sys.executable)
    found = shutil.which(target)
    if found is not None:
        return Program("program", found, args, sys.executable)
    if not path.exists():
        raise LaunchError(f"{target} does not exist here and is no program on PATH")
    raise LaunchError(f"{target} is neither a .py file nor executable: rename it, or chmod +x it")


def _number(name: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise LaunchError(f"{name} {text} is no whole number") from None
    if not low <= value <= high:
        raise LaunchError(f"{name} {text} is out of range: expected {low} to {high}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise LaunchError(f"--grace {text} is no number of seconds from 0 to 3600")
    return value


def _machine(options: argparse.Namespace) -> Topology:
    if options.topology is None:
        return read_machine()
    if not options.dry_run:
        raise LaunchError("--topology describes another machine, so it needs --dry-run")
    try:
        return from_text(Path(options.topology).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--topology {options.topology} cannot be read: {error}") from None


def describe(job: Job, runner: Runner, topology: Topology) -> str:
    """Return what --dry-run prints: the machine, each rank's place and environment, the command of each process."""
    lines = [f"# style {runner.name}, {job.size} ranks, bind {job.bind}, launch id {job.launch_id}"]
    lines.append(f"# machine: {topology.describe()}")
    lines += [f"# rank {spec.rank}: {spec.describe()}" for spec in job.ranks]
    lines += [command.shell() for command in runner.command(job)]
    return "\n".join(lines)


def _sweep(launch_id: str, folder: str = "/dev/shm") -> None:
    """Remove the shared memory of this job that no rank lived to unlink: its names hold the launch id."""
    for path in Path(folder).glob(f"*{launch_id}*"):
        path.unlink(missing_ok=True)


def run(argv: Sequence[str]) -> int:
    """Do what `argv` asks and return the exit code; LaunchError if it cannot be done."""
    own, rest = split(argv)
    options = _parser().parse_args(own)
    ranks = _number("-n", options.ranks, -(1 << 31), 1 << 31)
    wanted = None if options.master_port is None else _number("--master-port", options.master_port, 1, 65535)
    grace, user_env = _seconds(options.grace), parse_env(options.env)
    topology = _machine(options)
    slots = bind(topology, ranks, options.bind, hyper_threads=options.hyper_threads)
    program = find_program(options, rest)
    runner = RUNNERS[options.style]()
    if (why_not := runner.why_not()) is not None:
        raise LaunchError(f"--style {options.style} cannot be used: {why_not}")
    host = socket.gethostname()
    with closing(Port(wanted)) as port:
        job = make_job(
            program,
            slots,
            Place(host, port.number, secrets.token_hex(8), user_env=user_env),
            os.environ,
            bind=resolve(topology, ranks, options.bind),
            prefix=not options.no_prefix,
            log_dir=options.log_dir,
        )
        if options.dry_run:
            print(describe(job, runner, topology))
            return 0
        if job.log_dir is not None:
            _make_folder(job.log_dir)
        try:
            return Watch(runner.command(job), inherited(os.environ), host=host, grace=grace).run()
        finally:
            _sweep(job.launch_id)


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise LaunchError(f"--log-dir {path} cannot be made: {error.strerror}") from None
    if not writable:
        raise LaunchError(f"--log-dir {path} cannot be written to")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher and return its exit code: the failed rank's, 128 + signal, or 2 for a bad request."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except LaunchError as error:
        print(f"dist-lowbit run: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the ranks were started, or while the last output waited for its reader
        return 130
    except SystemExit as end:  # argparse, after --help
        return end.code if isinstance(end.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
