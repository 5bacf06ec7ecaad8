"""The shared memory of a group on one machine: a file in /dev/shm that never has a name.

Rank 0 makes it with O_TMPFILE and the others open it through /proc/<pid>/fd, so however a rank ends, nothing is left
behind. Mode 0600; every rank reserves its own region before use (a full file system is a sentence here and would be a
SIGBUS later), which also puts the region's pages on that rank's NUMA node.
"""

from __future__ import annotations

import errno
import os

from dist_lowbit.core.errors import CommError

FOLDER = "/dev/shm"
SEGMENT = "the ranks' shared segment"


def _too_small(folder: str, purpose: str, detail: str) -> str:
    return (
        f"{folder} has no room for {purpose} ({detail}); enlarge it (containers: --shm-size=1g) or choose another "
        "backend with DIST_LOWBIT_BACKEND"
    )


def no_room(total: int, folder: str = FOLDER, purpose: str = SEGMENT) -> str | None:
    """Return why `total` bytes cannot be had for a segment, or for what is told, or None if they can."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return f"there is no {folder} ({error.strerror})"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} is not writable"
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < total:  # no blocks at all: a file system without a limit
        return _too_small(folder, purpose, f"{total} bytes needed, {free} free")
    return None


def create(total: int, folder: str = FOLDER) -> int:
    """Return the descriptor of a new nameless segment of `total` bytes, not yet reserved."""
    reason = no_room(total, folder)
    if reason is not None:
        raise CommError(reason)
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommError(
            f"cannot make a shared segment in {folder} ({error.strerror}); choose another backend with "
            "DIST_LOWBIT_BACKEND"
        ) from error
    os.ftruncate(descriptor, total)
    return descriptor


def reserve(descriptor: int, offset: int, count: int, folder: str = FOLDER) -> None:
    """Allocate this rank's bytes of the segment now."""
    try:
        os.posix_fallocate(descriptor, offset, count)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise CommError(_too_small(folder, SEGMENT, f"{count} bytes a rank, {error.strerror}")) from error
        raise CommError(f"cannot reserve {count} bytes of shared memory in {folder} ({error.strerror})") from error


def address(descriptor: int) -> dict[str, int]:
    """Return what another process of this user needs to open the segment."""
    status = os.fstat(descriptor)
    return {"pid": os.getpid(), "descriptor": descriptor, "inode": status.st_ino, "device": status.st_dev}


def join(place: dict[str, int]) -> int:
    """Open the segment that another process holds."""
    path = f"/proc/{place['pid']}/fd/{place['descriptor']}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CommError(
            f"cannot open rank 0's shared segment at {path} ({error.strerror}); run all ranks as one user in one "
            "container, or choose another backend with DIST_LOWBIT_BACKEND"
        ) from error
    status = os.fstat(descriptor)
    if (status.st_ino, status.st_dev) != (place["inode"], place["device"]):
        os.close(descriptor)
        raise CommError(f"{path} is no longer rank 0's shared segment; rank 0 has died", 0)
    return descriptor
