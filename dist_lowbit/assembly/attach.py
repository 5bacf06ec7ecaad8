"""What a low-bit model carries for its user: the methods that save it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dist_lowbit.core.errors import UsageError

from .save import save_low_bit

# Arguments of transformers' save_pretrained that ask for what is done anyway.
_HARMLESS = {"safe_serialization": (True,), "push_to_hub": (False,), "is_main_process": (True, False)}


def attach(model: nn.Module) -> nn.Module:
    """Give a model its `save_low_bit(directory)`, the call that users of the ancestors write.

    A Hugging Face model's `save_pretrained(directory)` does the same from here on: its own would write the packed
    bytes without saying what they mean.
    """
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
    return model


def _save_pretrained(model: nn.Module, save_directory: str | Path, **kwargs: Any) -> None:
    """Save a low-bit model as save_low_bit does. All ranks must call together; unknown arguments are a UsageError."""
    for name, value in kwargs.items():
        if value not in _HARMLESS.get(name, ()):
            raise UsageError(f"save_pretrained of a low-bit model takes a directory only; {name} has no effect")
    save_low_bit(model, save_directory)
