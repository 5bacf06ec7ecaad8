"""Products with what comes before and after them in a decoder layer: kernels/cpu/fused.h for torch tensors.

Every result has the bits of the separate steps: elementwise.py, then linear.py, then bias, residual and cast. For
weights that the compiled kernel prepacked ("cpu"); on a machine without the library there are none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.core.native import native_why_not

from .elementwise import (
    KIND_ACTIVATION,
    KIND_AS_IS,
    KIND_GATED,
    KIND_LAYER_NORM,
    KIND_RMS_NORM,
    activation_number,
)
from .library import CExpert, CLinearOut, CLinearSpec, CMoeIn, CRowsIn, CRowsOut, library
from .reference import Segments, segment_tree

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum dlb_float
_REFUSALS = {
    -1: "an argument is out of its range",
    -2: "a buffer is no prepacked weight",
    -3: "memory is exhausted",
    -4: "the shapes do not fit together",
}


@dataclass(frozen=True)
class Rows:
    """Rows x [M, K] (fp32, last axis contiguous) and what is done to them before a product.

    norm: "" or "rms" or "layer", with weight [K], bias [K], eps and offset (added to the weight). activation: "" or a
    key of ACTIVATIONS, times `up` [M, K] where it is given. keep: whether the finished rows are wanted as well.
    """

    x: torch.Tensor
    norm: str = ""
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0
    activation: str = ""
    up: torch.Tensor | None = None
    keep: torch.Tensor | None = None


@dataclass(frozen=True)
class Finish:
    """What is done to results: + bias [N] + residual [M, N] (both fp32), rounded once to dtype."""

    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32


def _native() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise KernelError(f"cannot run: {native_why_not()}")
    return lib


def _check(status: int, what: str) -> None:
    if status == -4:
        raise UsageError(f"{what} got shapes that do not fit together; expected x [M, K] and weights of that K")
    if status != 0:
        raise KernelError(f"{what} failed in the compiled kernel: {_REFUSALS.get(status, status)}")


def _pointer(x: torch.Tensor | None, shape: tuple[int, ...] | None = None) -> int | None:
    if x is None:
        return None
    if x.dtype != torch.float32 or (x.numel() and x.stride(-1) != 1) or (shape is not None and x.shape != shape):
        raise UsageError(
            f"got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; "
            f"expected float32{'' if shape is None else f' {list(shape)}'} with a contiguous last axis"
        )
    return x.data_ptr()


def _c_rows(rows: Rows) -> CRowsIn:
    x, (m, k) = rows.x, rows.x.shape
    kinds = {"": KIND_AS_IS, "rms": KIND_RMS_NORM, "layer": KIND_LAYER_NORM}
    if rows.norm not in kinds or (rows.norm and rows.activation):
        raise UsageError(
            f"got norm {rows.norm!r} and activation {rows.activation!r}; expected one of them, rms or layer"
        )
    out = CRowsIn(x=_pointer(x), x_stride=x.stride(0), m=m, k=k, kind=kinds[rows.norm], eps=rows.eps)
    out.weight, out.bias, out.weight_offset = _pointer(rows.weight, (k,)), _pointer(rows.bias, (k,)), rows.offset
    if rows.activation:
        out.kind = KIND_ACTIVATION if rows.up is None else KIND_GATED
        out.activation = activation_number(rows.activation)
    if rows.up is not None:
        out.up, out.up_stride = _pointer(rows.up, (m, k)), rows.up.stride(0)
    if rows.keep is not None:
        out.rows_out, out.rows_stride = _pointer(rows.keep, (m, k)), rows.keep.stride(0)
    return out


def _c_out(y: torch.Tensor, finish: Finish) -> CRowsOut:
    m, n = y.shape
    out = CRowsOut(y=y.data_ptr(), y_stride=y.stride(0), y_type=_DTYPES[finish.dtype])
    out.bias, out.residual = _pointer(finish.bias, (n,)), _pointer(finish.residual, (m, n))
    out.residual_stride = 0 if finish.residual is None else finish.residual.stride(0)
    return out


def _empty(m: int, n: int, finish: Finish) -> torch.Tensor:
    if finish.dtype not in _DTYPES:
        raise UsageError(f"results of {finish.dtype} were asked for; expected float32, float16 or bfloat16")
    return torch.empty(m, n, dtype=finish.dtype)


def _fits(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Return a prepacked weight that has n outputs; the library writes as many as it has."""
    found = CLinearSpec()
    _check(_native().dlb_linear_spec_of(packed.data_ptr(), packed.numel(), ctypes.byref(found)), "a packed weight")
    if found.n != n:
        raise UsageError(f"a product of {n} outputs was asked for; the weight has {found.n}")
    return packed


