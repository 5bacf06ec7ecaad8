"""Prepare this process for its rank, then become the rank's program. Run by path, with nothing imported from here.

    python -I -S trampoline.py [--parent PID] [--death-signal N] [--cpus A;B] [--nodes A;B] -- PROGRAM ARGS...

Binding happens before the program starts so that every thread and page of it is in place from the first. It is a
program of its own, not code between fork and exec, so it cannot meet a lock that another thread held, and other
launchers (mpirun, torchrun, deepspeed) can run it in front of a rank. Sets for several local ranks are separated
by ";" and picked by the local rank that the other launcher set.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MPOL_BIND = 2  # linux/mempolicy.h
# Number of the system call set_mempolicy, which glibc does not wrap (asm/unistd.h).
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "ppc64le": 261, "s390x": 270}
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


def own(text: str) -> list[int]:
    """Return this local rank's set of "A;B;C", or the only set."""
    sets = text.split(";")
    if len(sets) == 1:
        return numbers(sets[0])
    name = next((n for n in LOCAL_RANKS if n in os.environ), None)
    if name is None:
        fail(2, f"cannot bind: none of {', '.join(LOCAL_RANKS)} tells which local rank this is")
    local_rank = int(os.environ[str(name)])
    if local_rank >= len(sets):
        fail(2, f"cannot bind: local rank {local_rank} has none of the {len(sets)} CPU sets")
    return numbers(sets[local_rank])


def die_with_parent(parent: int, signum: int) -> None:
    """Have the kernel send `signum` to this process, across exec, when its launcher is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0) != 0:
        fail(2, f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it went before the kernel was asked
        sys.exit(128 + signum)


def bind_memory(nodes: list[int]) -> None:
    """Allocate on `nodes` only: a page cache full of checkpoint is then dropped, instead of spilling to a far node."""
    number = SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        why = f"the system call's number on {os.uname().machine} is not known"
    else:
        bits = 8 * ctypes.sizeof(ctypes.c_ulong)
        mask = (ctypes.c_ulong * (max(nodes) // bits + 1))()
        for node in nodes:
            mask[node // bits] |= 1 << (node % bits)
        libc = ctypes.CDLL(None, use_errno=True)
        # The kernel reads one bit less than it is told (linux/mm/mempolicy.c, get_nodes).
        size = ctypes.c_ulong(len(mask) * bits + 1)
        if libc.syscall(ctypes.c_long(number), ctypes.c_int(MPOL_BIND), mask, size) == 0:
            return
        why = os.strerror(ctypes.get_errno())
    # Containers often forbid it (seccomp); the cores still make first touch land on the right node.
    print(f"dist-lowbit run: memory is not bound to NUMA node {nodes}: {why}", file=sys.stderr)


def main(argv: list[str]) -> None:
    split = argv.index("--")
    options = dict(zip(argv[:split:2], argv[1:split:2], strict=True))
    program = argv[split + 1 :]
    if "--parent" in options:
        die_with_parent(int(options["--parent"]), int(options["--death-signal"]))
    if cpus := own(options.get("--cpus", "")):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            fail(2, f"cannot bind to CPUs {cpus}: {error.strerror}")
    if nodes := own(options.get("--nodes", "")):
        bind_memory(nodes)
    try:
        os.execvp(program[0], program)
    except OSError as error:  # the codes of a shell: 127 not found, 126 found but not to be run
        fail(127 if isinstance(error, FileNotFoundError) else 126, f"cannot run {program[0]}: {error.strerror}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C in the first milliseconds needs no traceback
        sys.exit(130)
