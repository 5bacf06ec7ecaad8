"""The launcher on each host of a list: the same command there, by ssh or, where the host is this one, without."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .hosts import Host, own_names
from .job import Command
from .options import command, without

# What a host is told of this one's environment beyond -x and --env. Tokens are not among it: they would stand in the
# list of processes.
_FORWARDED = re.compile(
    r"PYTHONPATH|PYTHONUNBUFFERED|LD_LIBRARY_PATH|DS_ACCELERATOR|HF_HOME|HF_HUB_OFFLINE"
    r"|(OMP|KMP|CCL|FI|I_MPI|UCX|NCCL|ZE|SYCL|DIST_LOWBIT)_[A-Z0-9_]+"
)
_REPLACED = ("-n", "--hosts", "--hostfile", "--ssh", "--master-addr", "--master-port", "--launch-id", "-x", "--dry-run")

START = str(Path(__file__).absolute().with_name("start.py"))


def host_commands(
    own: Sequence[str],
    rest: Sequence[str],
    hosts: Sequence[Host],
    *,
    ssh: str,
    master: tuple[str, int],
    launch_id: str,
    environ: Mapping[str, str],
    forward: Mapping[str, str],
    prefix: bool,
) -> list[Command]:
    """Return the launcher's command for each host: the user's own with this host's part of the job in front."""
    here = own_names()
    kept = without(own, _REPLACED)
    commands = []
    for node, host in enumerate(hosts):
        words = ["-n", ",".join(str(h.ranks) for h in hosts), "--nnodes", str(len(hosts)), "--node-rank", str(node)]
        words += ["--master-addr", master[0], "--master-port", str(master[1])]
        words += ["--launch-id", launch_id, "--leash"]
        for name, value in forward.items():
            words += ["--env", f"{name}={value}"]
        words += kept if "-m" in kept else [*kept, "--"]
        argv = [sys.executable, "-P", START, *words, *rest]  # -P: neither its folder nor this one is on sys.path
        if host.name not in here:
            argv = [*command("--ssh", ssh), host.name, _remote_line(argv, environ)]
        commands.append(
            Command(
                name=host.name,
                title=f"host {host.name}",
                argv=tuple(argv),
                env={},
                prefix=None if node == 0 and not prefix else "",
                stdin="held",
                death_signal=signal.SIGTERM,
            )
        )
    return commands


def plan_words(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a launcher on this host that prints its plan; `argv` is its command, without ssh."""
    return ["--dry-run", *argv[argv.index(START) + 1 :]]


def _remote_line(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the line for the other host's shell: this folder, this environment as far as it matters, the command."""
    env = [f"{name}={value}" for name, value in sorted(environ.items()) if _FORWARDED.fullmatch(name)]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*env, *argv])}"
