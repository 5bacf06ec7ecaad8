"""What a low-bit model carries for its user: the methods that save it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.agree import input_of

from .build import state_of
from .save import save_low_bit

# Arguments of transformers' save_pretrained that ask for what is done anyway.
_HARMLESS = {"safe_serialization": (True,), "push_to_hub": (False,), "is_main_process": (True, False)}


def attach(model: nn.Module) -> nn.Module:
    """Give a model its `save_low_bit(directory)`, the call that users of the ancestors write.

    A Hugging Face model's `save_pretrained(directory)` does the same from here on: its own would write the packed
    bytes without saying what they mean. Embedding and head are cut and packed, so `resize_token_embeddings` and
    the setters of both are a UsageError: the decoder would go on with the old ones. Calls of a causal language model
    of a known family are looked at first (see check_call).
    """
    state = state_of(model)
    if state is not None and state.target.family is not None:
        model.register_forward_pre_hook(check_call, with_kwargs=True)
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
    if hasattr(type(model), "resize_token_embeddings"):
        model.resize_token_embeddings = partial(_resize_token_embeddings, model)  # type: ignore[assignment]
        for name in ("set_input_embeddings", "set_output_embeddings"):
            setattr(model, name, partial(_refuse_another, name))
    return model


def check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call in training mode, or with labels that are not one integer for each token of the input.

    A hook that torch calls before a causal language model's forward.
    """
    if model.training:
        raise UsageError("this model is in training mode, and low-bit weights are for inference; call model.eval()")
    labels, keep, given = kwargs.get("labels"), kwargs.get("logits_to_keep"), input_of(args, kwargs)
    some = isinstance(keep, torch.Tensor) or bool(keep) or kwargs.get("shift_labels") is not None
    if labels is None or some or not isinstance(given, torch.Tensor):  # labels of a part, or an error of another's
        return
    if not isinstance(labels, torch.Tensor):
        raise UsageError(f"labels is a {type(labels).__name__}; expected a torch.Tensor")
    expected = given.shape[:2]
    one_row = given.dim() > 1 and expected[0] == 1 and labels.shape == expected[1:]
    if labels.dtype != torch.int64 or (labels.shape != expected and not one_row):
        raise UsageError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; expected torch.int64 of shape {list(expected)}: "
            "one for each token of the input, -100 where none is to be scored"
        )


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
