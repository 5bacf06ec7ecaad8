"""Ranks over oneCCL on CPUs, through the shim that this machine builds for itself (kernels/ccl).

The sum is the tree's, added by the compiled kernels; `native` is oneCCL's own. Under Intel MPI's mpirun oneCCL uses
MPI, anywhere else libfabric (over TCP unless FI_PROVIDER says otherwise), and the ranks find one another over the
meeting's store. A rank that dies on this machine is noticed by its pidfd, one that gives up by its note.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_double, c_int, c_int8, c_int32, c_uint64, c_void_p
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from dist_lowbit.core.errors import CommError
from dist_lowbit.core.native import native, native_why_not
from dist_lowbit.core.rank import RankInfo
from dist_lowbit.kernels import ccl

from . import mpi
from .base import BaseGroup
from .calls import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, BYTES, CODES, described
from .collective import AllGather, AllReduce, NativeCollective, Table
from .interface import interface_to
from .meeting import Exchange, Meeting
from .notes import Notes
from .peers import Peer
from .single import SingleGroup
from .tree import postfix
from .watch import Watch

OK, GIVEN_UP, MISMATCH, ERROR = range(4)  # the shim's Status
Look = CFUNCTYPE(c_int, c_uint64, c_double)


class Header(ctypes.Structure):
    """The shim's Header."""

    _fields_ = [
        ("number", c_uint64),
        ("count", c_uint64),
        ("op", c_int32),
        ("dtype", c_int32),
        ("source", c_int32),
        ("rank", c_int32),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "dlb_ccl_address_bytes": (c_int, []),
    "dlb_ccl_open": (c_void_p, [c_char_p]),
    "dlb_ccl_join": (c_void_p, [c_char_p]),
    "dlb_ccl_create": (c_void_p, [c_void_p, c_int, c_int, c_void_p, POINTER(c_int8), c_int, Look]),
    "dlb_ccl_all_reduce": (c_int, [c_void_p, c_void_p, c_uint64, c_int]),
    "dlb_ccl_all_reduce_native": (c_int, [c_void_p, c_void_p, c_uint64, c_int]),
    "dlb_ccl_all_gather": (c_int, [c_void_p, c_void_p, c_void_p, POINTER(c_uint64)]),
    "dlb_ccl_broadcast": (c_int, [c_void_p, c_void_p, c_uint64, c_int]),
    "dlb_ccl_barrier": (c_int, [c_void_p]),
    "dlb_ccl_fault": (c_int, [c_void_p, POINTER(Header)]),
    "dlb_ccl_error": (c_char_p, []),
    "dlb_ccl_leave": (None, [c_void_p]),
    "dlb_ccl_close": (None, [c_void_p]),
}


def under_intel_mpi(environ: Mapping[str, str]) -> bool:
    """Tell whether Intel MPI's launcher has started this process."""
    return "PMI_RANK" in environ and any(name.startswith("I_MPI_") for name in environ)


def over_mpi(info: RankInfo, environ: Mapping[str, str], mpi4py: bool) -> bool:
    """Tell whether oneCCL can use MPI, which all ranks of a job start together: by mpi4py, or by oneCCL itself."""
    return under_intel_mpi(environ) and (
        mpi4py or environ.get("PMI_SIZE", str(info.world_size)) == str(info.world_size)
    )


def _has_mpi4py() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def environment(
    info: RankInfo, environ: dict[str, str], interface: str | None = None, mpi4py: bool = True
) -> dict[str, str]:
    """Return the variables that oneCCL needs for these ranks and that `environ` does not set.

    `interface` is the network interface to use; without it oneCCL and libfabric take the first that they like.
    `mpi4py` tells whether that is installed.
    Progress in the calling thread instead of a worker that spins beside it: on a core of one's own that is as quick, on
    a shared one a hundred times quicker. Ten attempts to send at a time instead of 10000: to a rank that is gone each
    is a new connection, and while oneCCL tries, no one notices.
    """
    wanted = {"CCL_LOG_LEVEL": "error", "CCL_WORKER_OFFLOAD": "0"}
    if not over_mpi(info, environ, mpi4py) and environ.get("CCL_ATL_TRANSPORT", "ofi") == "ofi":  # the launcher sets it
        wanted |= {"CCL_ATL_TRANSPORT": "ofi", "CCL_PROCESS_LAUNCHER": "none", "FI_PROVIDER": "tcp"}
        wanted["CCL_ATL_OFI_MAX_RETRY_COUNT"] = "10"
        local_size = info.local_size or info.world_size
        wanted |= {"CCL_LOCAL_RANK": str(info.local_rank), "CCL_LOCAL_SIZE": str(local_size)}
        wanted |= {"CCL_KVS_IFACE": interface, "FI_TCP_IFACE": interface} if interface else {}
    return {name: value for name, value in wanted.items() if name not in environ}


