"""From what a caller says about parallelism to a group of ranks."""

from __future__ import annotations

from typing import Any

from dist_lowbit.comm import Group, SingleGroup, init_group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.rank import current
from dist_lowbit.core.settings import settings
from dist_lowbit.ops import usable_device

# What adds tensors on another device than the cpu.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


def require_group(group: Any) -> Group | None:
    """Return what a caller gave as a group, or None; anything that is no Group is a UsageError."""
    if group is not None and not isinstance(group, Group):
        raise UsageError(
            f"group is {group!r:.80}; expected a Group, which init_group() returns in a job of dist-lowbit run, or "
            "None for one rank"
        )
    return group


def join_ranks(tensor_parallel: int | str | Group | None, device: str | None = None) -> tuple[Group, int]:
    """Return the group to split over, and this process's rank within its host.

    "auto" or True joins the ranks that this process was started with; a number also checks how many they are; a
    Group is taken as it is; None, False or 1 is one rank. device: where the model will lie, for a backend that adds
    there; one that DIST_LOWBIT_BACKEND names comes first. All ranks must call together.
    """
    if tensor_parallel is None or tensor_parallel is False or (tensor_parallel is not True and tensor_parallel == 1):
        return SingleGroup(), 0
    info = current()
    if isinstance(tensor_parallel, Group):
        return tensor_parallel, info.local_rank
    if tensor_parallel is not True and tensor_parallel != "auto":
        if not isinstance(tensor_parallel, int) or tensor_parallel < 1:
            raise UsageError(f"tensor_parallel is {tensor_parallel!r}; expected auto, a number of ranks, or a Group")
        if tensor_parallel != info.world_size:
            raise UsageError(
                f"tensor_parallel is {tensor_parallel}, but this job has {info.world_size} rank(s); "
                f"start it with dist-lowbit run -n {tensor_parallel}"
            )
    kind = usable_device(device or "cpu").type
    backend = _BACKENDS.get(kind, "auto") if settings().backend == "auto" and info.world_size > 1 else "auto"
    return init_group(backend=backend, rank_info=info), info.local_rank
