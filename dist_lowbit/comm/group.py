"""What every backend offers: the Group."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch

if TYPE_CHECKING:
    from .collective import NativeCollective

Json = Any  # what json.dumps takes: None, bool, int, float, str, lists, and dicts with text keys


@runtime_checkable
class Group(Protocol):
    """Ranks that call the same collectives in the same order, from one thread at a time.

    All ranks of the group call each method together, with the same dtype, sizes, `dim` and `source`; another call by
    one of them is a CommError that names it. Tensors are on one of `device_types`. `timeout` (seconds, else its own)
    bounds how long a peer may be silent. A dead or silent peer is a CommError naming the rank; the group is lost
    then, and every later call raises.
    """

    @property
    def device_types(self) -> tuple[str, ...]:
        """Where tensors may be: the types of torch devices, "cpu" first."""
        ...

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    @property
    def name(self) -> str:
        """The backend's name in BACKENDS."""
        ...

    def all_reduce(self, x: torch.Tensor, timeout: float | None = None, *, native: bool = False) -> torch.Tensor:
        """Replace `x` by the sum over all ranks and return it, the same bits on every rank.

        `x` is contiguous fp32, bf16 or fp16; the order and the rounding are those of `tree.tree_sum`. With `native` the
        backend (gloo, mpi, ccl, nccl) adds as it likes, which is faster between machines and has other bits.
        """
        ...

    def all_gather(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None, timeout: float | None = None
    ) -> torch.Tensor:
        """Return the concatenation of all ranks' tensors along `dim`, in rank order.

        Any dtype; the ranks' sizes along `dim` may differ (0 is allowed). Pass them as `sizes` where they are known:
        exchanging them costs one more synchronisation.
        """
        ...

    def broadcast(self, x: torch.Tensor, source: int = 0, timeout: float | None = None) -> torch.Tensor:
        """Replace `x` (contiguous, any dtype) by rank `source`'s and return it."""
        ...

    def broadcast_object(self, value: Json = None, source: int = 0, timeout: float | None = None) -> Json:
        """Return rank `source`'s JSON value on every rank; what the others pass is ignored."""
        ...

    def gather_object(self, value: Json, timeout: float | None = None) -> list[Json]:
        """Return every rank's JSON value, on every rank."""
        ...

    def barrier(self, timeout: float | None = None) -> None:
        """Return when all ranks have called it."""
        ...

    def split(self, color: int, key: int | None = None) -> Group:
        """Return the group of the ranks that pass the same `color`, ordered by `key` (else by rank).

        All ranks of this group call it. The new group is closed on its own.
        """
        ...

    def native_collective(self) -> NativeCollective:
        """Return the table through which compiled code makes this group's calls, without Python where it can."""
        ...

    def close(self) -> None:
        """Release everything; not collective, may be called twice. A peer that still waits for this rank is told."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
