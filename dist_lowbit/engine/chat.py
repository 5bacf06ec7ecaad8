"""A conversation to token ids, by the model's own chat template."""

from __future__ import annotations

from typing import Any

import torch


def render(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """Return the token ids [1, S] of a conversation that the model is to answer.

    A tokenizer without a chat template gets the turns one per line.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt").input_ids
    assert isinstance(ids, torch.Tensor)
    return ids.long()
