"""The activation of an MLP with bits that depend on its input alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import SiLUActivation

from dist_lowbit.ops.elementwise import silu_mul


class FixedSilu(nn.Module):
    """Compute silu(x), elementwise, in fp32 rounded once to the dtype of x (ops.elementwise.silu_mul).

    torch rounds the elements at the end of each thread's share in another way (4% differ, torch 2.13), so its result
    depends on the number of threads, the batch and the split.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return silu(x)."""
        return silu_mul(x, torch.ones_like(x))


def use_activation(model: nn.Module) -> None:
    """Put FixedSilu in the place of each silu of a model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.SiLU, SiLUActivation)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FixedSilu())
