"""The command line: `python -m launcher -n 2 script.py`, `dist-lowbit run -n 2 script.py`."""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from .backend import BACKEND, prepare_command
from .cause import Ends
from .errors import LaunchError
from .hosts import Host, master_of, own_names
from .job import Command, Job, Program, RankSpec, inherited, make_job, parse_env, parse_forwarded
from .options import make_parser, number, seconds, split
from .plan import Cast, Machine, make_cast, place_of, read_host_list, read_this_machine
from .port import Port
from .remote import host_commands, plan_words
from .runners import RUNNERS, Runner
from .runners.slurm import PORTS, allocation
from .watch import Watch

HOST_GRACE = 3.0  # seconds that the launcher of another host has beyond its own grace, for the way back


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


def describe(jobs: Sequence[Job], runner: Runner, machine: Machine) -> str:
    """Return what --dry-run prints: the machine, each rank's place and environment, the command of each process."""
    first = jobs[0]
    launch_id = f"launch id {first.launch_id}" if len(jobs) == 1 else f"{len(jobs)} instances"
    if first.hosts:
        where = f" on {len(first.hosts)} host{'' if len(first.hosts) == 1 else 's'}, each taken to be like this one"
    else:
        where = f" ({len(first.ranks)} on host {first.node} of {len(first.counts)})" if len(first.counts) > 1 else ""
    ranks = f"{first.size} rank{'' if first.size == 1 else 's'}{where}"
    lines = [f"# style {runner.name}, {ranks}, bind {first.bind}, {launch_id}"]
    lines.append(f"# machine: {machine.topology.describe()}")
    for job in jobs:
        instance = f" of instance {job.name}" if job.name else ""
        lines += [f"# rank {spec.rank}{instance}: {spec.describe()}" for spec in _on_all_hosts(job)]
    lines += [command.shell() for job in jobs for command in runner.command(job)]
    return "\n".join(lines)


def _on_all_hosts(job: Job) -> list[RankSpec]:
    """Return the ranks of a job; where it names its hosts, those of all of them."""
    if not job.hosts:
        return list(job.ranks)
    places = [(host, spec) for host, count in zip(job.hosts, job.counts, strict=True) for spec in job.ranks[:count]]
    return [replace(spec, rank=rank, host=host) for rank, (host, spec) in enumerate(places)]


def run(argv: Sequence[str]) -> int:
    """Do what `argv` asks and return the exit code; LaunchError if it cannot be done."""
    own, rest = split(argv)
    options = make_parser().parse_args(own)
    wanted = None if options.master_port is None else number("--master-port", options.master_port, 1, 65535)
    seconds(options.grace)
    forward = parse_forwarded(options.forward, os.environ)
    hosts = read_host_list(options)
    if hosts and options.style == "slurm":
        raise LaunchError("--style slurm takes its hosts from the allocation; leave --hosts and --hostfile out")
    if hosts and options.style != "mpirun":
        find_program(options, rest)
        return _run_hosts(options, own, rest, hosts, wanted, forward)
    return _run_here(options, rest, hosts, wanted, {**forward, **parse_env(options.env)})


def _run_hosts(
    options: argparse.Namespace,
    own: Sequence[str],
    rest: Sequence[str],
    hosts: Sequence[Host],
    wanted: int | None,
    forward: Mapping[str, str],
) -> int:
    """Start a launcher on each host and watch these."""
    here = own_names()
    with _port(wanted, hosts[0].name in here) as port:
        commands = host_commands(
            own,
            rest,
            hosts,
            ssh=options.ssh,
            master=(options.master_addr or master_of(tuple(hosts), here), port),
            launch_id=secrets.token_hex(8),
            environ=os.environ,
            forward=forward,
            prefix=not options.no_prefix,
        )
        if options.dry_run:
            for host, command in zip(hosts, commands, strict=True):
                print(f"# {command.title}\n{command.shell()}")
                if host.name not in here:
                    print("# cores, memory and variables are chosen there: --dry-run with -n on that host shows them")
                elif code := run(plan_words(command.argv)):
                    return code
            return 0
        # A host ends its own ranks within the grace, so it gets a little more.
        grace = seconds(options.grace) + HOST_GRACE
        return Watch(commands, inherited(os.environ), host=socket.gethostname(), grace=grace).run()


