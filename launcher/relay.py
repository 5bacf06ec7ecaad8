"""Make whole lines of what a rank prints under a launcher that passes output on in pieces. Loaded by path."""

from __future__ import annotations

import ctypes
import os
import runpy
import selectors
import signal
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHUNK = 1 << 16
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def relay(prefix: bytes) -> None:
    """Fork. The child returns, its output piped; the parent passes the lines on behind `prefix` and ends as it ends."""
    pipes = [os.pipe(), os.pipe()]
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it went before the kernel was asked
            os._exit(128 + signal.SIGKILL)
        for target, (reading, writing) in enumerate(pipes, 1):
            os.dup2(writing, target)
            os.close(reading)
            os.close(writing)
        return

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    for _, writing in pipes:
        os.close(writing)
    _pass_on({reading: target for target, (reading, _) in enumerate(pipes, 1)}, prefix, os.pidfd_open(child))
    _end_like(child)


def _pass_on(targets: dict[int, int], prefix: bytes, ended: int) -> None:
    """Write the lines of each pipe to its target until all are closed, or the child has ended and they are empty."""
    lines_of = runpy.run_path(str(Path(__file__).with_name("output.py")))["Lines"]
    lines = {reading: lines_of(prefix) for reading in targets}
    with selectors.PollSelector() as poll:
        for reading in targets:
            poll.register(reading, selectors.EVENT_READ)
        poll.register(ended, selectors.EVENT_READ)
        over = False
        while len(poll.get_map()) > 1:
            ready = [key.fd for key, _ in poll.select(0 if over else None)]
            for reading in (fd for fd in ready if fd != ended):
                chunk = os.read(reading, _CHUNK)
                _write(targets[reading], lines[reading].feed(chunk) if chunk else lines[reading].close())
                if not chunk:
                    poll.unregister(reading)
            if over and ready == [ended]:  # what is still open belongs to a process that the child has left behind
                break
            over = ended in ready
    for reading, rest in lines.items():
        _write(targets[reading], rest.close())


def _write(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except BrokenPipeError:  # nobody reads on; the child finds out by its launcher
            return


def _end_like(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
