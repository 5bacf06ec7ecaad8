"""Every error that dist_lowbit raises on purpose.

A message is one sentence that says what, where, expected, found and what to do. The command line prints
`str(error)` and exits with `exit_code`; a traceback means a defect of ours.
"""

from __future__ import annotations


class DistLowbitError(Exception):
    """Base of all intended errors."""

    exit_code = 2


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
