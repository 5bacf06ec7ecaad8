"""Every error that dist_lowbit raises on purpose.

A message is one sentence that says what, where, expected, found and what to do. The command line prints
`str(error)` and exits with `exit_code`; a traceback means a defect of ours.
"""

from __future__ import annotations


class DistLowbitError(Exception):
    """Base of all intended errors."""

    exit_code = 2

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        """argument: the name in `message` that users of Python write, where the command line has an option for it."""
        super().__init__(message)
        self.argument = argument

    def with_option(self) -> str:
        """Return the message as the command line says it: kv_cache_dtype is --kv-cache-dtype there."""
        if self.argument is None:
            return str(self)
        return str(self).replace(self.argument, f"--{self.argument.replace('_', '-')}", 1)


class UsageError(DistLowbitError):
    """An argument, a setting or a path that cannot be honoured."""


class FormatError(DistLowbitError):
    """An unknown format, or values that a format cannot hold (NaN, Inf, scale overflow)."""


class KernelError(DistLowbitError):
    """No kernel takes a weight; the message lists every candidate's reason."""


class PlanError(DistLowbitError):
    """A model cannot be split as asked, or a matrix is matched by no rule or by two."""


class CheckpointError(DistLowbitError):
    """A checkpoint is damaged, incomplete or of another kind; names file, tensor, expected and found."""


class CommError(DistLowbitError):
    """A collective failed: a peer died, was silent for too long, or disagrees about the call."""

    exit_code = 3

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank  # the rank at fault, where it is known
