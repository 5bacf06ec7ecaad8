"""Between a rank and another launcher: make whole lines of its output, keep logs, tell its end. Loaded by path."""

from __future__ import annotations

import ctypes
import os
import runpy
import selectors
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHUNK = 1 << 16
_LAST_WORDS = 1000  # bytes of the last line of stderr, so that the line that tells an end is one write (PIPE_BUF)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FORWARDED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def relay(rank: str, prefix: bytes | None, log: str | None, ends: str | None) -> None:
    """Fork. The child returns, its output piped; the parent passes it on as lines behind `prefix` and ends as it ends.

    prefix None: as it comes and, without a log, not piped at all. log: the folder of rankR.out and rankR.err. ends:
    where the launcher is told of the child's end, as HOST:PATH:INODE.
    """
    pipes = [] if prefix is None and log is None else [os.pipe(), os.pipe()]
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

    ended = os.pidfd_open(child)
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            asked.append(number)
        try:
            signal.pidfd_send_signal(ended, number)
        except ProcessLookupError:
            return  # it has ended by itself

    for number in _FORWARDED:
        signal.signal(number, forward)
    for _, writing in pipes:
        os.close(writing)
    output = runpy.run_path(str(Path(__file__).with_name("output.py")))
    taps = [
        Tap(reading, target, prefix, _log(log, rank, target), output) for target, (reading, _) in enumerate(pipes, 1)
    ]
    _pass_on(taps, ended)
    _, status = os.waitpid(child, 0)
    if ends is not None:
        _tell(ends, rank, child, status, bool(asked), taps[1].last_words() if taps else "")
    _end_like(status)


def _log(folder: str | None, rank: str, target: int) -> int | None:
    """Return the open log of one output of a rank, None without one."""
    if folder is None:
        return None
    path = os.path.join(folder, f"rank{rank}.{'out' if target == 1 else 'err'}")
    try:
        os.makedirs(folder, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        _write(2, f"dist-lowbit run: {path} cannot be written: {error.strerror}\n".encode())
        return None


class Tap:
    """One output of the child on its way to `target` and to a log. `output`: the names of output.py."""

    def __init__(
        self, reading: int, target: int, prefix: bytes | None, log: int | None, output: dict[str, Any]
    ) -> None:
        self.reading, self._target, self._log = reading, target, log
        self._lines = None if prefix is None else output["Lines"](prefix)
        self._tail = output["Tail"](1 if target == 2 else 0)

    def pump(self) -> bool:
        """Pass on one chunk; return whether there was one, False at the end."""
        chunk = os.read(self.reading, _CHUNK)
        _write(self._target, chunk if self._lines is None else self._lines.feed(chunk))
        self._tail.feed(chunk)
        if self._log is not None:
            try:
                _write(self._log, chunk)
            except OSError as error:  # a full disk ends the log, not the rank
                _write(2, f"dist-lowbit run: a log is cut short: {error.strerror}\n".encode())
                self._log = None
        return bool(chunk)

    def close(self) -> None:
        if self._lines is not None:
            _write(self._target, self._lines.close())

    def last_words(self) -> str:
        return "".join(self._tail.lines())


def _pass_on(taps: list[Tap], ended: int) -> None:
    """Pass on the output until all of it is closed, or the child has ended and nothing more is there."""
    with selectors.PollSelector() as poll:
        for tap in taps:
            poll.register(tap.reading, selectors.EVENT_READ, tap)
        poll.register(ended, selectors.EVENT_READ)
        over = False
        while len(poll.get_map()) > 1:
            ready = [key for key, _ in poll.select(0 if over else None)]
            for key in ready:
                if key.fd != ended and not key.data.pump():
                    poll.unregister(key.fd)
            fds = [key.fd for key in ready]
            if over and fds == [ended]:  # what is still open belongs to a process that the child has left behind
                break
            over = ended in fds
    for tap in taps:
        tap.close()


def _write(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except BrokenPipeError:  # nobody reads on; the child finds out by its launcher
            return


def _tell(ends: str, rank: str, pid: int, status: int, asked: bool, last_words: str) -> None:
    """Tell the launcher how the rank ended or, where it is not on this host, whoever reads stderr of a failure."""
    code = os.waitstatus_to_exitcode(status)
    here = os.uname().nodename
    words = last_words.encode()[:_LAST_WORDS].decode(errors="ignore")
    line = f"{rank} {pid} {here} {int(code < 0)} {abs(code)} {int(asked)} {time.monotonic()} {words}\n"
    host, path, inode = ends.rsplit(":", 2)
    if host == here and _deliver(path, int(inode), line.encode()):
        return
    if code and not asked:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        _write(2, f"dist-lowbit run: rank {rank} (pid {pid} on host {here}) {how}\n".encode())


def _deliver(path: str, inode: int, line: bytes) -> bool:
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.fstat(pipe).st_ino == inode and os.write(pipe, line) == len(line)
    except OSError:  # the launcher is gone, or not of this host
        return False


def _end_like(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
