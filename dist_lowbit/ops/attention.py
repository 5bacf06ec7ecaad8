"""Attention whose bits depend on the query row and the keys it sees, and on nothing else (docs/numerics.md).

Not on the batch, the other rows, the number of heads at hand (hence of ranks), threads, ISA, or how a prefill was cut.
The torch code here is the definition; the C++ of kernels/cpu/attention.cpp gives the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dist_lowbit.core.errors import KernelError, UsageError

from .attention_reference import CHUNK, attention_reference
from .elementwise import LANES, forbid_gradient
from .library import library as compiled_library

NOT_CAUSAL = -1

_KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Args(ctypes.Structure):
    """struct dlb_attention_args of kernels/cpu/attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "mask", "kv_index", "kv_start", "alibi")]
        + [(name, ctypes.c_void_p) for name in ("block_table", "slot_count", "row_begin")]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out", "mask")]
        + [(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "rows", "slots", "head_dim", "value_dim")]
        + [(name, ctypes.c_int64) for name in ("block_size", "block_table_stride", "causal_offset", "window")]
        + [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]
        + [("kv_type", ctypes.c_int32), ("mask_type", ctypes.c_int32)]
    )


def _strides(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 3)(*values)


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _native_attention(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_index: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal_offset: int,
    window: int,
    softcap: float,
    kv_start: torch.Tensor | None,
    alibi: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, rows, head_dim = q.shape
    if k.dtype not in _KV_TYPES or k.dtype != v.dtype:
        k, v = k.float(), v.float()
    q, k, v = _rows_contiguous(q.float()), _rows_contiguous(k), _rows_contiguous(v)
    out = torch.empty(batch, rows, heads, v.shape[-1], dtype=torch.float32, device=q.device)
    args = _Args(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(),
        q_stride=_strides(q.stride()[:3]), k_stride=_strides(k.stride()[:3]), v_stride=_strides(v.stride()[:3]),
        out_stride=_strides((out.stride(0), out.stride(2), out.stride(1))),
        batch=batch, heads=heads, kv_heads=k.shape[1], rows=rows, slots=k.shape[2], head_dim=head_dim,
        value_dim=v.shape[-1], causal_offset=causal_offset, window=window, scale=scale, softcap=softcap,
        kv_type=_KV_TYPES[k.dtype],
    )  # fmt: skip
    # Named, so that what the pointers point to lives until the call is over.
    index = kv_index.to(torch.int32).contiguous()
    start = None if kv_start is None else kv_start.to(torch.int32).contiguous()
    slopes = None if alibi is None else alibi.float().contiguous()
    args.kv_index = index.data_ptr()
    args.kv_start = None if start is None else start.data_ptr()
    args.alibi = None if slopes is None else slopes.data_ptr()
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = _rows_contiguous(mask).expand(batch, heads, rows, k.shape[2])
        args.mask, args.mask_type = mask.data_ptr(), 1 if mask.dtype == torch.bool else 2
        args.mask_stride = _strides(mask.stride()[:3])
    status = library.dlb_attention(ctypes.byref(args))
    if status == -3:
        raise KernelError("attention found no memory for its threads' scratch")
    if status != 0:
        raise UsageError("attention: kv_index names a KV head that k does not have")
    return out


def _why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_index: torch.Tensor, mask: torch.Tensor | None
) -> str | None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes, expected 4 each"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        return f"{shapes} do not fit together, expected [B, Hq, M, D], [B, Hkv, S, D], [B, Hkv, S, Dv]"
    if kv_index.shape != (q.shape[1],):
        return f"kv_index has shape {tuple(kv_index.shape)}, expected ({q.shape[1]},), one entry per query head"
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask is not None:
        fits = mask.ndim == 4 and all(m in (1, w) for m, w in zip(mask.shape, wanted, strict=True))
        if not fits or mask.shape[3] != wanted[3]:
            return f"the mask has shape {tuple(mask.shape)}, expected {wanted} or 1 in any axis but the last"
    return None


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_index: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal_offset: int,
    window: int,
    softcap: float,
    kv_start: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    wrong = _why_not(q, k, v, kv_index, mask)
    if wrong is None and window > 0 and causal_offset < 0:
        wrong = f"window is {window} without a causal_offset, which it counts back from"
    for name, per_row, count in (("kv_start", kv_start, q.shape[0]), ("alibi", alibi, q.shape[1])):
        if wrong is None and per_row is not None and per_row.shape != (count,):
            wrong = f"{name} has shape {tuple(per_row.shape)}, expected ({count},)"
    if wrong is not None:
        raise UsageError(f"attention: {wrong}")
    library = compiled_library() if q.device.type == "cpu" else None
    rest = (q, k, v, kv_index, mask, scale, causal_offset, window, softcap, kv_start, alibi)
    if library is None:
        return attention_reference(*rest)
    return _native_attention(library, *rest).to(q.dtype)


