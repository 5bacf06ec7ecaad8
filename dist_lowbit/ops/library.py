"""The compiled library as typed functions: argument types, the forced ISA and the thread pool set up once."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.native import native
from dist_lowbit.core.settings import settings

from . import threads


class CLinearSpec(ctypes.Structure):
    """struct dlb_linear_spec of kernels/cpu/api.h."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "k", "group_size")),
        *((name, c_int32) for name in ("codec", "bits", "offset", "center", "scale", "element")),
        ("multiplier", c_float),
        ("table", c_int8 * 16),
        ("values", c_float * 16),
        ("compute", c_int32),
        ("cuts", c_int64 * 9),
    )


class CLinearParts(ctypes.Structure):
    """struct dlb_linear_parts of kernels/cpu/api.h."""

    _fields_ = [("planes", c_void_p * 2), ("scale", c_void_p), ("offset", c_void_p)]


class CRowsIn(ctypes.Structure):
    """struct dlb_rows_in of kernels/cpu/fused.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_stride", "m", "k")),
        ("kind", c_int32),
        ("activation", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("weight_offset", c_float),
        ("up", c_void_p),
        ("up_stride", c_int64),
        ("rows_out", c_void_p),
        ("rows_stride", c_int64),
    )


class CRowsOut(ctypes.Structure):
    """struct dlb_rows_out of kernels/cpu/fused.h."""

    _fields_ = (
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("y_type", c_int32),
        ("reserved", c_int32),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
    )


class CLinearOut(ctypes.Structure):
    """struct dlb_linear_out of kernels/cpu/fused.h."""

    _fields_ = (("packed", c_void_p), ("bytes", c_int64), ("out", CRowsOut))


class CExpert(ctypes.Structure):
    """struct dlb_expert of kernels/cpu/fused.h."""

    _fields_ = tuple(
        field for name in ("gate", "up", "down") for field in ((name, c_void_p), (f"{name}_bytes", c_int64))
    )


class CMoeIn(ctypes.Structure):
    """struct dlb_moe_in of kernels/cpu/fused.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_stride", "m", "k")),
        ("experts", POINTER(CExpert)),
        ("expert_count", c_int64),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("slots", c_int64),
        ("activation", c_int32),
        ("reserved", c_int32),
    )


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "dlb_isa_count": (c_int, []),
    "dlb_isa_name": (c_char_p, [c_int]),
    "dlb_isa_supported": (c_int, [c_int]),
    "dlb_isa_active": (c_int, []),
    "dlb_isa_select": (c_int, [c_int]),
    "dlb_threads_start": (c_int, [c_int, POINTER(c_int), c_int]),
    "dlb_threads_count": (c_int, []),
    "dlb_linear_why_not": (c_char_p, [POINTER(CLinearSpec)]),
    "dlb_linear_packed_bytes": (c_int64, [POINTER(CLinearSpec)]),
    "dlb_linear_prepack": (c_int, [POINTER(CLinearSpec), POINTER(CLinearParts), c_void_p]),
    "dlb_linear_spec_of": (c_int, [c_void_p, c_int64, POINTER(CLinearSpec)]),
    "dlb_linear_unpack": (c_int, [c_void_p, c_int64, POINTER(CLinearParts)]),
    "dlb_linear_run": (c_int, [c_void_p, c_int64, c_void_p, *[c_int64] * 3, c_void_p, *[c_int64] * 2]),
    "dlb_linear_fused": (c_int, [POINTER(CRowsIn), POINTER(CLinearOut), c_int]),
    "dlb_rows_apply": (c_int, [POINTER(CRowsIn), POINTER(CRowsOut)]),
    "dlb_moe": (c_int, [POINTER(CMoeIn), POINTER(CRowsOut)]),
    "dlb_route": (c_int, [c_void_p, *[c_int64] * 4, c_int32, c_void_p, c_int64, c_void_p, c_int64]),
    "dlb_sigmoid_add": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, *[c_int64] * 3]),
    "dlb_read_all": (c_uint64, [c_void_p, c_int64]),
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, ready to run, or None where there is none (core.native says why).

    The first call selects the ISA that the settings force and starts the thread pool.
    """
    lib = native()
    if lib is None:
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _select(lib, settings().isa)
    start_pool(lib, threads.plan_here())
    return lib


def _isa_names(lib: ctypes.CDLL) -> list[str]:
    return [lib.dlb_isa_name(i).decode() for i in range(lib.dlb_isa_count())]


def _select(lib: ctypes.CDLL, name: str) -> None:
    if name == "auto":
        return
    names = _isa_names(lib)
    able = [n for i, n in enumerate(names) if lib.dlb_isa_supported(i)]
    if name not in names:
        raise UsageError(f"DIST_LOWBIT_ISA is {name!r}; expected auto or one of {', '.join(names)}")
    if lib.dlb_isa_select(names.index(name)) != 0:
        raise UsageError(f"DIST_LOWBIT_ISA is {name!r}, which this CPU lacks; it has {', '.join(able)}")


def start_pool(lib: ctypes.CDLL, plan: threads.ThreadPlan) -> None:
    """Start the pool, or start it anew with another plan. Must not run beside a kernel."""
    cpus = (c_int * len(plan.cpus))(*plan.cpus)
    if lib.dlb_threads_start(plan.count, cpus, len(plan.cpus)) != 0:
        raise UsageError(f"cannot start {plan.count} kernel threads; expected 1 to 1024")


def isas() -> list[tuple[str, bool, bool]]:
    """Return (name, whether this CPU has it, whether it is active) of every ISA in the library, weakest first."""
    lib = library()
    if lib is None:
        return []
    active = lib.dlb_isa_active()
    return [(name, bool(lib.dlb_isa_supported(i)), i == active) for i, name in enumerate(_isa_names(lib))]


def active_isa() -> str | None:
    """Return the name of the ISA that kernels run on, or None where there is no compiled library."""
    return next((name for name, _, active in isas() if active), None)


def select_isa(name: str) -> None:
    """Run all kernels of this process on the named ISA from now on; results stay the same to the bit."""
    lib = library()
    if lib is None:
        raise UsageError("there is no compiled library to select an ISA of")
    _select(lib, name)
