"""A step and the memory it reads and writes: what every executor takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dist_lowbit.core.errors import UsageError

from .kv_memory import Kind, KvMemory
from .program import Program

BLOCK_SLOTS = 32  # tokens per block of the cache
KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass
class KvStore:
    """Keys and values of all layers in blocks of BLOCK_SLOTS tokens.

    keys[l], values[l]: [blocks, local kv heads, BLOCK_SLOTS, head_dim] in the cache's dtype. int8: one fp16 scale per
    token and head in key_scales[l], value_scales[l] [blocks, kv heads, BLOCK_SLOTS], number = code * scale, scale =
    max|x| / 127 rounded to fp16, codes rounded to nearest even; else empty lists. Keys are stored after rope.
    memory: what holds all of them; they stay where they are as long as the store lives.
    """

    dtype: str
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_scales: list[torch.Tensor]
    value_scales: list[torch.Tensor]
    memory: KvMemory

    @classmethod
    def of(cls, program: Program, blocks: int, dtype: str = "fp32", device: str | torch.device = "cpu") -> KvStore:
        """Allocate a store of `blocks` blocks; an unknown dtype is a UsageError."""
        if dtype not in KV_DTYPES:
            raise UsageError(f"kv_cache_dtype is {dtype!r}; expected one of {', '.join(KV_DTYPES)}")
        rows = [
            (blocks, layer.attention.heads.kv_heads, BLOCK_SLOTS, layer.attention.head_dim) for layer in program.layers
        ]
        kinds: list[Kind] = [(row, KV_DTYPES[dtype]) for row in rows for _ in range(2)]
        if dtype == "int8":
            kinds += [(row[:3], torch.float16) for row in rows for _ in range(2)]
        return cls._over(dtype, KvMemory(kinds, device))

    @classmethod
    def _over(cls, dtype: str, memory: KvMemory) -> KvStore:
        """Return a store over tensors in the order of `tensors`: key and value of each layer, then their scales."""
        count = len(memory.tensors) // (2 if dtype == "int8" else 1)
        numbers, scales = memory.tensors[:count], memory.tensors[count:]
        return cls(dtype, numbers[::2], numbers[1::2], scales[::2], scales[1::2], memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> KvStore:
        """Copy the numbers into memory of the copy's own: a cache that is copied goes on by itself."""
        return self._over(self.dtype, copy.deepcopy(self.memory, memo))

    @property
    def blocks(self) -> int:
        """Return how many blocks there are."""
        return self.keys[0].shape[0] if self.keys else 0

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor of the store; axis 0 of each is the block."""
        return self.memory.tensors

    def grown(self, blocks: int) -> KvStore:
        """Return another store of more blocks whose first ones hold what this one held; this one holds nothing then.

        Tensor by tensor, so that no more than one is there twice.
        """
        old = self.tensors()
        memory = KvMemory([((blocks, *tensor.shape[1:]), tensor.dtype) for tensor in old], old[0].device)
        for index, new in enumerate(memory.tensors):
            new[: old[index].shape[0]].copy_(old[index])
            self.memory.drop(index)
        return self._over(self.dtype, memory)


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
