"""Attention whose bits depend on the query row and the keys it sees, and on nothing else (docs/numerics.md).

Not on the batch, the other rows, the number of heads at hand (hence of ranks), threads, ISA, or how a prefill was cut. The
torch code here is the definition; the C++ of kernels/cpu/attention.cpp gives the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.native import native

from .elementwise import LANES, exp_poly, lane_sum, lane_tree, tanh_poly

CHUNK = 256  # positions whose softmax is taken together; part of the definition
NOT_CAUSAL = -1

_KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REFERENCE_ELEMENTS = 1 << 22  # of the reference's largest temporary; no influence on the result


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
    out = torch.empty(batch, rows, heads, v.shape[-1])
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
    if library.dlb_attention(ctypes.byref(args)) != 0:
        raise UsageError("attention got arguments that do not fit together: a kv_index beyond the KV heads, or a bad window")
    return out.to(q.dtype)


def _visible(
    rows: range, slots: range, mask: torch.Tensor | None, causal_offset: int, window: int, device: torch.device
) -> torch.Tensor:
    """Return bool [heads or 1, rows, slots]: which slots each row sees; mask is [heads or 1, all rows, all slots]."""
    last = torch.arange(rows.start, rows.stop, device=device)[:, None] + causal_offset
    slot = torch.arange(slots.start, slots.stop, device=device)[None, :]
    see = torch.ones(len(rows), len(slots), dtype=torch.bool, device=device)
    if causal_offset >= 0:
        see = slot <= last
        if window > 0:
            see = see & (slot > last - window)
    see = see[None]
    if mask is not None:
        part = mask[:, rows.start : rows.stop, slots.start : slots.stop]
        see = see & (part if mask.dtype == torch.bool else part != float("-inf"))
    return see


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * dot of q [heads, rows, dim] with k [heads, slots, dim], dim a multiple of 16: [heads, rows, slots]."""
    lane = torch.zeros(*q.shape[:2], k.shape[1], LANES, device=q.device)
    for t in range(0, q.shape[-1], LANES):
        lane = lane + q[:, :, None, t : t + LANES] * k[:, None, :, t : t + LANES]
    return lane_tree(lane) * scale


