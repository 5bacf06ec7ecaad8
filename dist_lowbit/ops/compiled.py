"""The kernel of the compiled library on x86-64: codes meet int8 or fp32 activations, floats meet fp32."""

from __future__ import annotations

import ctypes

import torch

from dist_lowbit.core.errors import KernelError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.formats import PackedWeight
from dist_lowbit.formats.packed import part_layout

from .codebooks import bad_codes, float_element, integer_table
from .library import CLinearParts, CLinearSpec, library
from .spec import LinearSpec, mismatch
from .weight_memory import weight_memory

_AFFINE, _TABLE, _ELEMENT = range(3)  # enum dlb_codec
_OFFSETS = {"none": 0, "min": 1, "zero_point": 2}
_SCALES = {torch.float16: 0, torch.float32: 1}
_NO_SCALE = 2
_FLOAT8 = {"e5m2": 0, "e4m3": 1}
_CASTS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}
_COMPUTE = {"int8": 0, "fp32": 1}  # enum dlb_compute
_BAD_SHAPE = -4
_REFUSALS = {-1: "the parts do not fit the spec", -2: "the buffer is no prepacked weight", -3: "memory is exhausted"}


def _c_spec(spec: LinearSpec) -> CLinearSpec:
    """Return the spec as the library reads it; a codec of -1 is one that it lacks."""
    row = spec.format
    out = CLinearSpec(n=spec.n, k=spec.k, group_size=spec.group_size, codec=-1, bits=row.bits)
    out.offset, out.scale = _OFFSETS[row.offset], _SCALES.get(row.scale_dtype, -1)
    out.compute = _COMPUTE.get(spec.compute, -1)
    out.cuts[:] = spec.cuts
    table, element = integer_table(row), float_element(row)
    if row.integer:
        out.codec, out.center = _AFFINE, row.center
    elif table is not None:
        out.codec, out.multiplier = _TABLE, table[1]
        out.table[: len(table[0])] = table[0]
        out.values[: len(row.codebook)] = row.codebook
    elif element is not None:
        out.codec, out.element, out.multiplier = _ELEMENT, _FLOAT8[element[0]], element[1]
    elif row.dtype in _CASTS:
        out.codec, out.element, out.scale = _ELEMENT, _CASTS[row.dtype], _NO_SCALE
    return out


def _parts(weight: PackedWeight) -> tuple[CLinearParts, list[torch.Tensor]]:
    """Return pointers to a weight's parts, and the tensors that must live as long as they are used."""
    tensors = {name: tensor.contiguous() for name, tensor in weight.tensors().items()}
    parts = CLinearParts()
    for name, tensor in tensors.items():
        if name in ("values", "plane0"):
            parts.planes[0] = tensor.data_ptr()
        elif name == "plane1":
            parts.planes[1] = tensor.data_ptr()
        elif name == "scale":
            parts.scale = tensor.data_ptr()
        else:
            parts.offset = tensor.data_ptr()
    return parts, list(tensors.values())


def _check(status: int, what: str) -> None:
    if status != 0:
        raise KernelError(f"{what} failed in the compiled kernel: {_REFUSALS.get(status, status)}")


class Compiled:
    """Panels of sixteen rows (kernels/cpu/layout.h), the same for every ISA."""

    name = "cpu"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return why not: no library, another device, or what the library finds wrong with the spec."""
        lib = library()
        if lib is None:
            return native_why_not()
        if spec.device != "cpu":
            return f"it runs on the CPU, not on {spec.device}"
        if spec.compute not in ("int8", "fp32"):
            return f"compute is {spec.compute!r}; expected int8 or fp32"
        c_spec = _c_spec(spec)
        why = lib.dlb_linear_why_not(ctypes.byref(c_spec))
        return None if why is None else why.decode()

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> torch.Tensor:
        """Return header and panels (see Kernel). One pass over the weight on all threads."""
        lib, c_spec = library(), _c_spec(spec)
        if lib is None or weight.shape != (spec.n, spec.k) or weight.format != spec.format:
            raise KernelError(f"a {weight.format.name} weight {weight.shape} does not fit {spec}")
        bad = bad_codes(weight.format)
        if bad and bool(torch.isin(weight.codes(), torch.tensor(bad, dtype=torch.uint8)).any()):
            raise KernelError(f"a {weight.format.name} weight {weight.shape} holds NaN or infinity")
        opaque = weight_memory.empty(lib.dlb_linear_packed_bytes(ctypes.byref(c_spec)))
        parts, alive = _parts(weight)
        _check(lib.dlb_linear_prepack(ctypes.byref(c_spec), ctypes.byref(parts), opaque.data_ptr()), "prepack")
        del alive
        return opaque

    def unpack(self, opaque: torch.Tensor, spec: LinearSpec) -> PackedWeight:
        """Return the weight (see Kernel). One pass on all threads."""
        lib, found = library(), CLinearSpec()
        if lib is None:
            raise KernelError(f"cannot unpack: {native_why_not()}")
        _check(lib.dlb_linear_spec_of(opaque.data_ptr(), opaque.numel(), ctypes.byref(found)), "unpack")
        if bytes(found) != bytes(_c_spec(spec)):
            raise KernelError(f"the buffer holds another weight (N={found.n}, K={found.k}) than {spec}")
        layout = part_layout(spec.format, (spec.n, spec.k), spec.group_size)
        tensors = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in layout.items()}
        weight = PackedWeight.from_tensors(spec.format, (spec.n, spec.k), spec.group_size, tensors)
        parts, _ = _parts(weight)
        _check(lib.dlb_linear_unpack(opaque.data_ptr(), opaque.numel(), ctypes.byref(parts)), "unpack")
        return weight

    def run(self, x: torch.Tensor, opaque: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T into out (see Kernel)."""
        lib = library()
        if lib is None:
            raise KernelError(f"cannot run: {native_why_not()}")
        (m, k), n = x.shape, out.shape[1]
        status = lib.dlb_linear_run(
            opaque.data_ptr(), opaque.numel(), x.data_ptr(), x.stride(0), m, k, out.data_ptr(), out.stride(0), n
        )
        if status == _BAD_SHAPE:
            found = CLinearSpec()
            _check(lib.dlb_linear_spec_of(opaque.data_ptr(), opaque.numel(), ctypes.byref(found)), "linear")
            raise mismatch(found.n, found.k, n, k)
        _check(status, "linear")
