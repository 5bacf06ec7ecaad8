"""The decoder's own loop: sequences in, the most likely tokens out, nothing of Hugging Face between two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.decoder.blocks import BlockTables
from dist_lowbit.decoder.step import Step


def backbone_of(model: nn.Module) -> FusedBackbone:
    """Return the fused backbone of a model; a UsageError where Hugging Face's forward runs it."""
    for module in model.modules():
        if isinstance(module, FusedBackbone):
            return module
    raise UsageError(f"{type(model).__name__} does not run on the fused decoder; load it with optimize_llm=True")


class DecodeLoop:
    """A batch of sequences that grow together, one token a step, each by its most likely token.

    All ranks must call together. The cache lives as long as the loop; `start` forgets it.
    """

    def __init__(self, backbone: FusedBackbone) -> None:
        self._executor = backbone.executor
        self._blocks = BlockTables(backbone.program, backbone.kv_cache_dtype, backbone.device)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Begin anew: run the prompts in one step and return the token that follows each."""
        self._blocks.start(len(prompts))
        return self._step(prompts)

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to each sequence and return the one that follows it."""
        return self._step([[token] for token in tokens])

    def _step(self, rows: Sequence[Sequence[int]]) -> list[int]:
        blocks, positions = self._blocks, list[int]()
        for sequence, tokens in enumerate(rows):
            if not tokens:
                raise UsageError(f"sequence {sequence} is empty; a step takes at least one token of each")
            positions += range(blocks.lengths[sequence], blocks.lengths[sequence] + len(tokens))
            blocks.extend(sequence, len(tokens))
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
        step = Step(
            ids=torch.tensor([token for tokens in rows for token in tokens], dtype=torch.int32),
            embeds=None,
            positions=torch.tensor(positions, dtype=torch.int32),
            row_begin=ends.to(torch.int32),
            lengths=torch.tensor(blocks.lengths, dtype=torch.int32),
            table=blocks.table(range(len(rows))),
            wanted=ends[1:] - 1,
            store=blocks.store,
        )
        chosen: list[int] = self._executor.step(step, logits=True).argmax(dim=1).tolist()
        return chosen
