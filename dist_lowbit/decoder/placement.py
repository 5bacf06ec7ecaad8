"""Move a program to another device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding
from dist_lowbit.parallel.experts import LowBitExperts

from .program import Program, Rope


def placed(program: Program, device: torch.device) -> Program:
    """Return a program whose tensors are on a device.

    Its modules are moved in place, so the model that they belong to moves along. Weights stay packed, in the layout of
    that device's kernel: KernelError where none takes one.
    """
    moved: Program = _placed(program, device)
    return moved


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (LowBitLinear, LowBitExperts)):
        value.place(device)
        return value
    if isinstance(value, ParallelEmbedding):
        return value.to(device)
    if isinstance(value, Rope):  # its tables are made on the cpu
        return value
    if isinstance(value, tuple):
        return tuple(_placed(one, device) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _placed(getattr(value, field.name), device) for field in fields(value)})
    return value
