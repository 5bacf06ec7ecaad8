"""Kernels of devices other than the cpu, made of torch operators. Activations are not rounded to int8 there."""

from __future__ import annotations

from dataclasses import replace

import torch

from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.formats import PackedWeight, dequantize

from .reference import Reference
from .spec import LinearSpec, mismatch

_TILE = 1 << 25  # weights that are dequantized at a time
_KINDS = ("cuda", "xpu")  # what torch.ops.dist_lowbit.linear is registered for, beside the cpu


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; a UsageError says which ones torch has here, if it is none of them."""
    found = {kind: getattr(torch, kind).device_count() for kind in _KINDS if getattr(torch, kind).is_available()}
    have = ", ".join(["cpu", *(kind if count == 1 else f"{kind}:0 to {count - 1}" for kind, count in found.items())])
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        sentence = f"device is {name!r}; torch {torch.__version__} has {have} here"
        raise UsageError(sentence, argument="device") from error
    if device.type != "cpu" and (device.index or 0) >= found.get(device.type, 0):
        raise UsageError(
            f"device is {str(device)!r}, and torch {torch.__version__} has {have} here; "
            "install a torch for it, see that its driver shows it, or leave it out",
            argument="device",
        )
    return device


class Dequantized(Reference):
    """Takes every format on every device but the cpu: dequantizes a tile of rows, multiplies in fp32, drops it."""

    name = "dequantized"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return why not: the cpu has kernels of its own, whose bits are fixed."""
        return "it is for devices other than the CPU" if spec.device == "cpu" else super().why_not(spec)

    def run(self, x: torch.Tensor, opaque: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T into out (see Kernel)."""
        weight, _ = self._open(opaque)
        n, k = weight.shape
        if (n, k) != (out.shape[1], x.shape[1]):
            raise mismatch(n, k, out.shape[1], x.shape[1])
        step = max(1, _TILE // max(k, 1))
        for start in range(0, n, step):
            stop = min(start + step, n)
            out[:, start:stop] = x @ dequantize(weight.split(0, start, stop)).T


class XpuInt4:
    """torch's own int4 product on Intel GPUs, aten::_weight_int4pack_mm_with_scales_and_zeros (oneDNN).

    It takes x and scales in fp16, nibbles [N, K / 8] as int32 (lowest first), scales [K / G, N] and zero points int8
    [K / G, N], and computes x ((nibble - zero) scale)^T. Nothing here has run on such a GPU.
    """

    name = "xpu_int4"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return why not: another device, other codes, or sizes that the operator does not take."""
        if spec.device != "xpu":
            return f"it runs on xpu, not on {spec.device}"
        row = spec.format
        if row.codec != "affine" or row.planes != (4,) or row.offset == "min":
            return f"{row.name} is no 4-bit integer with a zero point"
        if spec.group_size < 32 or spec.group_size % 32:
            return f"it takes groups of multiples of 32, not of {spec.group_size}"
        if spec.n == 0 or spec.k == 0 or spec.k % spec.group_size:
            return f"K = {spec.k} is no multiple of the group ({spec.group_size})"
        return None

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> torch.Tensor:
        """Return nibbles, scales and zero points, one after the other (see Kernel)."""
        if weight.shape != (spec.n, spec.k) or weight.format != spec.format:
            raise KernelError(f"a {weight.format.name} weight {weight.shape} does not fit {spec}")
        parts = weight.tensors()
        scale = parts["scale"].t().contiguous()
        zero = parts.get("zero_point")
        zeros = torch.full_like(scale, spec.format.center) if zero is None else zero.t()
        pieces = (parts["plane0"], scale, zeros.to(torch.int8).contiguous())
        return torch.cat([piece.contiguous().reshape(-1).view(torch.uint8) for piece in pieces])

    def _open(self, opaque: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the nibbles uint8 [N, K / 2], scales fp16 [K / G, N] and zero points int8 [K / G, N]."""
        codes = n * k // 2
        groups, left = divmod(opaque.numel() - codes, 3 * max(n, 1))
        if left or groups < 1 or k % groups:
            raise KernelError(f"the buffer of {opaque.numel()} bytes holds no weight ({n}, {k}) of this kernel")
        scale_end = codes + 2 * n * groups
        scale = opaque[codes:scale_end].view(torch.float16).reshape(groups, n)
        return opaque[:codes].reshape(n, k // 2), scale, opaque[scale_end:].view(torch.int8).reshape(groups, n)

    def unpack(self, opaque: torch.Tensor, spec: LinearSpec) -> PackedWeight:
        """Return the weight as copies (see Kernel)."""
        codes, scale, zeros = self._open(opaque, spec.n, spec.k)
        symmetric = spec.format.offset == "none"
        if self.why_not(replace(spec, device="xpu")) or (symmetric and bool((zeros != spec.format.center).any())):
            raise KernelError(f"the buffer holds another weight than that of {spec}")
        parts = {"plane0": codes.clone(), "scale": scale.t().contiguous()}
        if spec.format.offset == "zero_point":
            parts["zero_point"] = zeros.t().contiguous().to(torch.uint8)
        return PackedWeight.from_tensors(spec.format, (spec.n, spec.k), spec.group_size, parts)

    def run(self, x: torch.Tensor, opaque: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T into out (see Kernel); x is rounded to fp16."""
        n, k = out.shape[1], x.shape[1]
        codes, scale, zeros = self._open(opaque, n, k)
        product = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros
        out.copy_(product(x.half().contiguous(), codes.view(torch.int32), k // scale.shape[0], scale, zeros))
