"""What the styles that call another launcher have in common."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from ..job import Command, Job
from ..topology import format_cpulist

TRAMPOLINE = str(Path(__file__).resolve().parent.parent / "trampoline.py")


def find_program(name: str) -> str | None:
    """Return the path of `name`: beside this Python first (an environment that is not activated), then on PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def bound_argv(job: Job, *, cpus: bool = True) -> tuple[str, ...]:
    """Return a rank's argv with our own trampoline in front.

    `cpus=False` leaves the cores to the other launcher and binds memory only. The other launcher passes output on in
    whatever pieces it comes, or mixes prefixes into lines, and tells no rank's end by rank, pid and host, so the
    trampoline makes whole lines behind the rank, keeps the logs and tells the end.
    """
    options: list[str] = []
    if cpus and any(spec.cpus for spec in job.ranks):
        options += ["--cpus", ";".join(format_cpulist(spec.cpus) for spec in job.ranks)]
    if any(spec.nodes for spec in job.ranks):
        how = "--prefer" if any(spec.prefer for spec in job.ranks) else "--nodes"
        options += [how, ";".join(format_cpulist(spec.nodes) for spec in job.ranks)]
    for name in dict.fromkeys(name for spec in job.ranks for name in spec.mask):
        options += ["--mask", f"{name}=" + ";".join(spec.mask.get(name, "") for spec in job.ranks)]
    options += ["--lines", "all" if job.prefix else "others"]
    options += ["--keep", os.path.abspath(job.log_dir)] if job.log_dir else []
    options += ["--ends", job.ends] if job.ends else []
    return (job.program.python, "-I", "-S", TRAMPOLINE, *options, "--", *job.program.argv)


def foreign_command(name: str, job: Job, argv: tuple[str, ...], env: Mapping[str, str]) -> Command:
    """Return the Command of another launcher, which cleans up after SIGTERM but not after SIGKILL."""
    stdin = "own" if job.stdin else "none"
    return Command(name=name, argv=argv, env=env, stdin=stdin, death_signal=signal.SIGTERM)
