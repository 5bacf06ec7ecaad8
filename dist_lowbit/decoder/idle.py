"""The attention of a rank that holds no head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class IdleAttention(nn.Module):
    """Stand in for an attention module whose heads all lie on other ranks: takes part in the sum, adds nothing.

    Hugging Face's forward cannot run on zero heads. `o_proj` (its K is 0 here) keeps the sum over the ranks whole; a
    cache, where there is one, is given one head of zeros, since positions are counted by its length. The other modules
    stay under their names, unused: a rank saves what it owns of them, such as the norms of q and k.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.layer_idx, self.head_dim = int(module.layer_idx), int(module.head_dim)  # type: ignore[arg-type]

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Return this rank's share of the attention output [B, M, H], summed over the ranks."""
        batch, rows = hidden_states.shape[:2]
        if past_key_values is not None:
            zeros = hidden_states.new_zeros((batch, 1, rows, self.head_dim))
            past_key_values.update(zeros, zeros, self.layer_idx)
        nothing = hidden_states.new_empty((batch, rows, 0))
        return self.o_proj(nothing), None  # type: ignore[operator]
