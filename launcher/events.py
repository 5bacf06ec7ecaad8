"""What reaches the launcher from outside, as file descriptors to poll: signals, and the end of a held stdin."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class Leash:
    """The launcher's stdin where another launcher holds the other end: its end asks for ours, also behind ssh."""

    fd = 0

    def __init__(self) -> None:
        self.over = False

    def gone(self) -> bool:
        """Read what is there; return whether the other end has let go."""
        try:
            self.over = not os.read(self.fd, 4096)
        except BlockingIOError:
            return False
        except OSError:  # a terminal that was hung up
            self.over = True
        return self.over


class Signals:
    """While entered, the signals that the launcher handles are bytes to read from `fd` and interrupt nothing.

    A signal that was ignored stays ignored (nohup, a job in the background). Outside the main thread nothing is
    taken over: Python allows it only there.
    """

    def __init__(self) -> None:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, object] = {}
        self._wakeup = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in (*FORWARDED, signal.SIGTSTP):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, _noticed)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._write)

    def read(self) -> list[int]:
        """Return the numbers of the signals that have come, in order."""
        try:
            return list(os.read(self.fd, 64))
        except BlockingIOError:
            return []


def _noticed(number: int, frame: FrameType | None) -> None:
    """Do nothing: that the signal came is a byte in the wakeup pipe."""
