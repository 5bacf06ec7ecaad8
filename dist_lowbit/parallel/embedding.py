"""The embedding, kept in its stored dtype and cut along the vocabulary."""

from __future__ import annotations

import torch
from torch import nn

from dist_lowbit.comm import Group

from .split import Split


class ParallelEmbedding(nn.Module):
    """Look up token embeddings: integer ids [...] -> `dtype` [..., H].

    weight: this rank's rows [V local, H], kept as stored (fp16 stays fp16) and widened after the lookup. Where the
    vocabulary is cut, a rank contributes zeros for ids that it does not hold and the ranks add up: all must call
    together. One addend of each sum is not zero, so the result is exact. `scale` multiplies the result.
    """

    weight: torch.Tensor
    scale: float = 1.0

    def __init__(self, weight: torch.Tensor, split: Split, group: Group, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = split.shape
        self.split, self.group, self.dtype = split, group, dtype
        # A buffer: a model's dtype, read off its first parameter, is that of the activations.
        self.register_buffer("weight", weight.detach(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids (see the class)."""
        if self.split.tp == 1 or self.split.axis is None:
            return self._scaled(nn.functional.embedding(ids, self.weight).to(self.dtype))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            # As torch refuses it on one rank; here no rank would hold the id, and zeros would be looked up.
            raise IndexError(f"token ids run from {ids.min()} to {ids.max()}; expected 0 to {self.num_embeddings - 1}")
        start, stop = self.split.ranges[self.group.rank][0]
        if stop == start:
            rows = self.weight.new_zeros((*ids.shape, self.embedding_dim), dtype=self.dtype)
        else:
            held = (ids >= start) & (ids < stop)
            local = torch.where(held, ids - start, 0)
            rows = nn.functional.embedding(local, self.weight).to(self.dtype) * held[..., None]
        return self._scaled(self.group.all_reduce(rows))

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.scale == 1.0 else rows * rows.new_tensor(self.scale)

    def extra_repr(self) -> str:
        """Describe the layer in a module's printout."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.weight.shape[0]}"
