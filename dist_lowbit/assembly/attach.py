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
    bytes without saying what they mean. Embedding and head are cut and packed, so `resize_token_embeddings` and
    the setters of both are a UsageError: the decoder would go on with the old ones.
    """
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
    if hasattr(type(model), "resize_token_embeddings"):
        model.resize_token_embeddings = partial(_resize_token_embeddings, model)  # type: ignore[assignment]
        for name in ("set_input_embeddings", "set_output_embeddings"):
            setattr(model, name, partial(_refuse_another, name))
    return model


def _save_pretrained(model: nn.Module, save_directory: str | Path, **kwargs: Any) -> None:
    """Save a low-bit model as save_low_bit does. All ranks must call together; unknown arguments are a UsageError."""
    for name, value in kwargs.items():
        if value not in _HARMLESS.get(name, ()):
            raise UsageError(f"save_pretrained of a low-bit model takes a directory only; {name} has no effect")
    save_low_bit(model, save_directory)


def _resize_token_embeddings(
    model: nn.Module, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs: Any
) -> nn.Module:
    """Return the embedding where its size stays what it is; another size is a UsageError."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = embedding.num_embeddings
    if pad_to_multiple_of is not None or new_num_tokens not in (None, size):
        raise UsageError(
            f"a low-bit model keeps its {size} token embeddings, and resize_token_embeddings asks for "
            f"{size if new_num_tokens is None else new_num_tokens}, padded to a multiple of {pad_to_multiple_of or 1}; "
            "resize the original model, save it, and quantize that"
        )
    found: nn.Module = embedding
    return found


def _refuse_another(name: str, *args: Any, **kwargs: Any) -> None:
    raise UsageError(f"{name} has no effect on a low-bit model; change the original model, save it, and quantize that")
