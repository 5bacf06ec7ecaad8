"""Outlive a launcher that is killed, and end what its ranks have started. Run by path, as a process of its own.

The ranks themselves die with the launcher by PR_SET_PDEATHSIG, but the kernel does not hand that on to their children
(a shell script that calls python). Each line of stdin is "GROUP SIGNAL": what to send to that process group at the end
of stdin, which is the end of the launcher; signal 0 lets go of the group.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    groups: dict[int, int] = {}
    for line in sys.stdin:
        group, number = map(int, line.split())
        groups[group] = number
    for group, number in groups.items():
        if number == 0:
            continue
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):  # nothing left, or it changed its user
            continue


if __name__ == "__main__":
    main()
