"""A model and its tokenizer on this rank, ready to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from dist_lowbit.assembly.load import load_low_bit
from dist_lowbit.assembly.mode import Mode
from dist_lowbit.assembly.paths import require_checkpoint
from dist_lowbit.assembly.skeleton import class_of, empty_model, read_config
from dist_lowbit.assembly.together import together
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.ops import limit_torch


@dataclass(frozen=True)
class Session:
    """What a rank needs to generate. Close the group when done."""

    model: nn.Module
    tokenizer: Any
    group: Group


def open_session(
    path: str | Path, group: Group, *, trust_remote_code: bool = False, mode: Mode | None = None
) -> Session:
    """Load a low-bit checkpoint with its tokenizer, split over the group, in a mode. All ranks must call together."""
    limit_torch()  # this process is ours: the cores belong to the kernels' own pool
    with together(group):
        directory = require_checkpoint(path)
        config = read_config(directory, trust_remote_code)
        tokenizer = _tokenizer(directory, trust_remote_code)
        model = empty_model(class_of(config), config, directory, trust_remote_code)
    return Session(load_low_bit(model, directory, group=group, mode=mode), tokenizer, group)


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing more specific
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{directory} holds no usable tokenizer: {why}") from error
    # Without files transformers makes one up for some models, which knows no text at all.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(f"{directory} holds no usable tokenizer: copy the files of the model's own there")
    return tokenizer
