"""Routed experts: stacked matrices, each expert packed by itself, the weighted sum formed before the ranks add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dist_lowbit import ops
from dist_lowbit.comm import Group
from dist_lowbit.formats import PackedWeight
from dist_lowbit.formats.packed import merge
from dist_lowbit.ops import reference
from dist_lowbit.ops.elementwise import gated
from dist_lowbit.ops.fused import Expert, Finish, moe, moe_tree

from .linear import LowBitLinear
from .split import Split

_NATIVE = "cpu"  # the kernel whose weights the compiled sum over experts takes


def _packed(weight: PackedWeight, experts: int, spec: ops.LinearSpec, kernel: ops.Kernel) -> torch.Tensor:
    """Return uint8 [experts, bytes]: every expert's rows of a stacked weight, prepacked alone."""
    packed = torch.empty(0, 0, dtype=torch.uint8, device="cpu")
    for expert in range(experts):
        own = kernel.prepack(weight.split(0, expert * spec.n, (expert + 1) * spec.n), spec)
        if expert == 0:
            packed = own.new_empty(experts, own.numel())
        packed[expert] = own
    return packed


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

    def expert(self, index: int) -> PackedWeight:
        """Return one expert's local part in its portable form."""
        return ops.kernel(self.kernel).unpack(self.packed[index], self.spec)

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T of one expert's local part, in fp32."""
        return ops.linear(x, self.packed[index], self.kernel, self.spec.n)

    def place(self, device: torch.device) -> None:
        """Move the stack to a device (see LowBitLinear.place), expert by expert."""
        spec, kernel, packed = self.spec, self.kernel, self.packed.new_empty(0)
        for index in range(self.experts):
            spec, kernel, own = ops.place(self.expert(index), self.spec, device)
            if index == 0:
                packed = own.new_empty(self.experts, own.numel())
            packed[index] = own
        self.spec, self.kernel, self.packed = spec, kernel, packed

    def unpack(self) -> PackedWeight:
        """Return this rank's stacked weight in its portable form, exactly as it was given."""
        return merge([self.expert(index) for index in range(self.experts)], 0)

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

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of each row's experts, [M, N] in the dtype of the rows [M, K].

        top_k_index, top_k_weights: [M, slots], each expert at most once in a row.
        """
        y = self.weighted_sum(hidden_states.float(), top_k_index.to(torch.int32), top_k_weights.float())
        return y.to(hidden_states.dtype)

    def weighted_sum(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, last: Sequence[LowBitLinear] = ()
    ) -> torch.Tensor:
        """Return the sum in fp32 (see forward), formed inside the segments before the ranks add.

        last: gate, up and down (or gate_up and down) of a shared expert, number `experts` in ids.
        """
        kernels = {self.gate_up_proj.kernel, self.down_proj.kernel, *(linear.kernel for linear in last)}
        return self.summed(
            self._native(x, ids, weights, last) if kernels == {_NATIVE} else self._plain(x, ids, weights, last)
        )

    def summed(self, y: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of each one's part."""
        return self.down_proj.group.all_reduce(y) if self.down_proj.split.reduce else y

    def place(self, device: torch.device) -> None:
        """Move both stacks to a device (see LowBitLinear.place)."""
        self.gate_up_proj.place(device)
        self.down_proj.place(device)

    def _native(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, last: Sequence[LowBitLinear]
    ) -> torch.Tensor:
        experts = [Expert(*pair) for pair in zip(self.gate_up_proj.packed, self.down_proj.packed, strict=True)]
        if last:
            experts.append(Expert(last[0].packed, last[-1].packed, last[1].packed if len(last) == 3 else None))
        rows = x if x.stride(-1) == 1 else x.contiguous()
        return moe(rows, experts, ids, weights, self.activation, self.down_proj.spec.n, Finish())

    def _plain(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, last: Sequence[LowBitLinear]
    ) -> torch.Tensor:
        """Compute every expert for every row by the definition."""
        up, down = self.gate_up_proj, self.down_proj
        products = [
            self._segments(x, [(up.expert(e), up.spec)], (down.expert(e), down.spec)) for e in range(down.experts)
        ]
        if last:
            parts = [(linear.unpack(), linear.spec) for linear in last]
            products.append(self._segments(x, parts[:-1], parts[-1]))
        if all(part is None for product in products for part in product):
            return x.new_zeros(x.shape[0], down.spec.n)  # this rank holds no part of any expert
        return moe_tree(products, ids, weights)

    def _segments(
        self,
        x: torch.Tensor,
        ups: Sequence[tuple[PackedWeight, ops.LinearSpec]],
        down: tuple[PackedWeight, ops.LinearSpec],
    ) -> reference.Segments:
        rows = torch.cat([reference.linear(x, weight, spec.cuts, spec.compute) for weight, spec in ups], -1)
        gate, up = rows.chunk(2, -1)
        weight, spec = down
        return reference.segments(
            gated(gate.contiguous(), up.contiguous(), self.activation), weight, spec.cuts, spec.compute
        )
