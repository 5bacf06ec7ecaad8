"""The kernels of a Linear in order of preference, and the choice among them."""

from __future__ import annotations

from dist_lowbit.core.errors import KernelError

from .compiled import Compiled
from .reference import Reference
from .spec import Kernel, LinearSpec

KERNELS: tuple[Kernel, ...] = (Compiled(), Reference())


def choose(spec: LinearSpec) -> Kernel:
    """Return the first kernel that takes `spec`; a KernelError with every kernel's reason if none does."""
    reasons = []
    for candidate in KERNELS:
        why = candidate.why_not(spec)
        if why is None:
            return candidate
        reasons.append(f"{candidate.name}: {why}")
    raise KernelError(f"no kernel takes a {spec.format.name} Linear of N={spec.n}, K={spec.k}: " + "; ".join(reasons))


def kernel(name: str) -> Kernel:
    """Return the kernel of that name; a KernelError lists the names."""
    for candidate in KERNELS:
        if candidate.name == name:
            return candidate
    names = ", ".join(candidate.name for candidate in KERNELS)
    raise KernelError(f"unknown kernel {name!r}; expected one of {names}")
