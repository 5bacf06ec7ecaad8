"""dist-lowbit doctor."""

from __future__ import annotations

import json
import os
import platform
import resource
from importlib import metadata
from typing import Annotated, Any

import typer

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "accelerate",
    "deepspeed",
    "mpi4py",
    "impi-rt",
    "oneccl-devel",
    "tcmlib",
    "intel-cmplr-lib-rt",
    "oneccl_bindings_for_pytorch",
)
_SMALL_SHM = 64 << 20  # what containers get when nobody asks for more
_FEW_FILES = 1024
# Instruction sets that no machine of ours has had: their arithmetic is tested in software.
_NEVER_RAN = {"amx": "compiled; arithmetic tested under emulation only"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what this machine offers: kernels, backends, cores, versions, and how to start ranks on it."""
    report = examine()
    if as_json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    for title, content in report.items():
        if isinstance(content, dict) and content:
            table = Table(title=title, title_justify="left", show_header=False)
            for key, value in content.items():
                table.add_row(escape(str(key)), "yes" if value is None else escape(str(value)))
            console.print(table)
        elif isinstance(content, (dict, list)):
            for line in content or ["none"]:
                console.print(f"{title}: {line}", markup=False)
        else:
            console.print(f"{title}: {content}", markup=False)


def examine() -> dict[str, Any]:
    """Return everything doctor prints, as JSON values."""
    from dist_lowbit import comm, ops
    from dist_lowbit.core.native import native_why_not
    from dist_lowbit.core.rank import discover
    from dist_lowbit.core.version import __version__
    from dist_lowbit.kernels import ccl
    from dist_lowbit.launcher.runners import RUNNERS
    from dist_lowbit.launcher.topology import read_machine

    machine = read_machine()
    here = discover(os.environ)
    nodes = {f"NUMA node {node}": f"{sum(core.node == node for core in machine.cores)} cores" for node in machine.nodes}
    ranks = max(1, len(machine.nodes)) if len(machine.nodes) > 1 else min(2, max(1, len(machine.usable)))
    return {
        "dist_lowbit": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "kernels": native_why_not() or "compiled",
        "instruction sets": {name: _isa(name, able, active) for name, able, active in ops.isas()},
        "threads": ops.plan_here().count,
        "machine": machine.describe(),
        "nodes": nodes,
        "backends (yes, or why not, for this process)": comm.why_not(here),
        "oneCCL shim": str(ccl.built() or ccl.why_not() or "built at first use, or by dist-lowbit build ccl"),
        "launcher styles (yes, or why not)": {name: runner().why_not() for name, runner in RUNNERS.items()},
        "recommended": f"dist-lowbit run -n {ranks} your_script.py",
        "warnings": warnings(*limits()),
    }


def _isa(name: str, able: bool, active: bool) -> str:
    state = "active" if active else "supported" if able else "not on this CPU"
    return f"{state} ({_NEVER_RAN[name]})" if name in _NEVER_RAN else state


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def limits() -> tuple[int, int, int]:
    """Return the bytes of /dev/shm, how many files may be open, and the bytes of the address space (-1: no limit)."""
    try:
        space = os.statvfs("/dev/shm")
        shm = space.f_frsize * space.f_blocks
    except OSError:
        shm = 0
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    return shm, files, memory


def warnings(shm: int, files: int, memory: int) -> list[str]:
    """Return which of a machine's limits will hurt; see limits."""
    found = []
    if shm == 0:
        found.append("/dev/shm cannot be used; the ranks of one machine will talk over gloo, which is slower")
    elif shm <= _SMALL_SHM:
        found.append(f"/dev/shm has {shm >> 20} MiB; start the container with --shm-size=1g or more")
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        found.append(f"only {files} files may be open at once (ulimit -n); large checkpoints may need more")
    if memory != resource.RLIM_INFINITY:
        found.append(f"the address space is limited to {memory >> 20} MiB (ulimit -v)")
    return found
