"""The plain-torch kernel: the definition of every result, written to be read, never to be fast.

Formats of codes with int8 activations, per summation block b of a row of x (docs/numerics.md):

    inv = 127 / max|x|    q = rne(x inv)    x_scale = max|x| / 127    sum = sum q
    dot = sum q (c - center)    or  sum q c - zero_point sum          exact integers
    acc = acc + float(dot) (w_scale x_scale)  [+ float(sum) (min x_scale)]       each operation rounded to fp32

blocks in sequence within a segment, then a balanced tree over the eight segments in which an empty one leaves its
neighbour as it is. A codebook of at most 16 entries puts its table's integers in the place of c - center and
w_scale * multiplier in that of w_scale (codebooks.integer_table). All other formats, and compute="fp32": fp32 products
of the dequantized weights, the same segments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from dist_lowbit.core.errors import KernelError
from dist_lowbit.formats import FORMATS, Format, PackedWeight, dequantize

from .codebooks import integer_table
from .spec import SEGMENTS, LinearSpec, mismatch

TINY = 1e-30  # a block whose largest magnitude is below counts as zero: 127 / TINY is still finite


def quantize_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q (fp32 holding integers in +-127) [M, B] and x_scale [M, 1] of fp32 activations [M, B].

    A row with NaN or Inf has q = 0 and the scale NaN, so that its results are NaN.
    """
    peak = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    used = finite & (peak >= TINY)
    # Tensor by tensor, since torch may turn a division with a number into a product with its reciprocal.
    top = torch.full_like(peak, 127.0)
    inverse = top / torch.where(used, peak, top)
    q = torch.where(used, torch.round(x * inverse), torch.zeros_like(x))
    scale = torch.where(used, peak / top, torch.zeros_like(peak))
    return q, torch.where(finite, scale, torch.full_like(scale, float("nan")))


