"""Whether the ranks of a model were called with the same input."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError


def check_same_input(group: Group, *inputs: Any) -> None:
    """Raise a UsageError on every rank unless all were called with the same tensors (ids, embeddings, masks).

    Each rank has a part of every sum, so different tokens would mix two texts into one that is neither, and nobody
    would notice: ranks that draw samples without a common seed do. All ranks call together. Cost: one gather of 8
    bytes for each.
    """
    if group.size == 1:
        return
    sums = [_sum_of(each) if isinstance(each, torch.Tensor) else -1 for each in inputs]
    told = torch.tensor(sums, dtype=torch.int64, device="cpu")
    everyone = group.all_gather(told[None], dim=0, sizes=[1] * group.size)
    other = [rank for rank in range(group.size) if not torch.equal(everyone[rank], everyone[0])]
    if other:
        raise UsageError(
            f"rank {other[0]} was called with other tokens than rank 0; give all ranks the same input, and before they "
            "draw samples the same seed (torch.manual_seed with one number)"
        )


def check_every_call(module: nn.Module, group: Group) -> None:
    """Let every call of a module begin with check_same_input, for forwards that are not ours over cut modules.

    Looks at the first argument (or input_ids, or inputs_embeds) and attention_mask. A torch hook, so that no method is
    replaced. All ranks of the group call the module together. Cost: that of check_same_input, a call.
    """
    if group.size > 1:
        module.register_forward_pre_hook(_SameInput(group), with_kwargs=True)


class _SameInput:
    """The hook of check_every_call. A copied module's goes on with the same group, which is never copied."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_same_input(self._group, input_of(args, kwargs), kwargs.get("attention_mask"))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what Hugging Face's models are called with: ids first, or by name, or embeddings in their place."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _sum_of(tensor: torch.Tensor) -> int:
    """Return a checksum of shape, dtype and numbers."""
    whole = tensor.detach().cpu().contiguous()
    start = zlib.crc32(f"{whole.dtype} {tuple(whole.shape)}".encode())
    return zlib.crc32(whole.view(torch.uint8).numpy().tobytes(), start) if whole.numel() else start
