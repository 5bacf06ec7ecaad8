"""Fail on all ranks or on none: what one rank is told, all are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dist_lowbit.comm import Group
from dist_lowbit.core import errors
from dist_lowbit.core.errors import CommError, DistLowbitError
from dist_lowbit.core.settings import settings


@contextlib.contextmanager
def together(group: Group) -> Iterator[None]:
    """Run a block that reads or writes this rank's part; leave it when all ranks have.

    Where an exception ends it on some ranks, each of those raises its own, and the others a DistLowbitError (of the
    same class, where it is one of ours) that names the first of them. All ranks must enter together, and within
    DIST_LOWBIT_LOAD_TIMEOUT of one another: disks differ, and what follows may expect the others within seconds.
    """
    failure: Exception | None = None
    try:
        yield
    except CommError:
        raise  # the group is lost: nothing can be told any more
    except Exception as error:  # told to the others, then raised again below
        failure = error
    if group.size > 1:
        told = None if failure is None else [type(failure).__name__, str(failure)]
        answers = group.gather_object(told, timeout=settings().load_timeout)
        rank, answer = next(((rank, each) for rank, each in enumerate(answers) if each is not None), (0, None))
        if failure is None and answer is not None:
            kind = getattr(errors, answer[0], DistLowbitError)
            raise kind(f"rank {rank}: {answer[1]}")
    if failure is not None:
        raise failure
