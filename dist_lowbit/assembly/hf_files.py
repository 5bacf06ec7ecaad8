"""Hugging Face's own files beside lowbit.json: config, generation config, tokenizer, and a stub for its loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from dist_lowbit.core.errors import UsageError
from dist_lowbit.quantize import Recipe

from .mode import dtype_name
from .paths import STUB, refuse_target

QUANT_METHOD = "dist_lowbit"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


def check_target(directory: Path) -> None:
    """Create a directory to save into; one that cannot be, or holds another model's weights, is a UsageError."""
    refuse_target(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot make the directory {directory} to save into: {why}; choose another place") from error


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """Return what config.json says of the quantization, for Hugging Face's registry."""
    return {"quant_method": QUANT_METHOD, "low_bit": recipe.format, "group_size": recipe.group_size}


def write_stub(directory: Path, weight: str) -> None:
    """Write the weight file that transformers looks for.

    It holds nothing but one of the model's names with no elements: without dist_lowbit, loading stops at its shape
    instead of going on with random weights.
    """
    nothing = {weight: torch.empty(0)}
    (directory / STUB).write_bytes(save(nothing, metadata={"format": "pt", "weights": "see lowbit.json"}))


def write_hf_files(
    model: nn.Module, directory: Path, recipe: Recipe, weight: str, dtype: torch.dtype, source: Path | None = None
) -> None:
    """Write config, generation config and stub of a Hugging Face model, and copy its tokenizer where it is known.

    weight: the name of a weight that lowbit.json holds. dtype: of activations, unless a loader asks for another.
    source: the directory the model came from (None: the one its config names, if that is one).
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    values = config.to_dict()
    values["quantization_config"] = quantization_config(recipe)
    values["tie_word_embeddings"] = False
    values["dtype"] = dtype_name(dtype)
    values.setdefault("architectures", None)
    values["architectures"] = values["architectures"] or [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    write_stub(directory, weight)
    origin = source or Path(getattr(config, "_name_or_path", "") or "/nonexistent")
    if origin.is_dir() and origin.resolve() != directory.resolve():
        copy_tokenizer(origin, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files, and the model's own Python files, which are not run here."""
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name in _TOKENIZER_FILES or path.suffix == ".py"):
            shutil.copyfile(path, directory / path.name)