def segment_tree(segments: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the sum of eight segments in pairs of neighbours; None is an empty segment."""
    level = list(segments)
    while len(level) > 1:
        level = [_join(level[i], level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def _join(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class _Columns:
    """The per-group parts of an integer weight, read by block."""

    def __init__(self, weight: PackedWeight) -> None:
        self.parts = {name: part.tensor for name, part in weight.parts.items()}
        self.per_row = weight.group_size == -1

    def get(self, name: str, block: int) -> torch.Tensor:
        """Return a part's fp32 value for each row, [1, N], in summation block `block`."""
        return self.parts[name][:, 0 if self.per_row else block].float()[None, :]


def exact_codes(format: Format) -> bool:
    """Return whether int8 activations meet this format's codes in exact dot products."""
    return format.integer or integer_table(format) is not None


def _centered(weight: PackedWeight) -> torch.Tensor:
    """Return the integers [N, K], fp64, that the codes stand for before a zero point or a min is taken into account."""
    table = integer_table(weight.format)
    if table is None:
        return weight.codes().double() - weight.format.center
    return torch.tensor(table[0], dtype=torch.float64, device=weight.codes().device)[weight.codes().int()]


def _segment(x: torch.Tensor, weight: PackedWeight, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    row, columns, table = weight.format, _Columns(weight), integer_table(weight.format)
    acc = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for at in range(start, stop, weight.block):
        block, end = at // weight.block, min(at + weight.block, stop)
        q, x_scale = quantize_block(x[:, at:end])
        # Sums of integers far below 2^53: fp64 holds them exactly in whatever order.
        q64 = q.double()
        total = q64.sum(-1, keepdim=True)
        dot = q64 @ codes[:, at:end].T
        if row.offset == "zero_point":
            dot = dot - columns.get("zero_point", block).double() * total
        scale = columns.get("scale", block)
        if table is not None:
            scale = scale * torch.tensor(table[1], dtype=torch.float32, device=x.device)
        acc = acc + dot.float() * (scale * x_scale)
        if row.offset == "min":
            acc = acc + total.float() * (columns.get("min", block) * x_scale)
    return acc


Segments = list[torch.Tensor | None]


def segments(x: torch.Tensor, weight: PackedWeight, cuts: Sequence[int], compute: str) -> Segments:
    """Return the eight segments of a product, fp32 [M, N] each, None where empty."""
    rounded = compute == "int8" and exact_codes(weight.format)
    operand = _centered(weight) if rounded else dequantize(weight)
    parts: Segments = []
    for start, stop in pairwise(cuts):
        if start == stop:
            parts.append(None)
        elif rounded:
            parts.append(_segment(x, weight, operand, start, stop))
        else:
            parts.append(x[:, start:stop] @ operand[:, start:stop].T)
    return parts


def linear(x: torch.Tensor, weight: PackedWeight, cuts: Sequence[int], compute: str) -> torch.Tensor:
    """Return fp32 [M, N], the product of fp32 activations [M, K] with a packed weight (see the module)."""
    total = segment_tree(segments(x, weight, cuts, compute))
    if total is not None:
        return total
    return torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Reference:
    """Takes everything, on any device; keeps a weight as its portable parts behind a JSON header."""

    name = "reference"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Return None: the definition takes every spec with well-formed segments."""
        if spec.compute not in ("int8", "fp32"):
            return f"compute is {spec.compute!r}; expected int8 or fp32"
        cuts, inner = spec.cuts, [cut for cut in spec.cuts if cut != spec.k]
        if len(cuts) != SEGMENTS + 1 or cuts[0] != 0 or cuts[-1] != spec.k or list(cuts) != sorted(cuts):
            return f"the segment ends {cuts} do not run from 0 to K = {spec.k}"
        if any(cut % spec.block for cut in inner):
            return f"a segment of {cuts} ends within a summation block of {spec.block}"
        return None

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> torch.Tensor:
        """Return 8 bytes of header length, the header, and the parts one after the other (see Kernel)."""
        header: dict[str, Any] = {
            "format": weight.format.name,
            "shape": list(weight.shape),
            "group_size": weight.group_size,
            "cuts": list(spec.cuts),
            "compute": spec.compute,
            "parts": {name: [str(t.dtype)[6:], list(t.shape)] for name, t in weight.tensors().items()},
        }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        lead = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)  # on the cpu
        pieces = [lead]
        for tensor in weight.tensors().values():
            raw = _as_bytes(tensor.cpu())
            pieces += [raw, raw.new_zeros(-raw.numel() % 64)]
        device = next(iter(weight.tensors().values())).device
        return torch.cat(pieces).to(device)

    def _open(self, opaque: torch.Tensor) -> tuple[PackedWeight, dict[str, Any]]:
        length = int.from_bytes(bytes(opaque[:8].tolist()), "little")
        if not 0 < length <= opaque.numel() - 8:
            raise KernelError("the buffer is no weight prepacked by the reference kernel")
        header: dict[str, Any] = json.loads(bytes(opaque[8 : 8 + length].tolist()))
        at, tensors = 8 + length, {}
        for name, (dtype, shape) in header["parts"].items():
            want = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            raw = opaque[at : at + want.nbytes]
            tensors[name] = raw.view(want.dtype).reshape(shape)
            at += -(-want.nbytes // 64) * 64
        n, k = header["shape"]
        row = FORMATS[header["format"]]
        return PackedWeight.from_tensors(row, (n, k), header["group_size"], tensors), header

    def unpack(self, opaque: torch.Tensor, spec: LinearSpec) -> PackedWeight:
        """Return the weight as copies (see Kernel)."""
        weight, _ = self._open(opaque)
        if weight.shape != (spec.n, spec.k) or weight.format != spec.format:
            raise KernelError(f"the buffer holds a {weight.format.name} weight {weight.shape}, not that of {spec}")
        copies = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        return PackedWeight.from_tensors(weight.format, weight.shape, weight.group_size, copies)

    def run(self, x: torch.Tensor, opaque: torch.Tensor, out: torch.Tensor) -> None:
        """Write x W^T into out (see Kernel)."""
        weight, header = self._open(opaque)
        if weight.shape != (out.shape[1], x.shape[1]):
            raise mismatch(*weight.shape, out.shape[1], x.shape[1])
        out.copy_(linear(x, weight, header["cuts"], header["compute"]))
