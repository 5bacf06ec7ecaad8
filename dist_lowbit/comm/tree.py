"""The order of every sum over ranks, defined here and nowhere else.

There are S slots, S = 8, or the next power of two for more than 8 ranks. Rank r of n sits in slot floor(r * S / n).
Neighbouring slots are added level by level, ((0+1)+(2+3))+((4+5)+(6+7)), on fp32; where one of two is empty the other
goes up unchanged. For n a power of two this is ((r0+r1)+(r2+r3))+..., the top of the kernel's tree over the eight
segments of a split Linear, so a sum over 1, 2, 4 or 8 ranks has the same bits. 3 ranks give (r0+r1)+r2.
fp16 and bf16 are widened, added in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_lowbit.core.errors import UsageError

ADD = -1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slots(size: int) -> tuple[int, list[int]]:
    """Return the number of slots and each rank's slot."""
    if size < 1:
        raise UsageError(f"a sum over {size} ranks; expected 1 or more")
    count = 8
    while count < size:
        count *= 2
    return count, [rank * count // size for rank in range(size)]


def postfix(size: int) -> list[int]:
    """Return the order for `size` ranks in postfix: a rank's number, or ADD for "add the last two"."""
    count, places = slots(size)
    level: list[list[int]] = [[] for _ in range(count)]
    for rank, place in enumerate(places):
        level[place] = [rank]
    while len(level) > 1:
        pairs = zip(level[0::2], level[1::2], strict=True)
        level = [left + right + [ADD] if left and right else left + right for left, right in pairs]
    return level[0]


def tree_sum(parts: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of one tensor per rank, in rank order: the bits that every backend gives.

    `parts` are alike in shape and dtype (fp32, bf16, fp16); the result has that dtype and goes to `out` if given,
    which may be one of the parts.
    """
    stack: list[torch.Tensor] = []
    for step in postfix(len(parts)):
        if step == ADD:
            right = stack.pop()
            stack.append(stack.pop() + right)
        else:
            stack.append(parts[step].to(torch.float32))
    total = stack.pop()
    if out is None:
        return total.to(parts[0].dtype, copy=True)
    return out.copy_(total)
