"""The operator torch.ops.dist_lowbit.linear, which tracing and export can see through."""

from __future__ import annotations

import math

import torch

from dist_lowbit.core.errors import UsageError

from .elementwise import forbid_gradient
from .kernel import kernel as kernel_named

_LIBRARY = torch.library.Library("dist_lowbit", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor packed, str kernel, int n) -> Tensor")


def _run(x: torch.Tensor, packed: torch.Tensor, kernel: str, n: int) -> torch.Tensor:
    if not x.is_floating_point():
        raise UsageError(f"x is {x.dtype}; a Linear takes a floating-point tensor")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    out = torch.empty(rows.shape[0], n, dtype=torch.float32, device=x.device)
    kernel_named(kernel).run(rows, packed, out)
    return out.reshape(*x.shape[:-1], n)


def _shape(x: torch.Tensor, packed: torch.Tensor, kernel: str, n: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


_LIBRARY.impl("linear", _run, "CPU")
_LIBRARY.impl("linear", _run, "CUDA")
_LIBRARY.impl("linear", _run, "XPU")
torch.library.register_fake("dist_lowbit::linear", _shape, lib=_LIBRARY)
forbid_gradient("linear", _LIBRARY)


def linear(x: torch.Tensor, packed: torch.Tensor, kernel: str, n: int) -> torch.Tensor:
    """Return fp32 [..., n], the product of x (any float dtype, [..., K]) with a prepacked weight.

    packed: what the named kernel's `prepack` returned. Visible to torch.jit.trace and torch.export. An x of
    another width, or another n, is a UsageError; so is a backward pass.
    """
    out: torch.Tensor = torch.ops.dist_lowbit.linear(x, packed, kernel, n)
    return out
