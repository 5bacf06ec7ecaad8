"""The compiled kernels of this process, found once; None (with a reason) where they are missing."""

from __future__ import annotations

import ctypes
from functools import cache

from dist_lowbit.kernels import LibraryMissing, open_library

from .errors import UsageError
from .settings import settings


@cache
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    wanted = settings().library
    if wanted == "none":
        return None, "switched off by DIST_LOWBIT_LIBRARY=none"
    try:
        return open_library(wanted), None
    except LibraryMissing as error:
        if wanted:  # asked for by name: running without it would be another, slower program
            raise UsageError(f"DIST_LOWBIT_LIBRARY is {wanted!r}: {error}") from error
        return None, str(error)


def native() -> ctypes.CDLL | None:
    """Return the compiled library, or None where it cannot be had.

    One that DIST_LOWBIT_LIBRARY names must open: else a UsageError.
    """
    return _open()[0]


def native_why_not() -> str | None:
    """Return why there is no compiled library, or None if there is one."""
    return _open()[1]
