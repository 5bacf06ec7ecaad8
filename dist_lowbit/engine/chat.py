"""A conversation to token ids, by the model's own chat template."""

from __future__ import annotations

from typing import Any

import torch

from dist_lowbit.core.log import logger

from .session import Session


def render(session: Session, messages: list[dict[str, str]]) -> torch.Tensor:
    """Return the token ids [1, S] of a conversation that the model is to answer.

    A tokenizer without a chat template gets the turns one per line. When a quarter of the model's context is no
    longer free, the oldest turns are taken out of `messages`, and a line says so.
    """
    limit = getattr(session.model.config, "max_position_embeddings", None)
    while True:
        ids = _encode(session.tokenizer, messages)
        if limit is None or ids.shape[1] <= limit * 3 // 4 or len(messages) < 3:
            return ids
        logger.warning("the conversation fills the model's %d tokens: its oldest turn is forgotten", limit)
        del messages[:2]


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt").input_ids
    assert isinstance(ids, torch.Tensor)
    return ids.long()
