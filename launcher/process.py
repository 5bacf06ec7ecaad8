"""One started process: its pipes, its end, its process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import LaunchError
from .job import Command
from .output import Lines, Sink, Tail
from .topology import format_cpulist

TRAMPOLINE = str(Path(__file__).resolve().with_name("trampoline.py"))
GUARD = str(Path(__file__).resolve().with_name("guard.py"))
TAIL_LINES = 20  # of stderr, repeated when a rank fails: a traceback through a few frames
ERROR = b"error: "  # how a rank of ours begins the one line that says why it ends
_CHUNK = 1 << 16  # a pipe's capacity (pipe(7))
_STDIN = {"own": None, "none": subprocess.DEVNULL, "held": subprocess.PIPE}


@dataclass(frozen=True)
class End:
    """How a process ended: `code` of its exit or, where `killed`, of the signal."""

    killed: bool
    code: int

    @property
    def ok(self) -> bool:
        return not self.killed and self.code == 0

    @property
    def exit_code(self) -> int:
        """The code that a shell gives it: 128 + signal."""
        return 128 + self.code if self.killed else self.code

    def describe(self) -> str:
        if not self.killed:
            return f"ended with exit code {self.code}"
        return f"was killed by signal {self.code} ({signal_name(self.code)})"


def signal_name(number: int) -> str:
    """Return "SIGKILL" for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


class Stream:
    """One output pipe of a process, on its way to a Sink, a log file and a Tail."""

    def __init__(
        self, pipe: IO[bytes], sink: Sink, prefix: bytes | None, log: IO[bytes] | None, tail: Tail, hold: bool
    ) -> None:
        os.set_blocking(pipe.fileno(), False)
        self.pipe = pipe
        self._sink, self._log, self._tail = sink, log, tail
        self._lines = Lines(prefix, ERROR if hold else None) if prefix is not None else None
        self.held_since: float | None = None

    def last_words(self) -> list[bytes]:
        """Return the lines that are held, and forget them."""
        if self._lines is None:
            return []
        held, self._lines.held = self._lines.held, []
        return held

    def release(self) -> None:
        """Pass on the lines that are held: they were no last words."""
        self.held_since = None
        if self._lines is not None:
            self._sink.write(self._lines.release())

    def pump(self) -> int | None:
        """Pass on one chunk; return its size, 0 at the end of the pipe (then closed), None if nothing is there."""
        try:
            chunk = os.read(self.pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return None
        if not chunk:
            self.close()
            return 0
        self._sink.write(self._lines.feed(chunk) if self._lines else chunk)
        self._tail.feed(chunk)
        if self._lines and self._lines.held:
            self.held_since = self.held_since or time.monotonic()
        if self._log:
            self._keep(self._log, chunk)
        return len(chunk)

    def _keep(self, log: IO[bytes], chunk: bytes) -> None:
        try:
            log.write(chunk)
        except OSError as error:  # a full disk ends the log, not the job
            self._sink.write(f"dist-lowbit run: {log.name} is cut short: {error.strerror}\n".encode())
            log.close()
            self._log = None

    def drain(self) -> None:
        """Pass on what is there and close, though a process that left the group may still hold the other end."""
        for _ in range(16):  # 1 MiB: fs.pipe-max-size
            if self.pipe.closed or not self.pump():
                break
        self.close()

    def close(self) -> None:
        if self.pipe.closed:
            return
        if self._lines:
            self._sink.write(self._lines.close())
        if self._log:
            self._log.close()
        self.pipe.close()


class Process:
    """A Command that runs, in a session of its own, so that one signal reaches all that it starts.

    A session of its own may still read the launcher's terminal: job control stops only processes whose own
    terminal it is. `pidfd` becomes readable when the process ends.
    """

    def __init__(self, command: Command, environ: Mapping[str, str], out: Sink, err: Sink) -> None:
        self.command = command
        self.end: End | None = None
        self.spoke = False  # its last line was told as such
        self.tail = Tail(TAIL_LINES)
        own_stdout = command.prefix is None and command.log is None
        own_stderr = own_stdout and os.isatty(err.fd)  # so that a progress bar sees the terminal
        try:
            self._popen = subprocess.Popen(
                self._argv(),
                env={**environ, **command.env},
                stdin=_STDIN[command.stdin],
                stdout=None if own_stdout else subprocess.PIPE,
                stderr=None if own_stderr else subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start {self.title}: {error.strerror}") from None
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.streams = [
            self._stream(pipe, sink, suffix)
            for pipe, sink, suffix in ((self._popen.stdout, out, "out"), (self._popen.stderr, err, "err"))
            if pipe is not None
        ]

    @property
    def title(self) -> str:
        return self.command.title or self.command.name

    def _argv(self) -> list[str]:
        command = self.command
        options = ["--parent", str(os.getpid()), "--death-signal", str(int(command.death_signal))]
        options += ["--cpus", format_cpulist(command.cpus)] if command.cpus else []
        how = "--prefer" if command.prefer else "--nodes"
        options += [how, format_cpulist(command.nodes)] if command.nodes else []
        return [sys.executable, "-I", "-S", TRAMPOLINE, *options, "--", *command.argv]

    def _stream(self, pipe: IO[bytes], sink: Sink, suffix: str) -> Stream:
        prefix = None if self.command.prefix is None else self.command.prefix.encode()
        own = self.command.rank is not None and suffix == "err"
        if own and prefix is None:
            prefix = b""  # no terminal is behind it, so whole lines do
        log = open(f"{self.command.log}.{suffix}", "wb", buffering=0) if self.command.log else None  # noqa: SIM115
        return Stream(pipe, sink, prefix, log, self.tail if suffix == "err" else Tail(0), own)

    def look(self) -> End | None:
        """Return how the process ended, None while it lives. Leaves the zombie: its pid names the group."""
        if self.end is None:
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if info is not None:
                self.end = End(info.si_code != os.CLD_EXITED, info.si_status)
        return self.end

    def is_stopped(self) -> bool:
        """Return whether the process lives and is stopped by a signal."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                return stat.read().rpartition(b") ")[2][:1] == b"T"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def signal(self, number: int) -> None:
        """Send `number` to the process and all that it started, also when it has ended itself."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return  # between fork and setsid, or already empty
        except PermissionError:
            return  # what is left runs as another user, by its own choice

    def ask(self, number: int) -> None:
        """Ask for an end by a signal, or where stdin is held by closing it: it reaches a process behind ssh, too."""
        if self._popen.stdin is None:
            self.signal(number)
        else:
            self._popen.stdin.close()

    def close(self) -> None:
        """Pass on the last output and reap the process, which must have ended."""
        for stream in self.streams:
            stream.drain()
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self._popen.wait()
        os.close(self.pidfd)


class Guard:
    """The process that ends the ranks' children when the launcher is killed (guard.py)."""

    def __init__(self) -> None:
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start the launcher's guard: {error.strerror}") from None

    def watch(self, process: Process) -> None:
        """End the whole group of `process` by its death signal if the launcher goes."""
        self._write(process.pid, process.command.death_signal)

    def close(self, over: Sequence[Process]) -> None:
        """Let go of the groups of `over` and end; must come before they are reaped, while their numbers are theirs."""
        for process in over:
            self._write(process.pid, 0)
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait()

    def _write(self, group: int, number: int) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"{group} {int(number)}\n".encode())
        except BrokenPipeError:  # somebody killed the guard; the ranks still have PR_SET_PDEATHSIG
            return
