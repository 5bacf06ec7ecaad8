"""Ranks that are killed, stopped or raise at random moments: each job ends in time, by name, and leaves nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.conftest import Launch, gone, until

HOST = socket.gethostname()
RANKS = 3
WITHIN = 5.0  # seconds from a death to the end of the job
SILENCE = 2.0  # the timeout of the collectives below

RAISES = """
def raises(*_):
    raise ValueError("injected")
signal.signal(signal.SIGUSR1, raises)
"""
# No collective, so that a job costs a few hundredths of a second: what the launcher does alone.
SLEEPS = RAISES + "open(f'up{rank}', 'w').close()\ntime.sleep(60)\n"
# Small and large all-reduces without end: what the launcher and the group do together.
REDUCES = (
    RAISES
    + f"""
import torch
from dist_lowbit.comm import init_group
with init_group(backend=sys.argv[1], timeout=40) as group:
    small, large = torch.ones(16), torch.ones(1 << 18)
    group.all_reduce(small, timeout=40)
    open(f"up{{rank}}", "w").close()
    while True:
        group.all_reduce(small, timeout={SILENCE})
        group.all_reduce(large, timeout={SILENCE})
        large.fill_(1.0)
        small.fill_(1.0)
"""
)


HOLD_MEMORY = "os.ftruncate(f, 4096); m = mmap.mmap(f, 4096); print('up', flush=True); sys.stdin.read()"


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the pid of each rank that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        numbers = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        found |= dict.fromkeys(numbers, int(child))
    return found


def shared(pid: int) -> set[int]:
    """Return the inodes of /dev/shm that a process maps: most have no name, so that only a mapping shows them."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ended meanwhile
        return set()
    return {int(line.split()[4]) for line in maps.splitlines() if " /dev/shm/" in line}


def left_of(inodes: set[int], pids: set[int]) -> list[str]:
    """Return what of a job's shared memory has outlived it: files with one of its inodes or pids, processes' maps."""
    found = []
    for path in Path("/dev/shm").iterdir():
        try:
            own = path.lstat().st_ino in inodes
        except FileNotFoundError:  # another job's
            continue
        if own or pids & {int(number) for number in re.findall(r"\d+", path.name)}:
            found.append(path.name)
    everyone = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return found + [f"pid {pid}" for pid in everyone if inodes and inodes & shared(pid)]


def test_shared_memory_that_is_left_would_be_seen() -> None:
    held = f"import mmap, os, sys; f = os.open('/dev/shm', os.O_RDWR | os.O_TMPFILE)\n{HOLD_MEMORY}"
    process = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    inodes = shared(process.pid)
    assert len(inodes) == 1
    assert left_of(inodes, set()) == [f"pid {process.pid}"]
    process.communicate(b"")
    assert left_of(inodes, set()) == []


class Case:
    """One job and what is done to it."""

    def __init__(self, launch: Launch, draw: random.Random, fates: tuple[str, ...], *words: str) -> None:
        for path in launch.folder.glob("up*"):
            path.unlink()
        self.launch, self.fate, self.victim = launch, draw.choice(fates), draw.randrange(RANKS)
        self.process: subprocess.Popen[str] = launch.start("-n", str(RANKS), "--bind", "none", "--grace", "1", *words)
        self.begun = time.monotonic()
        self.pids: dict[int, int] = until(lambda: len(found := ranks_of(self.process.pid)) == RANKS and found, 30)
        # On a busy machine an end takes longer, too, but never as long as this job's beginning took.
        self.busy = time.monotonic() - self.begun

    def wait_until_up(self) -> None:
        """Wait until all ranks are in their loops; a stopped rank is noticed by those that wait for it there."""
        until(lambda: len(list(self.launch.folder.glob("up*"))) == RANKS or self.process.poll() is not None, 60)
        self.busy = time.monotonic() - self.begun

    def strike(self) -> None:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "raise": signal.SIGUSR1}[self.fate]
        inodes = set[int]().union(*map(shared, self.pids.values()))
        begun = time.monotonic()
        os.kill(self.pids[self.victim], number)
        _, err = self.process.communicate(timeout=60)
        took = time.monotonic() - begun
        what = f"{self.fate} of rank {self.victim}: {err}"
        assert took < WITHIN + (SILENCE if self.fate == "stop" else 0) + self.busy, what
        assert self.process.returncode not in (0, None), what
        assert f"rank {self.victim} (pid {self.pids[self.victim]} on " in err, what
        assert HOST in err, what
        assert "Fatal" not in err, what
        until(lambda: all(map(gone, self.pids.values())), 2)
        assert left_of(inodes, {self.process.pid, *self.pids.values()}) == [], what


def seeds(count: int) -> Iterator[random.Random]:
    return (random.Random(seed) for seed in range(count))


@pytest.mark.parametrize("number", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_ranks_that_die_at_random_moments(launch: Launch, number: int) -> None:
    script = launch.script(SLEEPS)
    for draw in seeds(number):
        case = Case(launch, draw, ("kill", "raise"), script)
        time.sleep(draw.uniform(0, 0.1))  # before Python runs, while it starts, in the loop
        case.strike()


# Ten parts of twenty, so that a tenth of the slow tests is twenty.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(10))
def test_two_hundred_injections_into_collectives(launch: Launch, part: int) -> None:
    pytest.importorskip("torch")
    script = launch.script(REDUCES)
    for number in range(20):
        draw = random.Random(20 * part + number)
        case = Case(launch, draw, ("kill", "stop", "raise"), script, draw.choice(["auto", "gloo"]))
        # An exception in the middle of another package's import may be caught there, and then nothing has happened.
        if case.fate != "kill" or draw.random() < 0.7:
            case.wait_until_up()
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, 3.0))  # while it starts, imports, or meets the others
        case.strike()
