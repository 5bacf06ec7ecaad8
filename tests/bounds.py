"""Derived error bounds, shared by all tests; docs/numerics.md has the derivations step by step.

Everything is computed in fp64, whose own rounding (2^-53) is covered by the `1 + 2^-20` that the bounds carry.
u = 2^-24 is the unit roundoff of fp32. gamma(n) = n u / (1 - n u) bounds n roundings in a row (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., lemma 3.1); a sum of T numbers in any order, sequential, by tree or by
segments, passes each number through at most T - 1 roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dist_lowbit.formats import Format, PackedWeight, dequantize
from dist_lowbit.formats.quantizer import error_bound
from dist_lowbit.ops.codebooks import integer_table
from dist_lowbit.ops.reference import exact_codes

U = 2.0**-24
_ETA = 2.0**-149  # the smallest fp32 number: what one operation can lose by underflow
_OWN = 1 + 2.0**-20  # this file's fp64 arithmetic
_TINY = 1e-30  # a block whose largest activation is below counts as zero (docs/numerics.md)


def gamma(n: int) -> float:
    """Return the relative error that n fp32 roundings in a row can cause."""
    return n * U / (1 - n * U)


def _blocks(a_RK: torch.Tensor, block: int) -> torch.Tensor:
    """Return [R, K] as fp64 [R, B, block], zeros behind a short last block."""
    rows, k = a_RK.shape
    count = -(-k // block)
    return torch.nn.functional.pad(a_RK.double(), (0, count * block - k)).reshape(rows, count, block)


def exact_linear(x_MK: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x @ dequantize(weight).T in fp64 [M, N]: what linear_bound measures from."""
    return x_MK.double() @ dequantize(weight).double().T


def read_weight(weight: PackedWeight) -> torch.Tensor:
    """Return the weights that a kernel of codes multiplies with, fp64 [N, K]: codebooks as integer tables."""
    table = integer_table(weight.format)
    if table is None:
        return dequantize(weight).double()
    return torch.tensor(table[0], dtype=torch.float64)[weight.codes().int()] * table[1] * _spread(weight, "scale")


def _spread(weight: PackedWeight, part: str) -> torch.Tensor:
    """Return a part of the groups for every weight, fp64 [N, K]."""
    k = weight.shape[1]
    group = k if weight.group_size == -1 else weight.group_size
    return weight.tensors()[part].double().repeat_interleave(max(group, 1), 1)[:, :k]


def activation_error(x_MK: torch.Tensor, block: int) -> torch.Tensor:
    """Bound |x - q x_scale| of one activation in each summation block, fp64 [M, B]: half a step of amax / 127.

    q = rne(x (127 / amax)) has two fp32 roundings before rne, each of at most 127 u steps, and amax / 127 is itself
    rounded (127 u): half a step and 4 * 127 u.
    """
    amax = _blocks(x_MK, block).abs().amax(-1)
    return torch.where(amax < _TINY, amax, amax / 127 * (0.5 + 4 * 127 * U))


