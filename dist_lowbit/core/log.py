"""The one logger. Ranks other than 0 speak only at WARNING and above."""

from __future__ import annotations

import logging

from .errors import UsageError

logger = logging.getLogger("dist_lowbit")


def configure(level: str, rank: int = 0) -> None:
    """Set the level of dist_lowbit's logger for this process.

    `level` is a name of the logging module, in any case. Rank 0 speaks for all: other ranks are raised to
    WARNING unless DEBUG was asked for.
    """
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise UsageError(f"DIST_LOWBIT_LOG is {level!r}; expected one of {', '.join(map(str.lower, levels))}")
    wanted = levels[level.upper()]
    if rank != 0 and wanted > logging.DEBUG:
        wanted = max(wanted, logging.WARNING)
    logger.setLevel(wanted)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dist_lowbit: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
