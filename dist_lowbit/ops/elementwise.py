"""The elementwise steps of a decoder layer as operators: compiled where there is a library, else their definition.

arithmetic.py has the definitions. Each operator computes in fp32 and rounds once to the dtype of its input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from dist_lowbit.core.errors import KernelError, UsageError

from . import arithmetic
from .arithmetic import ACTIVATIONS, EXP_ERROR, LANES, exp_poly, lane_sum, lane_tree, tanh_poly
from .library import CRowsIn, CRowsOut, library

__all__ = [
    "ACTIVATIONS", "EXP_ERROR", "LANES", "activation", "exp_poly", "forbid_gradient", "gated", "lane_sum", "lane_tree",
    "layer_norm", "rms_norm", "route", "sigmoid_add", "silu_mul", "tanh_poly",
]  # fmt: skip

KIND_AS_IS, KIND_RMS_NORM, KIND_LAYER_NORM, KIND_ACTIVATION, KIND_GATED = range(5)  # enum dlb_rows_kind
_ACTIVATION = {name: number for number, name in enumerate(ACTIVATIONS)}


def activation_number(kind: str) -> int:
    """Return the number that the library knows an activation by; UsageError for an unknown name."""
    if kind not in _ACTIVATION:
        raise UsageError(f"there is no activation {kind!r}; expected one of {', '.join(_ACTIVATION)}")
    return _ACTIVATION[kind]


def _library(x: torch.Tensor) -> ctypes.CDLL | None:
    return library() if x.device.type == "cpu" else None


def _wide(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(status: int, what: str) -> None:
    if status != 0:
        raise KernelError(f"{what} failed in the compiled kernel with status {status}")


def _apply(lib: ctypes.CDLL, rows: CRowsIn, x: torch.Tensor, width: int) -> torch.Tensor:
    """Run dlb_rows_apply over x as rows of `width` contiguous numbers; `rows` holds the rest."""
    wide, out = x.float().contiguous(), torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows.x, rows.x_stride, rows.up_stride, rows.k = wide.data_ptr(), width, width, width
    rows.m = wide.numel() // width if width else 0
    into = CRowsOut(y=out.data_ptr(), y_stride=width)
    _check(lib.dlb_rows_apply(ctypes.byref(rows), ctypes.byref(into)), "an elementwise step")
    return out.to(x.dtype)


# Rows that an elementwise step over a whole tensor is cut into.
_STRIP = 4096


def _gated(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    number = activation_number(kind)
    if up is not None and gate.shape != up.shape:
        raise UsageError(f"gated got shapes {tuple(gate.shape)} and {tuple(up.shape)}; give two of one shape")
    lib = _library(gate)
    if lib is None:
        y: torch.Tensor = ACTIVATIONS[kind](gate.float())
        return (y if up is None else y * up.float()).to(gate.dtype)
    other = _wide(up)
    rows = CRowsIn(kind=KIND_ACTIVATION if up is None else KIND_GATED, activation=number, up=_address(other))
    count = gate.numel()
    return _apply(lib, rows, gate, _STRIP if count % _STRIP == 0 else gate.shape[-1] if gate.dim() else 1)


def _affine_parts(
    what: str, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.shape != x.shape[-1:]:
            raise UsageError(
                f"{what} got a {name} of shape {tuple(part.shape)}; expected ({x.shape[-1]},) as x's last axis"
            )
    return _wide(weight), _wide(bias)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    w, _ = _affine_parts("rms_norm", x, weight, None)
    lib = _library(x)
    if lib is None:
        return arithmetic.rms_norm(x.float(), w, eps, offset).to(x.dtype)
    rows = CRowsIn(kind=KIND_RMS_NORM, weight=_address(w), eps=eps, weight_offset=offset)
    return _apply(lib, rows, x, x.shape[-1])


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float
) -> torch.Tensor:
    w, b = _affine_parts("layer_norm", x, weight, bias)
    lib = _library(x)
    if lib is None:
        return arithmetic.layer_norm(x.float(), w, b, eps, offset).to(x.dtype)
    rows = CRowsIn(kind=KIND_LAYER_NORM, weight=_address(w), bias=_address(b), eps=eps, weight_offset=offset)
    return _apply(lib, rows, x, x.shape[-1])


def _sigmoid_add(x: torch.Tensor, other: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if x.shape != other.shape or gate.shape != (*x.shape[:-1], 1):
        raise UsageError(
            f"sigmoid_add got shapes {tuple(x.shape)}, {tuple(other.shape)} and {tuple(gate.shape)}; "
            "expected two alike and a gate with a last axis of 1"
        )
    lib = _library(x)
    if lib is None:
        return (x.float() + arithmetic.sigmoid(gate.float()) * other.float()).to(x.dtype)
    a, b, g = x.float().contiguous(), other.float().contiguous(), gate.float().contiguous()
    out, k = torch.empty_like(a), a.shape[-1]
    status = lib.dlb_sigmoid_add(a.data_ptr(), b.data_ptr(), g.data_ptr(), 1, out.data_ptr(), k, g.numel(), k)
    _check(status, "sigmoid_add")
    return out.to(x.dtype)


def _route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1] <= 1024:
        raise UsageError(
            f"route got logits {tuple(logits.shape)} and top_k {top_k}; expected [M, E], top_k <= E <= 1024"
        )
    lib = _library(logits)
    if lib is None:
        return arithmetic.route(logits.float(), top_k, normalize)
    wide, (m, experts) = logits.float().contiguous(), logits.shape
    ids = wide.new_empty(m, top_k, dtype=torch.int32)
    weights = wide.new_empty(m, top_k)
    status = lib.dlb_route(
        wide.data_ptr(), experts, m, experts, top_k, int(normalize), ids.data_ptr(), top_k, weights.data_ptr(), top_k
    )
    _check(status, "route")
    return ids, weights


def forbid_gradient(name: str, library: torch.library.Library) -> None:
    """Make a backward pass through the op `dist_lowbit::name` an error instead of a silently missing gradient."""

    def backward(_context: object, *_gradients: torch.Tensor) -> None:
        raise UsageError(f"dist_lowbit::{name} has no gradient; train without it, or call torch.no_grad()")

    torch.library.register_autograd(f"dist_lowbit::{name}", backward, lib=library)


def _like_first(first: torch.Tensor, *_rest: object) -> torch.Tensor:
    return first.new_empty(first.shape)


def _route_shape(logits: torch.Tensor, top_k: int, _normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


_ops = torch.library.Library("dist_lowbit", "FRAGMENT")
_TABLE: list[tuple[str, str, Callable[..., object], Callable[..., object]]] = [
    ("gated", "(Tensor gate, Tensor? up, str kind) -> Tensor", _gated, _like_first),
    ("rms_norm", "(Tensor x, Tensor? weight, float eps, float offset) -> Tensor", _rms_norm, _like_first),
    ("layer_norm", "(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset) -> Tensor", _layer_norm,
     _like_first),
    ("sigmoid_add", "(Tensor x, Tensor other, Tensor gate) -> Tensor", _sigmoid_add, _like_first),
    ("route", "(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor)", _route, _route_shape),
]  # fmt: skip
for _name, _schema, _function, _shape in _TABLE:
    _ops.define(_name + _schema)
    _ops.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dist_lowbit::{_name}", _shape, lib=_ops)
    forbid_gradient(_name, _ops)


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return activation(gate) * up, elementwise, in fp32 rounded once to gate's dtype.

    Both of one shape and any float dtype. kind: a key of ACTIVATIONS.
    """
    result: torch.Tensor = torch.ops.dist_lowbit.gated(gate, up, kind)
    return result


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return an activation of x, elementwise, in fp32 rounded once to x's dtype. kind: a key of ACTIVATIONS."""
    result: torch.Tensor = torch.ops.dist_lowbit.gated(x, None, kind)
    return result


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up (see gated)."""
    return gated(gate, up, "silu")


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) along the last axis, in fp32 rounded once to x's dtype.

    x [..., K], weight [K] or None for ones; offset 1 where weight - 1 is stored. The mean is a 16-lane sum divided by
    K: a row's result depends on that row alone.
    """
    result: torch.Tensor = torch.ops.dist_lowbit.rms_norm(x, weight, eps, offset)
    return result


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return d / sqrt(mean(d^2) + eps) * (weight + offset) + bias, d = x - mean(x), along the last axis.

    In fp32 rounded once to x's dtype; weight [K] or None for ones, bias [K] or None. Sums as in rms_norm.
    """
    result: torch.Tensor = torch.ops.dist_lowbit.layer_norm(x, weight, bias, eps, offset)
    return result


def sigmoid_add(x: torch.Tensor, other: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return x + sigmoid(gate) * other, in fp32 rounded once to x's dtype. x, other [..., K]; gate [..., 1]."""
    result: torch.Tensor = torch.ops.dist_lowbit.sigmoid_add(x, other, gate)
    return result


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts of each row of router logits [M, E]: ids int32 and weights fp32, both [M, top_k].

    The largest logits in descending order, ties to the lower index; a weight is the softmax over all experts, with
    `normalize` divided by the sum of the chosen. E at most 1024. A row with NaN has valid ids and NaN weights.
    """
    ids, weights = torch.ops.dist_lowbit.route(logits, top_k, normalize)
    return ids, weights
