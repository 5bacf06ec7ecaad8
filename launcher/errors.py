"""The launcher's own error: one sentence and an exit code."""

from __future__ import annotations


class LaunchError(Exception):
    """A request that cannot be honoured; `str(error)` is the sentence to print, `exit_code` what to end with."""

    exit_code = 2
