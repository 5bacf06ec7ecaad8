"""Which blocks of a KvStore hold which sequence: tables, shared blocks, copies before a shared block is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .program import Program
from .step import BLOCK_SLOTS, KvStore

FIRST_BLOCKS = 4  # 128 tokens: with 7 10^9 weights and fp32 keys a block takes 32 MiB


class BlockTables:
    """The sequences of one batch over one store, which grows by half when its blocks run out.

    The store lies on `device`, the tables on the cpu. Sequences may share blocks (beams, repeats): a block is copied
    before one of them writes into it. lengths[s]: the tokens that sequence s has in the cache. Not safe for use by
    several threads.
    """

    def __init__(self, program: Program, dtype: str, device: str | torch.device = "cpu") -> None:
        self.store = KvStore.of(program, 0, dtype, device)
        self.lengths: list[int] = []
        self._tables: list[list[int]] = []
        self._users: list[int] = []  # per block
        self._free: list[int] = []

    def start(self, sequences: int) -> None:
        """Begin anew with so many empty sequences; the store keeps its blocks."""
        self.lengths, self._tables = [0] * sequences, [[] for _ in range(sequences)]
        self._users = [0] * self.store.blocks
        self._free = list(range(self.store.blocks - 1, -1, -1))

    def make_room(self, tokens: Sequence[int]) -> None:
        """Have blocks for so many more tokens of each sequence, growing once for all of them; without memory for them
        nothing has changed."""
        tables = zip(tokens, self.lengths, self._tables, strict=True)
        self._reserve(sum(max(0, -(-(length + more) // BLOCK_SLOTS) - len(table)) for more, length, table in tables))

    def extend(self, sequence: int, tokens: int) -> None:
        """Make room for `tokens` more of a sequence, in blocks that are its own, and count them."""
        table, start = self._tables[sequence], self.lengths[sequence]
        stop = start + tokens
        if tokens and start % BLOCK_SLOTS and self._users[table[start // BLOCK_SLOTS]] > 1:
            self._own(table, start // BLOCK_SLOTS)
        more = -(-stop // BLOCK_SLOTS) - len(table)
        self._reserve(more)
        table += [self._take() for _ in range(more)]
        self.lengths[sequence] = stop

    def shorten(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        table = self._tables[sequence]
        while len(table) * BLOCK_SLOTS >= length + BLOCK_SLOTS:
            self._drop(table.pop())
        self.lengths[sequence] = length

    def choose(self, sequences: Sequence[int]) -> None:
        """Go on with these sequences, in this order; one that is named twice is shared until it is written."""
        tables = [list(self._tables[s]) for s in sequences]
        for table in tables:
            for block in table:
                self._users[block] += 1
        for table in self._tables:
            for block in table:
                self._drop(block)
        self.lengths, self._tables = [self.lengths[s] for s in sequences], tables

    def table(self, sequences: Sequence[int]) -> torch.Tensor:
        """Return the block table of some sequences: int32 [S, longest], 0 beyond a sequence's own."""
        chosen = [self._tables[s] for s in sequences]
        longest = max((len(table) for table in chosen), default=0)
        return torch.tensor([table + [0] * (longest - len(table)) for table in chosen], dtype=torch.int32, device="cpu")

    def slots(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the tokens of a sequence lie: block and slot of each, int64 [length]."""
        at = torch.arange(self.lengths[sequence], device="cpu")
        table = torch.tensor(self._tables[sequence], dtype=torch.int64, device="cpu")
        return table[at // BLOCK_SLOTS], at % BLOCK_SLOTS

    def _own(self, table: list[int], index: int) -> None:
        old, new = table[index], self._take()
        for tensors in self.store.tensors():
            tensors[new].copy_(tensors[old])
        self._drop(old)
        table[index] = new

    def _reserve(self, blocks: int) -> None:
        """Let so many blocks be free, growing by half at least and at most once: all keys are copied."""
        missing, have = blocks - len(self._free), self.store.blocks
        if missing > 0:
            want = max(FIRST_BLOCKS, (have + missing) * 3 // 2)  # a prompt is followed by more
            self.store = self.store.grown(want)
            self._users += [0] * (want - have)
            self._free = list(range(want - 1, have - 1, -1)) + self._free

    def _take(self) -> int:
        self._reserve(1)
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free.append(block)
