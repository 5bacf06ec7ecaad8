"""What the ranks print: cut into lines, prefixed, remembered and written on without ever blocking the watch."""

from __future__ import annotations

import os
import re
from collections import deque

# A write of this size does not block once poll(2) calls a pipe writable (limits.h, PIPE_BUF on Linux).
PIPE_BUF = 4096
# A line longer than this is passed on in pieces, so that a rank that never ends its line costs bounded memory.
LONGEST_LINE = 1 << 16
# Output that waits for a slow reader; above it the ranks' pipes are not read, so that the ranks wait instead of us.
HIGH_WATER = 1 << 20

# A line ends with \n, \r\n or, as progress bars have it, a bare \r. A \r at the very end may be half of \r\n.
_END = re.compile(rb"\r?\n|\r(?!\n|\Z)")


class Lines:
    """Turns chunks of bytes into prefixed whole lines.

    hold: lines that begin with it and have nothing after them stay in `held`, as they may be last words that other
    ranks say, too; `release` gives them up.
    """

    def __init__(self, prefix: bytes, hold: bytes | None = None) -> None:
        self._prefix, self._hold = prefix, hold
        self._rest = b""
        self.held: list[bytes] = []

    def feed(self, chunk: bytes) -> bytes:
        """Return the lines that `chunk` completes, each behind the prefix; the rest waits."""
        data = self._rest + chunk
        out, end = [], 0
        for match in _END.finditer(data):
            out.append(self._line(data[end : match.end()]))
            end = match.end()
        self._rest = data[end:]
        if len(self._rest) > LONGEST_LINE:
            out.append(self._line(self._rest + b"\n"))
            self._rest = b""
        return b"".join(out)

    def _line(self, line: bytes) -> bytes:
        if self._hold is not None and line.startswith(self._hold):
            self.held.append(line)
            return b""
        return self.release() + self._prefix + line

    def release(self) -> bytes:
        """Return the lines that were held, behind the prefix."""
        held, self.held = self.held, []
        return b"".join(self._prefix + line for line in held)

    def close(self) -> bytes:
        """Return the line that was begun and never ended, with an end."""
        rest, self._rest = self._rest, b""
        return self._line(rest.rstrip(b"\r") + b"\n") if rest else b""


class Tail:
    """Remembers the last `count` lines."""

    def __init__(self, count: int) -> None:
        self._lines: deque[bytes] = deque(maxlen=count)
        self._cut = Lines(b"")

    def feed(self, chunk: bytes) -> None:
        self._lines.extend(self._cut.feed(chunk).splitlines())

    def lines(self) -> list[str]:
        """Return the lines as text, the unfinished one included."""
        self._lines.extend(self._cut.close().splitlines())
        return [line.decode(errors="replace").rstrip() for line in self._lines]


class Sink:
    """A file descriptor of the launcher that is written to only when it can take more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.broken = False  # its reader has gone
        self._waiting = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes that are still to be written."""
        return len(self._waiting)

    def write(self, data: bytes) -> None:
        if not self.broken:
            self._waiting += data

    def flush_some(self) -> None:
        """Write one piece; blocks at most as long as one PIPE_BUF takes where poll(2) said writable."""
        try:
            done = os.write(self.fd, self._waiting[:PIPE_BUF])
        except BlockingIOError:  # someone made the descriptor non-blocking: poll again
            return
        except OSError:  # EPIPE, or EIO from a terminal that was hung up
            self.broken = True
            self._waiting.clear()
            return
        del self._waiting[:done]