def _open_shim() -> ctypes.CDLL:
    try:
        path = ccl.ensure()
    except ccl.ShimMissing as error:
        raise CommError(f"ccl cannot be used: {error}") from error
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CommError(f"the oneCCL shim {path} does not open ({error}); remove it to have it built again") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _release(library: ctypes.CDLL, handle: int, owner: int) -> None:
    if os.getpid() == owner:
        library.dlb_ccl_close(handle)


class CclGroup(BaseGroup):
    """Ranks over oneCCL. A lost group leaves oneCCL amid its work, so the process then ends without its clean-up."""

    name = "ccl"

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float, library: ctypes.CDLL, notes: Notes) -> None:
        super().__init__(rank, peers, timeout)
        self._library = library
        self._watch = Watch(rank, peers, notes, timeout)
        self._look = Look(self._watch.look)  # kept: the shim calls it as long as the group lives
        self._handle = 0
        self._splits = 0

    @classmethod
    def why_not(cls, info: RankInfo) -> str | None:
        if native() is None:
            return f"ccl adds with the compiled library, which is missing: {native_why_not()}"
        if over_mpi(info, os.environ, _has_mpi4py()) and os.environ.get("CCL_ATL_TRANSPORT", "mpi") == "mpi":
            return ccl.why_not() or mpi.no_room(info, os.environ)
        return ccl.why_not()

    @classmethod
    def prepare(cls) -> None:
        if under_intel_mpi(os.environ) and _has_mpi4py():
            mpi.start()  # else oneCCL starts MPI for itself alone, and the backend mpi could not join it

    @classmethod
    def connect(cls, meeting: Meeting, peers: Sequence[Peer], timeout: float) -> CclGroup:
        cls.prepare()
        os.environ.update(environment(meeting.info, dict(os.environ), interface_to(meeting.info), _has_mpi4py()))
        notes = Notes(PrefixStore("ccl", meeting.store), meeting.info.rank, len(peers), meeting.hosted_by_rank_0)
        return cls._form(meeting.info.rank, peers, meeting.exchange, timeout, notes)

    @classmethod
    def _form(cls, rank: int, peers: Sequence[Peer], exchange: Exchange, timeout: float, notes: Notes) -> CclGroup:
        """Open or join oneCCL's meeting place, whose address rank 0 tells; a failure anywhere is known everywhere."""
        library: ctypes.CDLL | None = None
        place: int | None = None
        own: dict[str, Any] = {}
        try:
            library = _open_shim()
            if rank == 0:
                address = ctypes.create_string_buffer(library.dlb_ccl_address_bytes())
                place = library.dlb_ccl_open(address)
                if not place:
                    raise CommError(f"oneCCL cannot open a meeting place ({_reason(library)})")
                own["place"] = address.raw.hex()
        except CommError as error:
            own["error"] = str(error)
        answers = exchange(own)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors or library is None:
            raise CommError(errors[0])
        group = cls(rank, peers, timeout, library, notes)
        group._create(place, bytes.fromhex(answers[0]["place"]))
        return group

    def _create(self, place: int | None, address: bytes) -> None:
        """Connect the ranks, in a thread: oneCCL itself would wait for them without an end."""
        order = postfix(self.size)
        kernels = native()

        def create() -> int:
            meeting_place = place or self._library.dlb_ccl_join(address)
            program = (c_int8 * len(order))(*order)
            adder = ctypes.cast(kernels.dlb_shm_tree_sum, c_void_p) if kernels else None
            handle = meeting_place and self._library.dlb_ccl_create(
                meeting_place, self.rank, self.size, adder, program, len(order), self._look
            )
            if not handle:
                raise CommError(f"oneCCL cannot connect {self._me} to its peers ({_reason(self._library)})")
            return int(handle)

        self._handle = self._watch.run("the forming of the group", create)
        self._finalizer = weakref.finalize(self, _release, self._library, self._handle, os.getpid())

    def _subgroup(self, rank: int, peers: Sequence[Peer], exchange: Exchange, label: str) -> BaseGroup:
        self._splits += 1
        if len(peers) == 1:
            exchange({})
            return SingleGroup(self.timeout)
        notes = self._watch.notes.among(f"split{self._splits}/{label}", rank, len(peers))
        return self._form(rank, peers, exchange, self.timeout, notes)

    # ---- the primitives

    def _all_reduce(self, x: torch.Tensor, timeout: float) -> None:
        call = (ALL_REDUCE, CODES[x.dtype], x.numel(), 0)
        self._call(call, timeout, self._library.dlb_ccl_all_reduce, x.data_ptr(), x.numel(), CODES[x.dtype])

    def _all_reduce_native(self, x: torch.Tensor, timeout: float) -> None:
        call = (ALL_REDUCE, CODES[x.dtype], x.numel(), 0)
        self._call(call, timeout, self._library.dlb_ccl_all_reduce_native, x.data_ptr(), x.numel(), CODES[x.dtype])

    def _all_gather(self, x: torch.Tensor, out: torch.Tensor, counts: list[int], timeout: float) -> None:
        table = (c_uint64 * self.size)(*counts)
        call = (ALL_GATHER, BYTES, x.numel(), 0)
        self._call(call, timeout, self._library.dlb_ccl_all_gather, x.data_ptr(), out.data_ptr(), table)

    def _broadcast(self, x: torch.Tensor, source: int, timeout: float) -> None:
        call = (BROADCAST, BYTES, x.numel(), source)
        self._call(call, timeout, self._library.dlb_ccl_broadcast, x.data_ptr(), x.numel(), source)

    def _barrier(self, timeout: float) -> None:
        self._call((BARRIER, BYTES, 0, 0), timeout, self._library.dlb_ccl_barrier)

    def _call(self, call: tuple[int, int, int, int], timeout: float, function: Any, *arguments: Any) -> None:
        self._watch.call, self._watch.limit = described(*call), timeout
        status = function(self._handle, *arguments)
        if status != OK:
            self._raise(status)
        self._watch.limit = self.timeout

    def _raise(self, status: int) -> None:
        """Raise what the shim's status stands for."""
        if status == GIVEN_UP:
            self._watch.raise_kept()
        fault = Header()
        self._library.dlb_ccl_fault(self._handle, byref(fault))
        if status == MISMATCH:
            theirs = described(fault.op, fault.dtype, fault.count, fault.source)
            raise CommError(
                f"{self.peers[fault.rank]} called {theirs} where {self._me} called {self._watch.call}; "
                "all ranks must make the same calls",
                fault.rank,
            )
        raise CommError(f"oneCCL on {self._me} failed in {self._watch.call} ({_reason(self._library)})", self.rank)

    def native_collective(self) -> NativeCollective:
        all_reduce = ctypes.cast(self._library.dlb_ccl_collective_all_reduce, AllReduce)
        all_gather = ctypes.cast(self._library.dlb_ccl_collective_all_gather, AllGather)
        table = Table(self._handle, self.rank, self.size, all_reduce, all_gather)

        def raise_fault() -> None:
            self._watch.call = "a call of compiled code"
            status = self._library.dlb_ccl_fault(self._handle, byref(Header()))
            if status != OK:
                self._raise(status)

        return NativeCollective(table, lambda: self._run(raise_fault))

    def _leave(self) -> None:
        self._library.dlb_ccl_leave(self._handle)
        mpi.never_finalize()
        self._watch.notes.leave(str(self._lost), self.rank if self._culprit is None else self._culprit)

    def close(self) -> None:
        was_lost = self._lost is not None
        if not self._closed():
            if not was_lost:
                self._watch.notes.leave("it was closed", None)
            self._finalizer()
            self._watch.notes.close()
            self._watch.close()


def _reason(library: ctypes.CDLL) -> str:
    text = library.dlb_ccl_error().decode(errors="replace").strip()
    return text.splitlines()[0] if text else "it gives no reason"
