"""Prepare this process for its rank, then become the rank's program. Run by path, with nothing imported from here.

    python -I -S trampoline.py [--parent PID] [--death-signal N] [--cpus A;B] [--nodes A;B | --prefer A;B]
        [--mask NAME=A;B]... [--lines all|others [--keep FOLDER] [--ends HOST:PATH:INODE]] -- PROGRAM ARGS...

Binding happens before the program starts so that every thread and page of it is in place from the first. It is a
program of its own, not code between fork and exec, so it cannot meet a lock that another thread held, and other
launchers (mpirun, torchrun, deepspeed) can run it in front of a rank. Sets for several local ranks are separated
by ";" and picked by the local rank that the other launcher set. --lines puts relay.py between the program and the
other launcher; with "others" the output of rank 0 stays as it is. No option may be the beginning of one of
torchrun's or DeepSpeed's, whose parsers would take it for theirs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import runpy
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MPOL_PREFERRED, MPOL_BIND, MPOL_PREFERRED_MANY = 1, 2, 5  # linux/mempolicy.h; the last since Linux 5.15
# Number of the system call set_mempolicy, which glibc does not wrap (asm/unistd.h).
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "ppc64le": 261, "s390x": 270}
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID", "SLURM_PROCID")
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID")


def fail(code: int, sentence: str) -> None:
    print(f"dist-lowbit run: {sentence}", file=sys.stderr)
    sys.exit(code)


def numbers(text: str) -> list[int]:
    """Return the numbers of "0,1,5-7"."""
    found: list[int] = []
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def pick(text: str) -> str:
    """Return this local rank's part of "A;B;C", or the only part."""
    parts = text.split(";")
    if len(parts) == 1:
        return parts[0]
    name = next((n for n in LOCAL_RANKS if n in os.environ), None)
    if name is None:
        fail(2, f"cannot bind: none of {', '.join(LOCAL_RANKS)} tells which local rank this is")
    local_rank = int(os.environ[str(name)])
    if local_rank >= len(parts):
        fail(2, f"cannot bind: local rank {local_rank} has none of the {len(parts)} CPU sets")
    return parts[local_rank]


def die_with_parent(parent: int, signum: int) -> None:
    """Have the kernel send `signum` to this process, across exec, when its launcher is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0) != 0:
        fail(2, f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it went before the kernel was asked
        sys.exit(128 + signum)


def set_mempolicy(mode: int, nodes: list[int]) -> int:
    """Make the system call and return 0, or the errno."""
    number = SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        return errno.ENOSYS
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(nodes) // bits + 1))()
    for node in nodes:
        mask[node // bits] |= 1 << (node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told (linux/mm/mempolicy.c, get_nodes).
    size = ctypes.c_ulong(len(mask) * bits + 1)
    done = libc.syscall(ctypes.c_long(number), ctypes.c_int(mode), mask, size)
    return 0 if done == 0 else ctypes.get_errno()


def bind_memory(nodes: list[int], prefer: bool) -> None:
    """Allocate on `nodes` only: a page cache full of checkpoint is then dropped, instead of spilling to a far node.

    prefer: on them first, and elsewhere when they are full.
    """
    error = set_mempolicy(MPOL_PREFERRED_MANY if prefer else MPOL_BIND, nodes)
    if error == errno.EINVAL and prefer:  # an older kernel prefers one node
        error = set_mempolicy(MPOL_PREFERRED, nodes[:1])
    if error:
        # Containers often forbid it (seccomp); the cores still make first touch land on the right node.
        why = os.strerror(error)
        print(f"dist-lowbit run: memory is not bound to NUMA node {nodes}: {why}", file=sys.stderr)


def make_lines(whose: str, log: str | None, ends: str | None) -> None:
    """Become two processes: one goes on from here, the other passes on its output, tells its end, and ends with it."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), None)
    if rank is None:
        fail(2, f"none of {', '.join(RANKS)} tells which rank this is")
    prefix = f"[{rank}] ".encode() if whose == "all" or rank != "0" else None
    if prefix or log or ends:
        runpy.run_path(str(Path(__file__).with_name("relay.py")))["relay"](rank, prefix, log, ends)


def main(argv: list[str]) -> None:
    split = argv.index("--")
    pairs = list(zip(argv[:split:2], argv[1:split:2], strict=True))
    options = dict(pairs)
    program = argv[split + 1 :]
    if "--parent" in options:
        die_with_parent(int(options["--parent"]), int(options["--death-signal"]))
    if cpus := numbers(pick(options.get("--cpus", ""))):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            fail(2, f"cannot bind to CPUs {cpus}: {error.strerror}")
    for name in ("--nodes", "--prefer"):
        if nodes := numbers(pick(options.get(name, ""))):
            bind_memory(nodes, name == "--prefer")
    for mask in (value for name, value in pairs if name == "--mask"):
        variable, _, values = mask.partition("=")
        os.environ[variable] = pick(values)
    if "--lines" in options:
        make_lines(options["--lines"], options.get("--keep"), options.get("--ends"))
    try:
        os.execvp(program[0], program)
    except OSError as error:  # the codes of a shell: 127 not found, 126 found but not to be run
        fail(127 if isinstance(error, FileNotFoundError) else 126, f"cannot run {program[0]}: {error.strerror}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C in the first milliseconds needs no traceback
        sys.exit(130)
