"""The decoder's own loop: sequences in, the most likely tokens out, nothing of Hugging Face between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.decoder.blocks import BlockTables
from dist_lowbit.decoder.step import BLOCK_SLOTS, Step


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
        self._last: Step | None = None  # of one token each, the next one's to be
        self._blocks = BlockTables(backbone.program, backbone.kv_cache_dtype, backbone.device)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Begin anew: run the prompts in one step and return the token that follows each."""
        self._blocks.start(len(prompts))
        self._last = None
        return self._run(self._step_of(prompts))

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to each sequence and return the one that follows it."""
        if self._last is None or self._last.ids is None or len(tokens) != self._last.ids.numel():
            self._last = self._step_of([[token] for token in tokens])
        else:
            self._last = self._moved_on(self._last, self._last.ids, tokens)
        return self._run(self._last)

    def _run(self, step: Step) -> list[int]:
        return most_likely(self._executor.step(step, logits=True))

    def _step_of(self, rows: Sequence[Sequence[int]]) -> Step:
        blocks, positions = self._blocks, list[int]()
        blocks.make_room([len(tokens) for tokens in rows])
        for sequence, tokens in enumerate(rows):
            if not tokens:
                raise UsageError(f"sequence {sequence} is empty; a step takes at least one token of each")
            positions += range(blocks.lengths[sequence], blocks.lengths[sequence] + len(tokens))
            blocks.extend(sequence, len(tokens))
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return Step(
            ids=torch.tensor([token for tokens in rows for token in tokens], dtype=torch.int32),
            embeds=None,
            positions=torch.tensor(positions, dtype=torch.int32),
            row_begin=ends.to(torch.int32),
            lengths=torch.tensor(blocks.lengths, dtype=torch.int32),
            table=blocks.table(range(len(rows))),
            wanted=ends[1:] - 1,
            store=blocks.store,
        )

    def _moved_on(self, step: Step, ids: torch.Tensor, tokens: Sequence[int]) -> Step:
        """Return a step of one token of each sequence moved on to the next ones, in the same tensors.

        Weights push everything else out of the caches, so that each small tensor costs ten times what it costs alone.
        """
        blocks = self._blocks
        for sequence in range(len(tokens)):
            blocks.extend(sequence, 1)
        ids.numpy()[:] = tokens
        step.positions.numpy()[:] += 1
        step.lengths.numpy()[:] += 1
        if blocks.store is step.store and all(length % BLOCK_SLOTS != 1 for length in blocks.lengths):
            return step
        return replace(step, table=blocks.table(range(len(tokens))), store=blocks.store)


def most_likely(logits: torch.Tensor) -> list[int]:
    """Return the first highest of each row of logits [W, vocab]; of NaN, the first NaN."""
    if logits.is_cuda or logits.is_xpu:
        chosen: list[int] = logits.argmax(dim=1).tolist()
        return chosen
    # On the CPU torch looks at one number at a time, numpy at a register full of them.
    return [int(each) for each in logits.numpy().argmax(axis=1)]
