"""The kernel of the compiled library: integer formats on x86-64, activations rounded to int8 per block."""

from __future__ import annotations

import ctypes

import torch

from dist_lowbit.core.errors import KernelError
from dist_lowbit.core.native import native_why_not
from dist_lowbit.formats import PackedWeight
from dist_lowbit.formats.packed import part_layout

from .library import CLinearParts, CLinearSpec, library
from .spec import LinearSpec

_OFFSETS = {"none": 0, "min": 1, "zero_point": 2}
_SCALES = {torch.float16: 0, torch.float32: 1}
_REFUSALS = {-1: "the parts do not fit the spec", -2: "the buffer is no prepacked weight", -3: "memory is exhausted"}


def _c_spec(spec: LinearSpec) -> CLinearSpec:
    row = spec.format
    out = CLinearSpec(n=spec.n, k=spec.k, group_size=spec.group_size, bits=row.bits, center=row.center)
    out.offset, out.scale = _OFFSETS[row.offset], _SCALES.get(row.scale_dtype, -1)
    out.cuts[:] = spec.cuts
    return out


def _parts(weight: PackedWeight) -> tuple[CLinearParts, list[torch.Tensor]]:
    """Return pointers to a weight's parts, and the tensors that must live as long as they are used."""
    tensors = {name: tensor.contiguous() for name, tensor in weight.tensors().items()}
    parts = CLinearParts(scale=tensors["scale"].data_ptr())
    for i in range(len(weight.format.planes)):
        parts.planes[i] = tensors[f"plane{i}"].data_ptr()
    for name in ("min", "zero_point"):
        if name in tensors:
            parts.offset = tensors[name].data_ptr()
    return parts, list(tensors.values())


def _check(status: int, what: str) -> None:
    if status != 0:
        raise KernelError(f"{what} failed in the compiled kernel: {_REFUSALS.get(status, status)}")


class Compiled:
    """Panels of sixteen rows (kernels/cpu/layout.h), the same for every ISA."""

    name = "cpu"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return why not: no library, another device, fp32 activations, or a format that is not integers."""
        lib = library()
        if lib is None:
            return native_why_not()
        if spec.device != "cpu":
            return f"it runs on the CPU, not on {spec.device}"
        if spec.compute != "int8":
            return f"it rounds activations to int8, and {spec.compute} was asked for"
        if not spec.format.integer:
            return f"it takes integer formats, and {spec.format.name} is a {spec.format.codec}"
        why = lib.dlb_linear_why_not(ctypes.byref(_c_spec(spec)))
        return None if why is None else why.decode()

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> torch.Tensor:
        """Return header and panels (see Kernel). One pass over the weight on all threads."""
        lib, c_spec = library(), _c_spec(spec)
        if lib is None or weight.shape != (spec.n, spec.k) or weight.format != spec.format:
            raise KernelError(f"a {weight.format.name} weight {weight.shape} does not fit {spec}")
        opaque = torch.empty(lib.dlb_linear_packed_bytes(ctypes.byref(c_spec)), dtype=torch.uint8)
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
        status = lib.dlb_linear_run(
            opaque.data_ptr(), opaque.numel(), x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr(), out.stride(0)
        )
        _check(status, "linear")
