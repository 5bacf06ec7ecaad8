"""What the backends share: checks of arguments, JSON values, gathering along a dimension, and the end of a group.

A backend supplies five primitives on contiguous CPU tensors. Any error inside one of them loses the group: the ranks
are no longer at the same call.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, Self

import torch

from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.rank import RankInfo

from .collective import NativeCollective, called_back
from .group import Group, Json
from .meeting import Exchange, Meeting
from .peers import Peer, some
from .tree import DTYPES

P = ParamSpec("P")


class BaseGroup(ABC):
    """A Group over a backend's primitives."""

    name: ClassVar[str]
    device_types: tuple[str, ...] = ("cpu",)  # where tensors may be

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float) -> None:
        self.rank = rank
        self.size = len(peers)
        self.peers = tuple(peers)
        self.timeout = timeout
        self._me = f"rank {self.peers[rank].number}"  # in sentences
        self._lost: str | None = None
        self._culprit: int | None = None
        self._store: Any = None

    # ---- what a backend supplies

    @classmethod
    @abstractmethod
    def why_not(cls, info: RankInfo) -> str | None:
        """Return why this rank cannot use the backend, as a sentence, or None if it can."""

    @classmethod
    def prepare(cls) -> None:
        """Start what the library starts on all ranks of a job together, also on those that no group of it will hold."""
        return

    @classmethod
    @abstractmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> BaseGroup:
        """Form the group; all ranks of the meeting call it together."""

    @abstractmethod
    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        """Replace x by the tree sum."""

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        """Replace x by the sum as the backend adds by itself; by default it has no way of its own."""
        self._all_reduce(x, timeout)

    @abstractmethod
    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        """Fill out (bytes) with every rank's x (bytes), counts[rank] long."""

    @abstractmethod
    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        """Replace x (bytes) by the source's."""

    @abstractmethod
    def _barrier(self, timeout: float) -> None: ...

    @abstractmethod
    def _leave(self) -> None:
        """Let the peers know that this rank has given the group up, if they cannot know it yet."""

    @abstractmethod
    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        """Form a group of some of this group's ranks. Every rank of this group calls `exchange` equally often."""

    @abstractmethod
    def close(self) -> None: ...

    # ---- the collectives

    def all_reduce(self, x: torch.Tensor, timeout: float | None = None, *, native: bool = False) -> torch.Tensor:
        if x.dtype not in DTYPES or x.device.type not in self.device_types or not x.is_contiguous():
            raise UsageError(f"all_reduce got {_described(x)}; expected contiguous fp32, bf16 or fp16 on {self._where}")
        reduce = self._all_reduce_native if native else self._all_reduce
        self._run(reduce, x, self.timeout if timeout is None else timeout)
        return x

    def all_gather(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None, timeout: float | None = None
    ) -> torch.Tensor:
        if x.device.type not in self.device_types or not -x.dim() <= dim < x.dim():
            raise UsageError(
                f"all_gather along {dim} got {_described(x)}; expected a tensor on {self._where} with the dimension"
            )
        dim %= x.dim()
        limit = self.timeout if timeout is None else timeout
        own = x.shape[dim]
        if sizes is None:
            told = torch.empty(self.size, dtype=torch.int64)
            self._gather_bytes(torch.tensor([own]), told, [8] * self.size, limit)
            sizes = [int(size) for size in told.tolist()]
        if len(sizes) != self.size or sizes[self.rank] != own:
            raise UsageError(
                f"all_gather on rank {self.rank} got sizes {list(sizes)} with {own} rows of its own along {dim}; "
                f"expected {self.size} sizes that agree with each rank's tensor"
            )
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        numels = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.empty(sum(numels), dtype=x.dtype, device=x.device)
        self._gather_bytes(x.contiguous(), flat, [n * x.element_size() for n in numels], limit)
        if torch.Size(x.shape[:dim]).numel() == 1:
            return flat.view(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
        pieces = [piece.view(shape) for piece, shape in zip(cut(flat, numels), shapes, strict=True)]
        return torch.cat(pieces, dim)

    def broadcast(self, x: torch.Tensor, source: int = 0, timeout: float | None = None) -> torch.Tensor:
        if x.device.type not in self.device_types or not x.is_contiguous():
            raise UsageError(f"broadcast got {_described(x)}; expected a contiguous tensor on {self._where}")
        if not 0 <= source < self.size:
            raise UsageError(f"broadcast from rank {source} in a group of {self.size}; expected 0 to {self.size - 1}")
        self._run(self._broadcast, _as_bytes(x), source, self.timeout if timeout is None else timeout)
        return x

    def broadcast_object(self, value: Json = None, source: int = 0, timeout: float | None = None) -> Json:
        data = _encode(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        self.broadcast(length, source, timeout)
        if self.rank != source:
            data = torch.empty(int(length.item()), dtype=torch.uint8)
        self.broadcast(data, source, timeout)
        return _decode(data)

    def gather_object(self, value: Json, timeout: float | None = None) -> list[Json]:
        data = _encode(value)
        limit = self.timeout if timeout is None else timeout
        told = torch.empty(self.size, dtype=torch.int64)
        self._gather_bytes(torch.tensor([data.numel()]), told, [8] * self.size, limit)
        counts = [int(count) for count in told.tolist()]
        out = torch.empty(sum(counts), dtype=torch.uint8)
        self._gather_bytes(data, out, counts, limit)
        return [_decode(piece) for piece in cut(out, counts)]

    def barrier(self, timeout: float | None = None) -> None:
        self._run(self._barrier, self.timeout if timeout is None else timeout)

    def split(self, color: int, key: int | None = None) -> Group:
        entries = self.gather_object([color, self.rank if key is None else key])
        members = sorted((entry[1], rank) for rank, entry in enumerate(entries) if entry[0] == color)
        ranks = [rank for _, rank in members]
        peers = some(self.peers, ranks)

        def exchange(value: Json) -> list[Json]:
            answers = self.gather_object(value)
            return [answers[rank] for rank in ranks]

        return self._subgroup(ranks.index(self.rank), peers, exchange, f"{color}")

    def native_collective(self) -> NativeCollective:
        return called_back(self) if self.size > 1 else NativeCollective(None, lambda: None)

    # ---- errors and the end

    def _gather_bytes(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        self._run(self._all_gather, _as_bytes(x), _as_bytes(out), counts, timeout)

    def _run(self, primitive: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self._lost is not None:
            raise CommError(f"the group of {self._me} is lost: {self._lost}", self._culprit)
        try:
            primitive(*args, **kwargs)
        except CommError as error:
            self._lost, self._culprit = str(error), error.rank
            self._leave()
            raise
        except BaseException as error:
            self._lost, self._culprit = f"a call was interrupted by {type(error).__name__}", self.rank
            self._leave()
            raise

    @property
    def _where(self) -> str:
        return " or ".join(self.device_types)

    def abandon(self, message: str) -> None:
        """Give the group up for a reason that came from elsewhere, so that nobody waits for this rank."""
        if self._lost is None:
            self._lost, self._culprit = message, None
            self._leave()

    def hold(self, store: object) -> None:
        """Keep the store of the meeting until the group is closed.

        torch.distributed's own group may be about to meet at the same address: it shares our store in rank 0's
        process, and would lose its ranks if that were closed while they come.
        """
        self._store = store

    def _closed(self) -> bool:
        """Mark the group closed; tell whether it was so already."""
        was = self._lost == "it was closed"
        self._lost = "it was closed"
        self._store = None
        return was

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy of a model runs in the same group: the connection to other processes has no second copy.
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cut(flat: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Return views of consecutive pieces of a flat tensor."""
    ends = list(accumulate(counts, initial=0))
    return [flat[start:stop] for start, stop in pairwise(ends)]


def _described(x: torch.Tensor) -> str:
    layout = "" if x.is_contiguous() else ", not contiguous"
    return f"a tensor of shape {list(x.shape)} ({x.dtype}, {x.device}{layout})"


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(-1).view(torch.uint8)


def _encode(value: Json) -> torch.Tensor:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a value sent between ranks is no JSON ({error}); send None, numbers, text, lists, dicts"
        ) from None
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