_ops = torch.library.Library("dist_lowbit", "FRAGMENT")
_ops.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor kv_index, Tensor? mask, float scale, SymInt causal_offset, "
    "int window, float softcap, Tensor? kv_start=None, Tensor? alibi=None) -> Tensor"
)
_ops.impl("attention", _attention, "CompositeExplicitAutograd")


@torch.library.register_fake("dist_lowbit::attention", lib=_ops)
def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


forbid_gradient("attention", _ops)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_index: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float,
    causal_offset: int = NOT_CAUSAL,
    window: int = 0,
    softcap: float = 0.0,
    kv_start: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from q [B, Hq, M, D] to k [B, Hkv, S, D] and v [B, Hkv, S, Dv]; return [B, M, Hq, Dv] in q's dtype.

    `kv_index` int32 [Hq] names the KV head that each query head reads. `mask` [B or 1, Hq or 1, M or 1, S] is bool
    (True is seen) or added to the scores (-inf is not seen; what is not seen is left out, whatever its K and V hold).
    Row i sees slots up to `i + causal_offset` (NOT_CAUSAL: all) and, with `window` > 0, the last `window` of those.
    `softcap` c > 0: score = c tanh(score / c), before ALiBi (`alibi` float [Hq]: slope * (slot - the row's own slot))
    and mask. `kv_start` int32 [B] is the position of slot 0 (negative where a batch row is padded on the left): chunks
    of 256 are aligned to positions, so a padded row gives the bits it gives alone. A row that sees nothing gives 0.

    q, k, v are fp32, fp16 or bf16; the arithmetic is fp32, rounded once to q's dtype. A backward pass through it is a
    UsageError, and so are shapes that do not fit. Error against exact attention over the same inputs:
    `attention_error`.
    """
    result: torch.Tensor = torch.ops.dist_lowbit.attention(
        q, k, v, kv_index, mask, scale, causal_offset, window, softcap, kv_start, alibi
    )
    return result


def attention_error(
    slots: int, head_dim: int, score_size: float, score_range: float, value_size: float, cap: float = 0.0
) -> float:
    """Return how far fp32 `attention` can be from exact attention over the same inputs, before the cast to q's dtype.

    `score_size`: the largest sum of absolute terms of a score (scale sum_d |q_d k_d| + |ALiBi| + |mask|);
    `score_range`: the largest distance of a visible score from its row's maximum; `value_size`: max |v|. To first order
    in u = 2^-24, times 1.05:

    - a score: a product, ceil(D/16) - 1 additions in its lane, 4 in the tree, scale, ALiBi (2), mask: (ceil(D/16) + 8)
      u each term; softcap: a division (u cap at most, |x| tanh'(x) <= 1), tanh_poly (4 u cap), a product (u cap).
    - a weight: exp of the score's error, of the rounding of s - m (u times the range, at most 88: beyond, the weight is
      0 and was below e^-87), 2 u of exp_poly; and as much per merge of a chunk. An average's error is twice its
      weights'.
    - sums: o a product and n additions (n keys of a chunk), l ceil(n/16) + 4; both a product and an addition per merge,
      and the division.
    """
    u = 2.0**-24
    chunks, keys = slots // CHUNK + 2, min(slots, CHUNK)
    score = (head_dim // LANES + 9) * u * score_size + 6 * u * cap
    weight = score + (chunks + 1) * (min(score_range, 88.0) + 2) * u
    sums = (keys + 1 + 2 * chunks + keys // LANES + 5 + 2 * chunks + 1) * u
    return 1.05 * value_size * (2 * weight + sums)
