"""A step and the memory it reads and writes: what every executor takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dist_lowbit.core.errors import UsageError

from .program import Program

BLOCK_SLOTS = 32  # tokens per block of the cache
KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}

_LISTS = ("keys", "values", "key_scales", "value_scales")


@dataclass
class KvStore:
    """Keys and values of all layers in blocks of BLOCK_SLOTS tokens.

    keys[l], values[l]: [blocks, local kv heads, BLOCK_SLOTS, head_dim] in the cache's dtype. int8: one fp16 scale per
    token and head in key_scales[l], value_scales[l] [blocks, kv heads, BLOCK_SLOTS], number = code * scale, scale =
    max|x| / 127 rounded to fp16, codes rounded to nearest even; else empty lists. Keys are stored after rope.
    """

    dtype: str
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_scales: list[torch.Tensor]
    value_scales: list[torch.Tensor]

    @classmethod
    def of(cls, program: Program, blocks: int, dtype: str = "fp32", device: str | torch.device = "cpu") -> KvStore:
        """Allocate a store of `blocks` blocks; an unknown dtype is a UsageError."""
        if dtype not in KV_DTYPES:
            raise UsageError(f"kv_cache_dtype is {dtype!r}; expected one of {', '.join(KV_DTYPES)}")
        store = cls(dtype, [], [], [], [])
        for layer in program.layers:
            heads, dim = layer.attention.heads.kv_heads, layer.attention.head_dim
            for tensors in (store.keys, store.values):
                tensors.append(torch.zeros(blocks, heads, BLOCK_SLOTS, dim, dtype=KV_DTYPES[dtype], device=device))
            if dtype == "int8":
                for tensors in (store.key_scales, store.value_scales):
                    tensors.append(torch.zeros(blocks, heads, BLOCK_SLOTS, dtype=torch.float16, device=device))
        return store

    @property
    def blocks(self) -> int:
        """Return how many blocks there are."""
        return self.keys[0].shape[0] if self.keys else 0

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor of the store; axis 0 of each is the block."""
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    def grown(self, blocks: int) -> KvStore:
        """Return another store of more blocks whose first ones hold what this one held; this one is empty afterwards.

        Layer by layer, so that no more than one is there twice.
        """
        larger = KvStore(self.dtype, [], [], [], [])
        for name in _LISTS:
            tensors, into = getattr(self, name), getattr(larger, name)
            while tensors:
                old = tensors.pop(0)
                new = old.new_zeros((blocks, *old.shape[1:]))
                new[: old.shape[0]].copy_(old)
                into.append(new)
        return larger


@dataclass(frozen=True)
class Step:
    """R rows of S sequences, packed: sequence s has rows [row_begin[s], row_begin[s + 1]), at least one.

    ids: int32 [R], or embeds: fp32 [R, hidden]. positions: int32 [R], for rope and learned positions. row_begin: int32
    [S + 1]. lengths: int32 [S], tokens of each sequence in the cache when the step is done: its rows take the last
    slots, and row i of n sees the slots up to lengths - n + i. table: int32 [S, blocks], the blocks of each sequence.
    wanted: int64 [W], the rows whose result is asked for, ascending.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    positions: torch.Tensor
    row_begin: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    wanted: torch.Tensor
    store: KvStore


class Executor(Protocol):
    """Runs steps of one program. All ranks of the program's group must call together, with the same rows.

    A step's own tensors lie on the cpu, its store and the result on `device`.
    """

    name: str
    program: Program
    device: torch.device

    @staticmethod
    def why_not(program: Program, store_dtype: str, device: str) -> str | None:
        """Return why this executor does not take a program, as part of a sentence, or None if it does."""
        ...

    def step(self, step: Step, logits: bool) -> torch.Tensor:
        """Run a step and return fp32 [W, vocab] logits, or [W, hidden] after the final norm.

        Writes the step's keys and values into the store. The result is the caller's own.
        """
        ...

    def close(self) -> None:
        """Free what the executor holds; the program stays."""
        ...