def _run_here(
    options: argparse.Namespace,
    rest: Sequence[str],
    hosts: Sequence[Host],
    wanted: int | None,
    user_env: Mapping[str, str],
) -> int:
    """Start this host's ranks, or the program that starts them on all hosts."""
    machine = read_this_machine(options, os.environ)
    cast = make_cast(options, machine, hosts, os.environ)
    program = find_program(options, rest)
    runner = RUNNERS[options.style]()
    if (why_not := runner.why_not()) is not None:
        raise LaunchError(f"--style {options.style} cannot be used: {why_not}")
    with _jobs(options, cast, program, wanted, user_env) as jobs:
        if options.dry_run:
            print(describe(jobs, runner, machine))
            return 0
        if options.log_dir is not None:
            _make_folder(options.log_dir)
        _prepare({**os.environ, **user_env})
        if options.style == "local":
            return _watch([command for job in jobs for command in runner.command(job)], jobs, options)
        with closing(Ends()) as ends:
            return _watch(runner.command(replace(jobs[0], ends=ends.where)), jobs, options, ends)


def _watch(
    commands: Sequence[Command], jobs: Sequence[Job], options: argparse.Namespace, ends: Ends | None = None
) -> int:
    grace = seconds(options.grace)
    environ = inherited(os.environ)
    return Watch(commands, environ, host=jobs[0].host, grace=grace, leash=options.leash, ends=ends).run()


@contextmanager
def _jobs(
    options: argparse.Namespace, cast: Cast, program: Program, wanted: int | None, user_env: Mapping[str, str]
) -> Iterator[list[Job]]:
    """Yield the job of this host, or one for each instance, with their ports held while it lasts."""
    groups = 1 if options.instances is None else int(options.instances)
    if groups > 1 and wanted is not None:
        raise LaunchError("--instances and --master-port exclude each other: each instance has a port of its own")
    if len(cast.counts) > 1 and wanted is None and options.node_rank is not None:
        raise LaunchError("--nnodes needs --master-addr and --master-port: an address of host 0, the same on all hosts")
    given = allocation(os.environ) if options.style == "slurm" else None
    if given is not None and wanted is None:
        wanted = given.port()
    with ExitStack() as stack:
        jobs = []
        for index, part in enumerate(cast.instances(groups) if groups > 1 else [cast]):
            # Another launcher that holds the port for us has told its number, and so has whoever starts host 0.
            held = options.launch_id is None and part.node == 0 and given is None
            port = stack.enter_context(_port(wanted, held))
            launch_id = options.launch_id or secrets.token_hex(8)
            place = place_of(part, socket.gethostname(), port, launch_id, user_env, not options.leash)
            jobs.append(
                make_job(
                    program,
                    part.slots,
                    place,
                    os.environ,
                    bind=part.bind,
                    prefix=not options.no_prefix,
                    log_dir=options.log_dir,
                    masks=part.masks,
                    name=str(index) if groups > 1 else "",
                    style=options.style,
                )
            )
        yield jobs


@contextmanager
def _port(wanted: int | None, held: bool) -> Iterator[int]:
    """Yield the rendezvous' port, held for rank 0 if that is on this host; else one that is likely free over there."""
    if not held:
        yield random.choice(PORTS) if wanted is None else wanted
        return
    with closing(Port(wanted)) as port:
        yield port.number


def _prepare(environ: Mapping[str, str]) -> None:
    """Run what the backend needs once, before several ranks would do it at the same time."""
    command = prepare_command(environ)
    if command is None:
        return
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1].removeprefix("error: ")
        what = f"what {BACKEND}={environ[BACKEND]} needs cannot be prepared by `python {' '.join(command[1:])}`"
        raise LaunchError(f"{what}, so nothing was started: {reason}")


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise LaunchError(f"--log-dir {path} cannot be made: {error.strerror}") from None
    if not writable:
        raise LaunchError(f"--log-dir {path} cannot be written to")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher and return its exit code: the failed rank's, 128 + signal, or 2 for a bad request.

    Where nobody reads what it prints it ends quietly, with the code of a tool that SIGPIPE has ended.
    """
    try:
        code = _answer(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a reader that has left can still be answered for
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # for the interpreter's own last flush
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _answer(argv: Sequence[str]) -> int:
    try:
        return run(argv)
    except LaunchError as error:
        print(f"dist-lowbit run: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the ranks were started, or while the last output waited for its reader
        return 130
    except SystemExit as end:  # argparse, after --help
        return end.code if isinstance(end.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