def linear_fused(rows: Rows, products: Sequence[tuple[torch.Tensor, int, Finish]]) -> list[torch.Tensor]:
    """Return rows W^T, finished, for each of up to 16 products (prepacked weight, N, Finish): q, k and v as one call.

    The rows are made and rounded to int8 once; formats and group sizes may differ.
    """
    results = [_empty(rows.x.shape[0], n, finish) for _, n, finish in products]
    items = (CLinearOut * len(products))()
    for item, (packed, n, finish), y in zip(items, products, results, strict=True):
        _fits(packed, n)
        item.packed, item.bytes, item.out = packed.data_ptr(), packed.numel(), _c_out(y, finish)
    _check(_native().dlb_linear_fused(ctypes.byref(_c_rows(rows)), items, len(products)), "linear_fused")
    return results


def rows_apply(rows: Rows, finish: Finish) -> torch.Tensor:
    """Return the finished rows themselves, + bias + residual, rounded once to a dtype: [M, K]."""
    m, k = rows.x.shape
    y = _empty(m, k, finish)
    _check(_native().dlb_rows_apply(ctypes.byref(_c_rows(rows)), ctypes.byref(_c_out(y, finish))), "rows_apply")
    return y


@dataclass(frozen=True)
class Expert:
    """Prepacked weights of an expert: gate [I, K] and up [I, K], or both in gate [2 I, K] (gate rows first) without
    up, or gate [I, K] alone for an MLP without a gate; down [N, I].
    """

    gate: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor | None = None


def _c_expert(expert: Expert) -> CExpert:
    out = CExpert()
    for name, packed in (("gate", expert.gate), ("up", expert.up), ("down", expert.down)):
        if packed is not None:
            setattr(out, name, packed.data_ptr())
            setattr(out, f"{name}_bytes", packed.numel())
    return out


def moe(
    x: torch.Tensor,
    experts: Sequence[Expert],
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    n: int,
    finish: Finish,
) -> torch.Tensor:
    """Return the weighted sum of a row's experts, formed inside the segments of I in ascending order of the experts.

    x fp32 [M, K]; ids int32 and weights fp32 [M, slots] (`route`; -1: an unused slot, each expert at most once in a
    row). A shared expert is the last of `experts`, with a slot and the weight sigmoid(its gate) in every row.
    `moe_tree` is the definition.
    """
    m, k = x.shape
    if ids.shape != weights.shape or ids.dtype != torch.int32 or ids.dim() != 2 or ids.shape[0] != m:
        raise UsageError(
            f"moe got ids {ids.dtype} {tuple(ids.shape)} and weights {tuple(weights.shape)} for {m} rows; "
            "expected int32 [M, slots] and float32 of that shape"
        )
    for expert in experts:
        _fits(expert.down, n)
    y, chosen, factors = _empty(m, n, finish), ids.contiguous(), weights.float().contiguous()
    table = (CExpert * len(experts))(*map(_c_expert, experts))
    given = CMoeIn(x=_pointer(x), x_stride=x.stride(0), m=m, k=k, experts=table, expert_count=len(experts))
    given.ids, given.weights, given.slots = chosen.data_ptr(), factors.data_ptr(), chosen.shape[1]
    given.activation = activation_number(activation)
    _check(_native().dlb_moe(ctypes.byref(given), ctypes.byref(_c_out(y, finish))), "moe")
    return y


def moe_tree(products: Sequence[Segments], ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what `moe` is by definition, from the segments of every expert's down product for all M rows.

    products[e]: eight segments [M, N], None where empty (reference.segments). Each segment's sum starts from +0 and
    takes weight * segment of the row's experts in ascending index, two roundings; the tree adds the eight sums.
    """
    some = next(part for product in products for part in product if part is not None)
    sums: list[torch.Tensor | None] = [torch.zeros_like(some) for _ in range(8)]
    for expert, product in enumerate(products):
        for row, slot in (ids == expert).nonzero().tolist():
            for total, part in zip(sums, product, strict=True):
                if part is not None and total is not None:
                    total[row] = total[row] + weights[row, slot] * part[row]
    total = segment_tree(sums)
    assert total is not None
    return total
