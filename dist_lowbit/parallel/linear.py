"""The one Linear: product, sum over the ranks where K is cut, bias once, gather where the outputs are joined."""

from __future__ import annotations

import torch
from torch import nn

from dist_lowbit import ops
from dist_lowbit.comm import Group
from dist_lowbit.formats import PackedWeight, dequantize

from .split import Split


class LowBitLinear(nn.Module):
    """Compute y = x W^T + bias with a packed weight, on this rank's part of a split.

    x: float [..., K local]; y: [..., N local, or N where outputs are gathered], in the dtype of x; the product is
    formed in fp32. All ranks of `group` must call together where the split reduces or gathers. The weight is
    prepacked for this machine by the kernel chosen here, at construction: KernelError if none takes it.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        split: Split,
        group: Group,
        compute: str = "int8",
    ) -> None:
        """weight, bias: this rank's part (bias: of N; whole where the split reduces). compute: "int8" or "fp32"."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.group_size = weight.format.name, weight.group_size
        self.split, self.group = split, group
        self._widths = [split.local_shape(rank)[0] for rank in range(split.tp)]  # known, so not exchanged at each call
        self.spec = ops.LinearSpec(
            format=weight.format,
            n=weight.shape[0],
            k=weight.shape[1],
            group_size=weight.group_size,
            cuts=split.cuts(group.rank),
            compute=compute,
        )
        kernel = ops.choose(self.spec)
        self.kernel = kernel.name
        # Not persistent: the layout is this machine's own, the portable form is written by save_low_bit.
        self.register_buffer("packed", kernel.prepack(weight, self.spec), persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def unpack(self) -> PackedWeight:
        """Return this rank's weight in its portable form, exactly as it was given."""
        return ops.kernel(self.kernel).unpack(self.packed, self.spec)

    def place(self, device: torch.device) -> None:
        """Move the weight to a device, in the layout of a kernel that runs there; KernelError where none takes it."""
        self.spec, self.kernel, self.packed = ops.place(self.unpack(), self.spec, device)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.to(device), requires_grad=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's x W^T in fp32: no sum over ranks, no bias."""
        return ops.linear(x, self.packed, self.kernel, self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Return this rank's weight as fp32 [N, K], dequantized anew at each access: for code that looks at it."""
        return dequantize(self.unpack())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias (see the class); an x of another width is a UsageError."""
        y = self.product(x)
        if self.split.reduce:
            y = self.group.all_reduce(y)
        if self.bias is not None:
            y = y + self.bias.float()
        if self.split.gather and self.split.tp > 1:
            y = self.group.all_gather(y, dim=-1, sizes=self._widths)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer in a module's printout."""
        text = f"in={self.in_features}, out={self.out_features}, format={self.format}, group_size={self.group_size}"
        text += f", bias={self.bias is not None}, kernel={self.kernel}"
        if self.split.tp > 1:
            text += f", rank={self.group.rank}/{self.split.tp}, axis={self.split.axis}"
        return text
