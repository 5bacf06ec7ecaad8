"""What a low-bit model carries for its user: the method that saves it."""

from __future__ import annotations

from functools import partial

from torch import nn

from .save import save_low_bit


def attach(model: nn.Module) -> nn.Module:
    """Give a model its `save_low_bit(directory)`, the call that users of the ancestors write."""
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    return model