def _weigh(p: torch.Tensor, see: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return sum over slots of p [heads, rows, slots] times v [heads, slots, dim], slot after slot, unseen ones left out."""
    o = torch.zeros(*p.shape[:2], v.shape[-1], device=p.device)
    for j in range(v.shape[1]):
        o = torch.where(see[:, :, j, None], o + p[:, :, j, None] * v[:, None, j], o)
    return o


def _reference_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: range,
    mask: torch.Tensor | None,
    scale: float,
    causal_offset: int,
    window: int,
    softcap: float,
    start: int,
    alibi: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of some rows of one sequence; k and v have been gathered per query head. Returns [heads, rows, value_dim]."""
    state = q.new_full(q.shape[:2], float("-inf"))
    total, out = torch.zeros_like(state), torch.zeros(*q.shape[:2], v.shape[-1], device=q.device)
    seen = torch.zeros_like(state, dtype=torch.bool)
    count = k.shape[1]
    for chunk in range(start // CHUNK, (start + count - 1) // CHUNK + 1):
        slots = range(max(chunk * CHUNK - start, 0), min((chunk + 1) * CHUNK - start, count))
        see = _visible(rows, slots, mask, causal_offset, window, q.device).expand(q.shape[0], -1, -1)
        if not bool(see.any()):
            continue
        s = _scores(q, k[:, slots.start : slots.stop], scale)
        if softcap > 0:
            s = softcap * tanh_poly(s / softcap)
        if alibi is not None:
            own = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + causal_offset if causal_offset >= 0 else 0
            distance = torch.arange(slots.start, slots.stop, device=q.device)[None, :] - own
            s = s + alibi.float()[:, None, None] * distance.float()[None]
        if mask is not None and mask.dtype != torch.bool:
            s = s + mask[:, rows.start : rows.stop, slots.start : slots.stop].float()
        m_c = torch.where(see, s, float("-inf")).amax(-1)
        p = torch.where(see, exp_poly(s - m_c[..., None]), 0.0)
        # A slot's lane goes by its position in the chunk, whatever the chunk's first slot is.
        l_c = lane_sum(torch.nn.functional.pad(p, ((slots.start + start) % CHUNK, 0)))
        o_c = _weigh(p, see, v[:, slots.start : slots.stop])
        here = see.any(-1)
        m = torch.maximum(state, m_c)
        a, b = exp_poly(state - m), exp_poly(m_c - m)
        total = torch.where(here, total * a + l_c * b, total)
        out = torch.where(here[..., None], out * a[..., None] + o_c * b[..., None], out)
        state = torch.where(here, m, state)
        seen = seen | here
    return torch.where(seen[..., None], out / total[..., None], torch.zeros_like(out))


def attention_reference(
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
    """Attention by its definition, in elementwise torch: slow, on any device; arguments and result as `attention`."""
    batch, heads, rows, head_dim = q.shape
    pad = (0, -head_dim % LANES)
    scale = torch.tensor(scale, dtype=torch.float32).item()  # the product is one of fp32 numbers
    wide_q = torch.nn.functional.pad(q.float(), pad)
    index = kv_index.to(device=k.device, dtype=torch.int64)
    step = max(1, _REFERENCE_ELEMENTS // (max(heads, 1) * CHUNK * LANES))
    out = torch.zeros(batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    if not heads or not k.shape[2]:
        return out
    for b in range(batch):
        k_b = torch.nn.functional.pad(k[b].float(), pad)[index]
        v_b = v[b].float()[index]
        mask_b = None if mask is None else mask[b % mask.shape[0]].expand(-1, rows, -1)
        start = 0 if kv_start is None else int(kv_start[b])
        for first in range(0, rows, step):
            part = range(first, min(first + step, rows))
            q_b = wide_q[b, :, part.start : part.stop]
            o = _reference_rows(q_b, k_b, v_b, part, mask_b, scale, causal_offset, window, softcap, start, alibi)
            out[b, part.start : part.stop] = o.transpose(0, 1).to(q.dtype)
    return out


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
    library = native() if q.device.type == "cpu" else None
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


def _why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes, expected 4 each"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: [B,Hq,M,D], [B,Hkv,S,D], [B,Hkv,S,Dv]"
    if mask is None:
        return None
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.ndim != 4 or mask.shape[3] != wanted[3] or any(m not in (1, w) for m, w in zip(mask.shape, wanted)):
        return f"the mask has shape {tuple(mask.shape)}, expected {wanted} or 1 in any axis but the last"
    return None


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

    `kv_index` int32 [Hq] names the KV head that each query head reads. `mask` [B or 1, Hq or 1, M or 1, S] is bool (True is
    seen) or added to the scores (-inf is not seen; what is not seen is left out, whatever its K and V hold). Row i sees slots
    up to `i + causal_offset` (NOT_CAUSAL: all) and, with `window` > 0, the last `window` of those. `softcap` c > 0:
    score = c tanh(score / c), before ALiBi (`alibi` float [Hq]: slope * (slot - the row's own slot)) and mask.
    `kv_start` int32 [B] is the position of slot 0 (negative where a batch row is padded on the left): chunks of 256 are
    aligned to positions, so a padded row gives the bits it gives alone. A row that sees nothing gives 0.

    q, k, v are fp32, fp16 or bf16; the arithmetic is fp32. No gradient. Raises UsageError for shapes that do not fit.
    Error against exact attention over the same inputs, u = 2^-24, A = max_j scale |q| |k_j| (sum of absolute products):
    each score errs by at most (D/16 + 6) u A, hence each weight by a factor within 1 +- 2 (D/16 + 6) u A, and the result by
    at most [2 (D/16 + 6) A + 6 + S_c + 2 chunks (max score range + 4)] u max|v|, S_c the keys of the longest chunk.
    """
    wrong = _why_not(q, k, v, mask)
    if wrong is None and kv_index.shape != (q.shape[1],):
        wrong = f"kv_index has shape {tuple(kv_index.shape)}, expected ({q.shape[1]},), one entry per query head"
    if wrong is None and window > 0 and causal_offset < 0:
        wrong = f"window is {window} without a causal_offset, which it counts back from"
    if wrong is not None:
        raise UsageError(f"attention: {wrong}")
    result: torch.Tensor = torch.ops.dist_lowbit.attention(
        q, k, v, kv_index, mask, scale, causal_offset, window, softcap, kv_start, alibi
    )
    return result