def activation_bound(x_MK: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Bound what rounding the activations to int8 costs, fp64 [M, N]: activation_error sum|w|, over the blocks."""
    w_NB = _blocks(read_weight(weight), weight.block).abs().sum(-1)
    return activation_error(x_MK, weight.block) @ w_NB.T * _OWN


def _block_terms(x_MK: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, int]:
    """Return the sum over the blocks of the magnitudes of what is added, fp64 [M, N], and how many are added.

    A block adds dot * (w_scale * x_scale), and min * x_scale * sum(q) where the format has a min. |dot| is taken from
    x itself rather than from q; activation_error covers the difference.
    """
    parts, block = weight.tensors(), weight.block
    x_MBG = _blocks(x_MK, block)
    slack = activation_error(x_MK, block)
    codes, table = weight.codes().double() - weight.format.center, integer_table(weight.format)
    if weight.format.offset == "zero_point":
        codes = codes - _spread(weight, "zero_point")
    if table is not None:
        codes = torch.tensor(table[0], dtype=torch.float64)[weight.codes().int()]
    c_NBG = _blocks(codes, block)
    count = c_NBG.shape[1]
    scale_NB = parts["scale"].double().abs().expand(-1, count) * (1.0 if table is None else table[1])
    total = torch.zeros(x_MK.shape[0], weight.shape[0], dtype=torch.float64)
    for b in range(count):
        dot = (x_MBG[:, b] @ c_NBG[:, b].T).abs() + slack[:, b, None] * c_NBG[:, b].abs().sum(-1)
        total += dot * scale_NB[:, b]
        if weight.format.offset == "min":
            ones = x_MBG[:, b].sum(-1).abs() + slack[:, b] * block
            total += ones[:, None] * parts["min"].double().abs().expand(-1, count)[:, b]
    return total, count * (2 if weight.format.offset == "min" else 1)


def _sum_bound(x_MK: torch.Tensor, weight: PackedWeight, compute: str) -> torch.Tensor:
    """Bound what computing the terms and adding them in fp32 costs, in any order of the blocks, fp64 [M, N]."""
    if compute == "int8" and exact_codes(weight.format):
        total, count = _block_terms(x_MK, weight)
        # float(dot), w_scale * multiplier * x_scale, their product: 4 roundings a term, then at most count additions.
        return (gamma(count + 4) * total + 4 * count * _ETA * 2.0**31) * _OWN
    # Elements: a product and at most K - 1 additions (FMA only saves roundings); 4 more where a kernel takes codes,
    # centre, scale and min out of the sum.
    magnitude = x_MK.double().abs() @ dequantize(weight).double().abs().T
    return (gamma(weight.shape[1] + 4) * magnitude + weight.shape[1] * _ETA) * _OWN


def linear_bound(x_MK: torch.Tensor, weight: PackedWeight, compute: str = "int8") -> torch.Tensor:
    """Bound |run(x, weight) - exact_linear(x, weight)|, fp64 [M, N], before bias and cast.

    `compute`: "int8" (activations rounded per summation block; formats without codes ignore it) or "fp32".
    """
    assert compute in ("int8", "fp32")
    bound = _sum_bound(x_MK, weight, compute)
    if compute == "int8" and exact_codes(weight.format):
        # What rounding a codebook to a table costs, beyond what that does to the activations' part.
        table = x_MK.double().abs() @ (read_weight(weight) - dequantize(weight).double()).abs().T
        bound = bound + table * _OWN
        # dequantize rounds c * scale + min once, the kernel takes both apart: u |w|.
        apart = U * x_MK.double().abs() @ dequantize(weight).double().abs().T
        bound = bound + activation_bound(x_MK, weight) + (apart * _OWN if weight.format.offset == "min" else 0)
    return bound


def reorder_bound(x_MK: torch.Tensor, weight: PackedWeight, compute: str = "int8") -> torch.Tensor:
    """Bound how far two results can be apart that differ in the order of summation only, fp64 [M, N].

    So for a whole Linear against the sum of its ranks' parts, at any degree: each is within _sum_bound of the exact
    sum. (The int8 terms are the same bits in both; their 3 roundings are counted all the same.) No bound is needed
    where the orders agree (tp 1, 2, 4, 8 of an integer format): there the test is `equal`.
    """
    return 2 * _sum_bound(x_MK, weight, compute)


def format_bound(
    x_MK: torch.Tensor, w_NK: torch.Tensor, format: str | Format, group_size: int | None = None
) -> torch.Tensor:
    """Bound |x w - x dequantize(quantize(w))| in exact arithmetic, fp64 [M, N]: sum |x| error_bound(w)."""
    return x_MK.double().abs() @ error_bound(w_NK, format, group_size).T * _OWN


def cast_bound(y: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> torch.Tensor:
    """Return a bound after `roundings` more to `dtype` of results near y, each of which adds half an ulp."""
    info = torch.finfo(dtype)
    for _ in range(roundings):
        bound = bound + 0.5 * info.eps * (y.double().abs() + bound) + 0.5 * info.eps * info.smallest_normal
    return bound * _OWN


LocalBound = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def margin_bound(
    model: torch.nn.Module, token_ids: torch.Tensor, position: int, better: int, worse: int, local: LocalBound
) -> float:
    """Bound, to first order, how far logit[better] - logit[worse] at a position moves when every Linear errs.

    `model(token_ids)` gives an object with `.logits` [1, T, V] and is the exact model in fp32 or fp64.
    `local(name, x, y)` bounds the error of the Linear `name` for input x [rows, K] and output y [rows, N], like
    format_bound + linear_bound. The result is sum over Linears of sum |d margin / d y| * local: the triangle
    inequality on the first-order expansion, exact where the network is linear. Terms of second order (products of
    local errors) are left out, so it is for errors that are small beside the activations. Two models may disagree on a
    token only where the exact margin is below this bound. Cost: one forward and one backward pass.
    """
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(
                _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name
            ) -> torch.Tensor:
                held = output if output.requires_grad else output.detach().requires_grad_()
                seen.append((name, inputs[0].detach(), held))
                return held

            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            logits = model(token_ids).logits[0, position]
            margin = logits[better] - logits[worse]
            slopes = torch.autograd.grad(margin, [y for _, _, y in seen], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    total = 0.0
    for (name, x, y), slope in zip(seen, slopes, strict=True):
        if slope is not None:
            error = local(name, x.reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1]))
            total += float((slope.reshape(error.shape).double().abs() * error).sum())
    return total
