"""Attention by its definition, in elementwise torch: every product and sum is one rounded fp32 operation, in a fixed
order.

A dot product: 16 lanes (element d to lane d mod 16, in sequence), then a tree. Keys in chunks of 256 positions: within
a chunk the maximum, exp_poly(s - max), its sum in 16 lanes by position, and sum p v key after key. Chunks are merged in
ascending order.
"""

from __future__ import annotations

import torch

from .elementwise import LANES, exp_poly, lane_sum, lane_tree, tanh_poly

CHUNK = 256  # positions whose softmax is taken together; part of the definition

_ELEMENTS = 1 << 22  # of the largest temporary; no influence on the result


def _visible(
    rows: range, slots: range, mask: torch.Tensor | None, causal_offset: int, window: int, device: torch.device
) -> torch.Tensor:
    """Return bool [heads or 1, rows, slots]: what each row sees; mask is [heads or 1, all rows, all slots]."""
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
    """Return scale * dot of q [heads, rows, dim] with k [heads, slots, dim] as [heads, rows, slots]; dim % 16 == 0."""
    lane = torch.zeros(*q.shape[:2], k.shape[1], LANES, dtype=torch.float32, device=q.device)
    for t in range(0, q.shape[-1], LANES):
        lane = lane + q[:, :, None, t : t + LANES] * k[:, None, :, t : t + LANES]
    return lane_tree(lane) * scale


def _weigh(p: torch.Tensor, see: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the sum over seen slots, one after the other, of p [heads, rows, slots] times v [heads, slots, dim]."""
    o = torch.zeros(*p.shape[:2], v.shape[-1], dtype=torch.float32, device=p.device)
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
    """Return attention [heads, rows, value_dim] of some rows of one sequence; k and v are given per query head."""
    state = q.new_full(q.shape[:2], float("-inf"))
    total = torch.zeros_like(state)
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float32, device=q.device)
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
            own = (
                torch.arange(rows.start, rows.stop, device=q.device)[:, None] + causal_offset
                if causal_offset >= 0
                else 0
            )
            distance = torch.arange(slots.start, slots.stop, device=q.device)[None, :] - own
            s = s + alibi.float()[:, None, None] * distance.float()
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
    step = max(1, _ELEMENTS // (max(heads, 1) * CHUNK * LANES))
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
