"""Ranks of one machine over one shared segment; the collectives are C++ (kernels/cpu/shm.cpp)."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int, c_int8, c_int32, c_size_t, c_uint64, c_void_p

import torch

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.native import native, native_why_not
from dist_lowbit.core.rank import RankInfo

from . import segment
from .base import BaseGroup
from .collective import NativeCollective, Table
from .group import Json
from .meeting import Exchange, Meeting
from .peers import Peer, is_stopped, one_machine, open_pidfd
from .single import SingleGroup
from .tree import DTYPES, postfix

MAX_RANKS = 16
FAULT = 2  # enum dlb_shm_status; 0: done, 1: call again
DEAD, SILENT, MISMATCH, CLOSED, LEFT = 1, 2, 3, 4, 5
OPERATIONS = {1: "all_reduce", 2: "all_gather", 3: "broadcast", 4: "barrier"}
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # enum dlb_shm_dtype
ELEMENTS = ("fp32 numbers", "bf16 numbers", "fp16 numbers", "bytes")


class Fault(ctypes.Structure):
    """struct dlb_shm_fault_info."""

    _fields_ = [
        ("kind", c_int32),
        ("rank", c_int32),
        ("reporter", c_int32),
        ("op", c_int32),
        ("dtype", c_int32),
        ("source", c_int32),
        ("count", c_uint64),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "dlb_shm_region_bytes": (c_uint64, []),
    "dlb_shm_attach": (
        c_void_p,
        [c_int, c_int, c_int, POINTER(c_int32), POINTER(c_int32), POINTER(c_int8), c_int, POINTER(c_int)],
    ),
    "dlb_shm_try_all_reduce": (c_int, [c_void_p, c_void_p, c_size_t, c_int, c_double]),
    "dlb_shm_try_all_gather": (c_int, [c_void_p, c_void_p, c_void_p, POINTER(c_uint64), c_double]),
    "dlb_shm_try_broadcast": (c_int, [c_void_p, c_void_p, c_uint64, c_int, c_double]),
    "dlb_shm_try_barrier": (c_int, [c_void_p, c_double]),
    "dlb_shm_all_reduce": (c_int, [c_void_p, c_void_p, c_size_t, c_double]),
    "dlb_shm_collective": (None, [c_void_p, c_double, POINTER(Table)]),
    "dlb_shm_fault": (None, [c_void_p, POINTER(Fault)]),
    "dlb_shm_leave": (None, [c_void_p]),
    "dlb_shm_close": (None, [c_void_p]),
    "dlb_shm_tree_sum": (None, [POINTER(c_int8), c_int, POINTER(c_void_p), c_void_p, c_size_t, c_int, c_int]),
}


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the signatures of the dlb_shm functions."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _release(library: ctypes.CDLL, handle: int, owner: int) -> None:
    # A forked child inherits the object and its finalizer, but the place in the group is its parent's.
    if os.getpid() == owner:
        library.dlb_shm_close(handle)


class ShmGroup(BaseGroup):
    """2 to 16 ranks that see one another's processes."""

    name = "shm"

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, library: ctypes.CDLL, handle: int) -> None:
        super().__init__(rank, peers, timeout)
        self.handle = handle  # dlb_shm*
        self._library = library
        self._finalizer = weakref.finalize(self, _release, library, handle, os.getpid())

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if info.world_size > MAX_RANKS:
            return f"shm takes up to {MAX_RANKS} ranks and there are {info.world_size}"
        if info.local_size not in (0, info.world_size):
            return f"only {info.local_size} of the {info.world_size} ranks are on this host"
        library = native()
        if library is None:
            return f"the compiled library is missing: {native_why_not()}"
        missing = [function for function in _SIGNATURES if not hasattr(library, function)]
        if missing:
            return f"the compiled library is older than this package (it lacks {missing[0]}); build it again"
        return segment.no_room(int(bind(library).dlb_shm_region_bytes()) * info.world_size)

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> ShmGroup:
        if not one_machine(peers):
            hosts = ", ".join(sorted({peer.host for peer in peers}))
            raise CommError(f"shm needs all ranks on one machine and in one container; they are on {hosts}")
        return cls._form(meeting.info.rank, peers, meeting.exchange, timeout)

    @classmethod
    def _form(cls, rank: int, peers: Sequence[Peer], exchange: Exchange, timeout: float) -> ShmGroup:
        """Make or join the segment. Two exchanges, so that a failure anywhere is known everywhere."""
        library = native()
        if library is None:
            raise CommError(f"shm needs the compiled library: {native_why_not()}")
        bind(library)
        region = int(library.dlb_shm_region_bytes())
        descriptor = -1
        own: dict[str, Json] = {}
        try:
            if rank == 0:
                descriptor = segment.create(region * len(peers))
                own["place"] = segment.address(descriptor)
        except CommError as error:
            own["error"] = str(error)
        answers = exchange(own)
        handle = 0
        own = {}
        try:
            if "error" not in answers[0]:
                if rank != 0:
                    descriptor = segment.join(answers[0]["place"])
                segment.reserve(descriptor, region * rank, region)
                handle = _attach(library, descriptor, rank, peers)
        except CommError as error:
            own["error"] = str(error)
        answers = [answers[0], *exchange(own)]
        if descriptor >= 0:
            os.close(descriptor)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            if handle:
                library.dlb_shm_close(handle)
            raise CommError(errors[0])
        return cls(rank, peers, timeout, library, handle)

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        if len(peers) == 1:
            exchange({})
            exchange({})
            return SingleGroup(self.timeout)
        return self._form(rank, peers, exchange, self.timeout)

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        code = CODES[x.dtype]
        pointer, count = x.data_ptr(), x.numel()
        while status := self._library.dlb_shm_try_all_reduce(self.handle, pointer, count, code, timeout):
            self._check(status, f"all_reduce of {count} {ELEMENTS[code]}", timeout)

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        own, result = x.data_ptr(), out.data_ptr()
        table = (c_uint64 * self.size)(*counts)
        while status := self._library.dlb_shm_try_all_gather(self.handle, own, result, table, timeout):
            self._check(status, f"all_gather of {x.numel()} bytes", timeout)

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        pointer, count = x.data_ptr(), x.numel()
        while status := self._library.dlb_shm_try_broadcast(self.handle, pointer, count, source, timeout):
            self._check(status, f"broadcast of {count} bytes from rank {source}", timeout)

    def _barrier(self, timeout: float) -> None:
        while status := self._library.dlb_shm_try_barrier(self.handle, timeout):
            self._check(status, "barrier", timeout)

    def native_collective(self) -> NativeCollective:
        table = Table()
        self._run(lambda: self._library.dlb_shm_collective(self.handle, self.timeout, byref(table)))

        def raise_fault() -> None:
            fault = self._fault()
            if fault.kind:
                self._check(FAULT, "a call of compiled code", self.timeout)

        return NativeCollective(table, lambda: self._run(raise_fault))

    def _fault(self) -> Fault:
        fault = Fault()
        self._library.dlb_shm_fault(self.handle, byref(fault))
        return fault

    def _check(self, status: int, call: str, timeout: float) -> None:
        """Raise the CommError behind a status that a dlb_shm function returned; return if it was OK or AGAIN."""
        if status == FAULT:
            fault = self._fault()
            raise CommError(self._sentence(fault, call, timeout), fault.rank)

    def _sentence(self, fault: Fault, call: str, timeout: float) -> str:
        peer = self.peers[fault.rank]
        seen = "" if fault.reporter == self.rank else f", as rank {self.peers[fault.reporter].number} has noticed"
        if fault.kind == MISMATCH and fault.reporter == self.rank:
            theirs = f"{OPERATIONS[fault.op]} of {fault.count} {ELEMENTS[fault.dtype]}"
            theirs += f" from rank {fault.source}" if OPERATIONS[fault.op] == "broadcast" else ""
            return f"{peer} called {theirs} where {self._me} called {call}; all ranks must make the same calls"
        if fault.rank == self.rank:
            reporter = self.peers[fault.reporter].number
            return f"rank {reporter} gave up on this {self._me} and left the group before its {call}"
        sentences = {
            DEAD: f"{peer} has died{seen}; {self._me} waited for it in {call}",
            SILENT: f"{peer} was silent for {timeout:g} s{' (it is stopped)' if is_stopped(peer) else ''}{seen}; "
            f"{self._me} waited for it in {call} (DIST_LOWBIT_TIMEOUT sets the time)",
            MISMATCH: f"{peer} made another call than its peers{seen}; {self._me} was in {call}",
            CLOSED: f"{peer} has closed its group{seen}; {self._me} waited for it in {call}",
            LEFT: f"{peer} was interrupted and left the group{seen}; {self._me} waited for it in {call}",
        }
        return sentences[fault.kind]

    def _leave(self) -> None:
        if self._finalizer.alive:
            self._library.dlb_shm_leave(self.handle)

    def close(self) -> None:
        self._closed()
        self._finalizer()
        self.handle = 0


def _attach(library: ctypes.CDLL, descriptor: int, rank: int, peers: Sequence[Peer]) -> int:
    """Map the segment and return the handle, which owns the peers' pidfds."""
    size = len(peers)
    pidfds = [-1 if peer.rank == rank else open_pidfd(peer) for peer in peers]
    order = postfix(size)
    error = c_int()
    handle = library.dlb_shm_attach(
        descriptor,
        rank,
        size,
        (c_int32 * size)(*(peer.pid for peer in peers)),
        (c_int32 * size)(*pidfds),
        (c_int8 * len(order))(*order),
        len(order),
        byref(error),
    )
    if not handle:
        raise CommError(f"rank {rank} cannot map the shared segment ({os.strerror(error.value)})", rank)
    return int(handle)
