"""The kernels of a Linear in order of preference, and the choice among them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from dist_lowbit.core.errors import KernelError
from dist_lowbit.core.log import logger
from dist_lowbit.formats import PackedWeight

from .compiled import Compiled
from .devices import Dequantized, XpuInt4
from .reference import Reference
from .spec import Kernel, LinearSpec

KERNELS: tuple[Kernel, ...] = (Compiled(), XpuInt4(), Dequantized(), Reference())


def choose(spec: LinearSpec) -> Kernel:
    """Return the first kernel that takes `spec`; a KernelError with every kernel's reason if none does.

    A Linear on the CPU that is left to the reference is slow: a warning says so, once for each reason.
    """
    reasons: list[str] = []
    for candidate in KERNELS:
        why = candidate.why_not(spec)
        if why is None:
            if isinstance(candidate, Reference) and spec.device == "cpu":
                _warn_of_reference(spec.format.name, reasons[0])
            return candidate
        reasons.append(f"{candidate.name}: {why}")
    raise KernelError(f"no kernel takes a {spec.format.name} Linear of N={spec.n}, K={spec.k}: " + "; ".join(reasons))


@cache
def _warn_of_reference(format: str, why: str) -> None:
    """Say once in a process that Linears of a format run without a compiled kernel."""
    logger.warning("a %s Linear runs on the slow reference: %s", format, why)


def kernel(name: str) -> Kernel:
    """Return the kernel of that name; a KernelError lists the names."""
    for candidate in KERNELS:
        if candidate.name == name:
            return candidate
    names = ", ".join(candidate.name for candidate in KERNELS)
    raise KernelError(f"unknown kernel {name!r}; expected one of {names}")


def place(weight: PackedWeight, spec: LinearSpec, device: torch.device) -> tuple[LinearSpec, str, torch.Tensor]:
    """Return the spec, the kernel's name and the prepacked weight of a Linear that moves to a device."""
    there = replace(spec, device=device.type)
    chosen = choose(there)
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    moved = PackedWeight.from_tensors(weight.format, weight.shape, weight.group_size, tensors)
    return there, chosen.name, chosen.prepack(moved, there)
