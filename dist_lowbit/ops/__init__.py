"""Floor 2: the front of the kernels. What models call, and what chooses the code that runs.

    spec = LinearSpec.of(weight)                     what is wanted (parallel/ gives the segment ends of a split)
    kernel = choose(spec)                            KernelError with every reason where nothing fits
    packed = kernel.prepack(weight, spec)            uint8, the machine's own layout; kernel.unpack is its inverse
    y = linear(x, packed, kernel.name, spec.n)       torch.ops.dist_lowbit.linear: fp32 [..., N]

`isas`, `active_isa`, `select_isa` and `limit_torch` are for doctor, tests and whoever owns the process.
"""

from .devices import usable_device
from .kernel import KERNELS, choose, kernel, place
from .library import active_isa, isas, library, select_isa
from .linear import linear
from .reference import exact_codes
from .spec import Kernel, LinearSpec, whole_cuts
from .threads import ThreadPlan, limit_torch, plan_here

__all__ = [
    "KERNELS",
    "Kernel",
    "LinearSpec",
    "ThreadPlan",
    "active_isa",
    "choose",
    "exact_codes",
    "isas",
    "kernel",
    "library",
    "limit_torch",
    "linear",
    "place",
    "plan_here",
    "select_isa",
    "usable_device",
    "whole_cuts",
]
