"""Routed experts: stacked matrices, each expert packed by itself, the weighted sum formed before the ranks add."""

from __future__ import annotations

import torch
from torch import nn

from dist_lowbit import ops
from dist_lowbit.comm import Group
from dist_lowbit.formats import PackedWeight
from dist_lowbit.formats.packed import merge

from .split import Split


def _packed(weight: PackedWeight, experts: int, spec: ops.LinearSpec, kernel: ops.Kernel) -> torch.Tensor:
    """Return uint8 [experts, bytes]: every expert's rows of a stacked weight, prepacked alone."""
    return torch.stack([kernel.prepack(weight.split(0, e * spec.n, (e + 1) * spec.n), spec) for e in range(experts)])


class ExpertStack(nn.Module):
    """One matrix of every expert: stacked to (E * N, K) for quantizing, cutting and storing, packed one by one.

    packed: uint8 [E, bytes], row e for expert e; spec: of one expert's local part.
    """

    packed: torch.Tensor

    def __init__(self, weight: PackedWeight, experts: int, split: Split, group: Group, compute: str = "int8") -> None:
        """weight: this rank's part of the stack, (E * N local, K local)."""
        super().__init__()
        self.experts, self.split, self.group = experts, split, group
        self.format, self.group_size = weight.format.name, weight.group_size
        rows, k = weight.shape
        self.spec = ops.LinearSpec(
            weight.format, rows // experts, k, weight.group_size, split.cuts(group.rank), compute
        )
        kernel = ops.choose(self.spec)
        self.kernel = kernel.name
        self.register_buffer("packed", _packed(weight, experts, self.spec, kernel), persistent=False)

    def unpack(self) -> PackedWeight:
        """Return this rank's stacked weight in its portable form, exactly as it was given."""
        kernel = ops.kernel(self.kernel)
        return merge([kernel.unpack(row, self.spec) for row in self.packed], 0)

    def extra_repr(self) -> str:
        """Describe the stack in a module's printout."""
        return (
            f"experts={self.experts}, in={self.spec.k}, out={self.spec.n}, format={self.format}, kernel={self.kernel}"
        )


class LowBitExperts(nn.Module):
    """Stand in for the experts module of a Hugging Face MoE: the same arguments, low-bit weights, split over the ranks.

    gate_up_proj: each expert's [gate | up] rows; down_proj: its outputs, K cut at the segments. All ranks of the group
    must call together.
    """

    def __init__(self, gate_up_proj: ExpertStack, down_proj: ExpertStack, activation: str, top_k: int) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.activation, self.top_k = activation, top_k
