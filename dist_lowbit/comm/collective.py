"""The table of C functions through which compiled code calls a group (kernels/cpu/collective.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch

from .group import Group

FAULT = 2  # any number but 0

AllReduce = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int64)
AllGather = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, POINTER(c_int64))


class Table(ctypes.Structure):
    """struct dlb_collective."""

    _fields_ = [
        ("context", c_void_p),
        ("rank", c_int32),
        ("size", c_int32),
        ("all_reduce", AllReduce),
        ("all_gather", AllGather),
        ("waited", c_void_p),
    ]


class NativeCollective:
    """What a group hands to compiled code: `address` of its table (0: a world of one), and `check` afterwards.

    Keep it as long as the compiled code may call, and no longer than the group is open.
    """

    def __init__(self, table: Table | None, explain: Callable[[], None]) -> None:
        self._table = table
        self._explain = explain
        self.address = 0 if table is None else ctypes.addressof(table)

    def check(self) -> None:
        """Raise what went wrong in a call that returned a fault to the compiled code; return if none did."""
        self._explain()


def called_back(group: Group) -> NativeCollective:
    """Make a table that calls the group's Python methods. Each call costs the interpreter some ten microseconds."""
    kept: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> int:
        try:
            if not kept:
                call()
        except BaseException as error:  # also Ctrl-C: an exception cannot pass through the compiled caller
            kept.append(error)
        return FAULT if kept else 0

    def all_reduce(context: int | None, data: int | None, count: int) -> int:
        return guarded(lambda: group.all_reduce(_floats(data, count)))

    def all_gather(context: int | None, own: int | None, out: int | None, counts: ctypes._Pointer[c_int64]) -> int:
        sizes = [int(counts[rank]) for rank in range(group.size)]

        def gather() -> None:
            _floats(out, sum(sizes)).copy_(group.all_gather(_floats(own, sizes[group.rank]), 0, sizes))

        return guarded(gather)

    def explain() -> None:
        if kept:
            raise kept[0]

    return NativeCollective(Table(None, group.rank, group.size, AllReduce(all_reduce), AllGather(all_gather)), explain)


def _floats(address: int | None, count: int) -> torch.Tensor:
    if not count or not address:
        return torch.empty(0)
    return torch.frombuffer((c_float * count).from_address(address), dtype=torch.float32)
