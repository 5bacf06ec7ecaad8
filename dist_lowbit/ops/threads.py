"""How many threads the kernels use, and on which cpus: one physical core each, never more than we may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_SYS = Path("/sys/devices")


@dataclass(frozen=True)
class ThreadPlan:
    """count: threads including the caller. cpus: one per thread to pin to; fewer than count: nothing is pinned."""

    count: int
    cpus: tuple[int, ...]


def parse_cpu_list(text: str) -> set[int]:
    """Return the cpus in the kernel's notation, such as 0-3,8."""
    cpus: set[int] = set()
    for piece in text.strip().split(","):
        if piece:
            first, _, last = piece.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def plan(environ: Mapping[str, str], allowed: set[int], cores: Mapping[int, int], fast: set[int]) -> ThreadPlan:
    """Return min(OMP_NUM_THREADS where set, physical cores in the affinity mask) threads, one cpu of each core.

    allowed: the affinity mask. cores: a core's id by cpu (cpus of one core share it). fast: the performance cores of a
    hybrid part; empty where all cores are alike. A list such as "4,2" in OMP_NUM_THREADS counts by its first number.
    """
    usable = (allowed & fast) or allowed
    first_cpu: dict[int, int] = {}
    for cpu in sorted(usable):
        first_cpu.setdefault(cores.get(cpu, cpu), cpu)
    cpus = tuple(sorted(first_cpu.values()))
    wanted = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    count = min(int(wanted), len(cpus)) if wanted.isdigit() and int(wanted) > 0 else len(cpus)
    return ThreadPlan(count, cpus[:count])


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def core_ids(cpus: set[int], sys: Path = _SYS) -> dict[int, int]:
    """Return for each cpu the lowest cpu of its physical core (itself where the kernel does not say)."""
    ids = {}
    for cpu in cpus:
        siblings = parse_cpu_list(_read(sys / f"system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        ids[cpu] = min(siblings, default=cpu)
    return ids


def plan_on(environ: Mapping[str, str], allowed: set[int], sys: Path = _SYS) -> ThreadPlan:
    """Return the plan for the affinity mask `allowed` on the machine that the folder `sys` (/sys/devices) describes."""
    return plan(environ, allowed, core_ids(allowed, sys), parse_cpu_list(_read(sys / "cpu_core/cpus")))


def plan_here(environ: Mapping[str, str] | None = None) -> ThreadPlan:
    """Return the plan for this process as it is bound now; environ: instead of the process's own."""
    return plan_on(os.environ if environ is None else environ, os.sched_getaffinity(0))


def limit_torch() -> None:
    """Give the cores to the kernels' pool: torch's own operations run on the calling thread alone.

    Both pools spin for a while after each of their loops, so two full pools on the same cores would slow each other.
    """
    torch.set_num_threads(1)
