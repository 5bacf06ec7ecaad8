"""Outlive a launcher that is killed, and end what its ranks have started. Run by path, as a process of its own.

The ranks themselves die with the launcher by PR_SET_PDEATHSIG, but the kernel does not hand that on to their children
(a shell script that calls python). Each line of stdin is a process group, "-GROUP" one that is over; the end of
stdin is the end of the launcher.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        number = int(line)
        if number > 0:
            groups.add(number)
        else:
            groups.discard(-number)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nothing left, or it changed its user
            continue


if __name__ == "__main__":
    main()
