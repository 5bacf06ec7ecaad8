"""What a program computes without roundings, and how far any fp32 computation of it may be off.

One sequence runs through the program in fp64. The output y of every operation gets a bound b on the error that one fp32
computation of it makes, given exact inputs; autograd carries it to a logit, |logit error| <= sum |d logit / d y| b: the
triangle inequality on the first-order expansion. (Relative local errors are below 2^-14, so what is of second order is
below 2^-14 of the bound; 2^-10 of it is added.) Two computations in fp32, ours and Hugging Face's, are then within
twice the bound of each other. The constants hold for sums in any order, with u = 2^-24:

- a Linear: tests.bounds.linear_bound; bias, residual and any other sum: u |y|.
- RMSNorm of K: K squares and additions (K + 1) u of the mean, half of it after the root; eps, root, division and two
  products: (K / 2 + 6) u |y|.
- LayerNorm: the mean errs by (K + 1) u mean|x|; as the deviations sum to 0 their mean square does not notice, to first
  order. d errs by that and u |d|. The rest as above, and u |y| for the bias.
- rotary: the angle is the same product of fp32 numbers in all computations. A cosine errs by 2 u (one ulp of torch's),
  its scaling by u, each product and the sum by u: 5 u (|a| + |b|).
- a score: D products and additions, scale, ALiBi (2), mask: (D + 6) u of its absolute terms; softcap: a division,
  tanh (4 u cap) and a product: 6 u cap. e is the error of a score, p a weight:
  p_j (e_j + sum_l p_l e_l) |v_j| summed over j, and for exponentials (2 u, and u of the distance to the largest score,
  88 at most), sums, merges of chunks and the division (2 n + 24) u sum p_j |v_j|, n keys.
- an activation of x: |f(x)| <= |x| and |x f'(x)| <= 1.13 |x| for each of them; the exponential errs by 2 u and u of its
  argument, whose product with the rest is below 1; at most six more operations: 10 u |x|. Its product with up: u |y|.
- a router's weight, of E experts: an exponential, E additions and a division, (E + 6) u and u of the distance to the
  largest logit; k more where the chosen are divided by their sum. The sum over experts: a product and an addition each.
- soft-capped logits: as in a score.
- a cache of 16 bits: half an ulp of each key and value, 2^-11 or 2^-8 of it (fp16: and 2^-25 below its normal numbers).
  int8: scale = fp16(amax / 127) of a head's row, half a step of it: amax / 254, and 2^-10 of that for the scale's own
  rounding. These are larger than the rest (relative 2^-7 at most), so 2^-3 of the bound is added instead of 2^-10.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dist_lowbit.decoder.program import Attention, Mlp, Moe, Norm, Program
from dist_lowbit.decoder.rope import rope_table
from dist_lowbit.formats import PackedWeight, dequantize
from dist_lowbit.parallel import LowBitLinear
from tests.bounds import U, linear_bound

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class ExactProgram:
    """The logits of one sequence, in fp64, and bounds on single ones. For programs of one rank."""

    def __init__(self, program: Program, ids: torch.Tensor, chunks: list[int], kv: str = "fp32") -> None:
        """ids: [T]. chunks: lengths of the steps that the sequence is run in (lengths decide some frequencies). kv: the
        dtype that keys and values are rounded to.
        """
        self.program, self.kv = program, kv
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.turns = []
        for rope in program.ropes:
            parts, at = [], 0
            for n in chunks:
                parts.append(rope_table(rope, torch.arange(at, at + n), torch.tensor([0, n])))
                at += n
            self.turns.append([torch.cat([part[i] for part in parts]).double() for i in (0, 1)])
        with torch.enable_grad():
            self.logits = self._run(ids)

    def bound(self, row: int, token: int) -> float:
        """Bound how far one fp32 computation's logit may be off."""
        places = [place for place, _ in self.noted]
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.logits[row, token], places, retain_graph=True, allow_unused=True)
        pairs = zip(slopes, self.noted, strict=True)
        total = sum(float((slope.abs() * error).sum()) for slope, (_, error) in pairs if slope is not None)
        return total * (1 + (2.0**-10 if self.kv == "fp32" else 2.0**-3))

    def note(self, y: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Return y with a place for an error of at most `error`."""
        place = torch.zeros_like(y, requires_grad=True)
        self.noted.append((place, error.detach()))
        return y + place

    def linear(self, linear: LowBitLinear, x: torch.Tensor) -> torch.Tensor:
        weight = linear.unpack()
        y = x @ linear.weight.double().T
        error = linear_bound(x.detach().float(), weight, "fp32")
        if linear.bias is not None:
            y = y + linear.bias.double()
            error = error + U * y.abs()
        return self.note(y, error)

    def norm(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return x
        k = x.shape[-1]
        w = norm.weight.double()
        if norm.kind == "rms":
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * w
            return self.note(y, (k / 2 + 6) * U * y.abs())
        d = x - x.mean(-1, keepdim=True)
        factor = torch.rsqrt(d.square().mean(-1, keepdim=True) + norm.eps)
        y = d * factor * w
        error = w.abs() * factor * U * ((k + 1) * x.abs().mean(-1, keepdim=True) + d.abs()) + (k / 2 + 6) * U * y.abs()
        if norm.bias is not None:
            y = y + norm.bias.double()
        return self.note(y, error + U * y.abs())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.note(x + y, U * (x + y).abs())

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        p = self.program
        x = p.embed.weight[ids].double() * p.embed_scale
        x = self.note(x, 2 * U * x.abs()) if p.embed_scale != 1.0 else x
        if p.embed_project is not None:
            x = self.linear(p.embed_project, x)
        if p.positions is not None:
            x = self.add(x, p.positions[torch.arange(len(ids)) + p.position_offset].double())
        x = self.norm(p.embed_norm, x)
        for layer in p.layers:
            if layer.norm_after:
                x = self.norm(layer.attn_norm, self.add(x, self.attention(layer.attention, x)))
                x = self.norm(layer.mlp_norm, self.add(x, self.mlp(layer.mlp, x)))
                continue
            a = self.norm(layer.attn_norm, x)
            o = self.norm(layer.attn_post_norm, self.attention(layer.attention, a))
            if layer.parallel:
                b = a if layer.mlp_norm is None else self.norm(layer.mlp_norm, x)
                # The order of the three differs between families: each order has two roundings.
                m = self.mlp(layer.mlp, b)
                total = x + o + m
                x = self.note(total, U * (x.abs() + o.abs() + m.abs() + total.abs()))
                continue
            x = self.add(a if layer.residual_normed else x, o)
            b = self.norm(layer.mlp_norm, x)
            x = self.add(b if layer.residual_normed else x, self.norm(layer.mlp_post_norm, self.mlp(layer.mlp, b)))
        x = self.norm(p.final_norm, x)
        if p.final_project is not None:
            x = self.linear(p.final_project, x)
        y = self.linear(p.lm_head, x) * p.logit_scale
        if p.logit_softcap:
            y = p.logit_softcap * torch.tanh(y / p.logit_softcap)
            y = self.note(y, torch.full_like(y, 6 * U * p.logit_softcap))
        return y

    def attention(self, a: Attention, x: torch.Tensor) -> torch.Tensor:
        row = torch.cat([self.linear(linear, x) for linear in a.qkv], -1)
        if a.clip:
            row = row.clamp(-a.clip, a.clip)
        q, k, v = (torch.stack([row[:, at : at + a.head_dim] for at in places]) for places in (a.q_at, a.k_at, a.v_at))
        q, k = (self.norm(norm, part.transpose(0, 1)).transpose(0, 1) for norm, part in ((a.q_norm, q), (a.k_norm, k)))
        if a.rope >= 0:
            q, k = (self.turned(part, a.rope) for part in (q, k))
        k, v = (self.note(part, self.rounding(part)) for part in (k, v))
        index = list(a.heads.kv_index)
        return self.linear(a.o, self.attended(a, q, k[index], v[index]).transpose(0, 1).flatten(1))

    def rounding(self, x: torch.Tensor) -> torch.Tensor:
        """Bound what a cache's dtype changes in keys or values [heads, T, D]."""
        if self.kv == "int8":
            return (x.abs().amax(-1, keepdim=True) / 254 * (1 + 2.0**-10)).expand_as(x)
        if self.kv == "fp32":
            return torch.zeros_like(x)
        return 2.0**-11 * x.abs() + 2.0**-25 if self.kv == "fp16" else 2.0**-8 * x.abs()

    def turned(self, x: torch.Tensor, index: int) -> torch.Tensor:
        (cos, sin), rope = self.turns[index], self.program.ropes[index]
        half = rope.dim // 2
        first = torch.arange(0, rope.dim, 2) if rope.interleaved else torch.arange(half)
        second = first + 1 if rope.interleaved else first + half
        a, b = x[..., first], x[..., second]
        y, error = x.clone(), torch.zeros_like(x)
        y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
        error[..., first] = error[..., second] = 5 * U * (a.abs() + b.abs()).detach()
        return self.note(y, error)

    def attended(self, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, width = q.shape[1], q.shape[2]
        distance = torch.arange(rows)[None, :] - torch.arange(rows)[:, None]
        seen = (distance <= 0) & (distance > -a.window) if a.window else distance <= 0
        s = a.scale * q @ k.mT
        error = (width + 6) * U * (a.scale * q.abs() @ k.abs().mT)
        if a.softcap:
            s = a.softcap * torch.tanh(s / a.softcap)
            error = error + 6 * U * a.softcap
        if a.alibi is not None:
            bias = a.alibi.double()[:, None, None] * distance
            # Others count positions from the start: their terms are slope * position.
            error = error + 6 * U * a.alibi.double()[:, None, None].abs() * rows
            s = s + bias
        s = s.masked_fill(~seen, float("-inf"))
        p = s.softmax(-1)
        reach = (s.amax(-1, keepdim=True) - s).clamp(max=88.0)
        error = torch.where(seen, error + U * reach, 0.0)
        spread = p * (error + (p * error).sum(-1, keepdim=True))
        slack = spread @ v.abs() + (2 * rows + 24) * U * (p @ v.abs())
        return self.note(p @ v, slack)

    def routed(self, moe: Moe, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(moe.router, x)
        count = logits.shape[1]
        chosen = logits.detach().topk(moe.top_k + 1).indices
        gap = logits.gather(1, chosen[:, -2:]).detach().diff().abs().min()
        assert float(gap) > 1e-3, "too near a tie of experts to compare"
        p = logits.softmax(-1)
        p = self.note(p, p * ((count + 6) * U + U * (logits.amax(-1, keepdim=True) - logits)))
        weights = p.gather(1, chosen[:, :-1])
        if moe.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
            weights = self.note(weights, (moe.top_k + 1) * U * weights)
        total, terms = torch.zeros_like(x), torch.zeros_like(x)
        parts = []
        for slot in range(moe.top_k):
            y = torch.stack([self.expert(moe, int(chosen[row, slot]), x[row : row + 1])[0] for row in range(len(x))])
            parts.append(weights[:, slot, None] * y)
        if moe.shared is not None:
            assert moe.shared_gate is not None
            gate = torch.sigmoid(self.linear(moe.shared_gate, x))
            parts.append(self.note(gate, 6 * U * gate) * self.mlp(moe.shared, x))
        for part in parts:
            total, terms = total + part, terms + part.abs()
        return self.note(total, (len(parts) + 2) * U * terms)

    def expert(self, moe: Moe, index: int, x: torch.Tensor) -> torch.Tensor:
        up, down = moe.experts.gate_up_proj.expert(index), moe.experts.down_proj.expert(index)
        gate, other = self.product(up, x).chunk(2, -1)
        y = _ACTIVATIONS[moe.experts.activation](gate) * other
        return self.product(down, self.note(y, 10 * U * (gate * other).abs() + U * y.abs()))

    def product(self, weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        return self.note(x @ dequantize(weight).double().T, linear_bound(x.detach().float(), weight, "fp32"))

    def mlp(self, mlp: Mlp | Moe, x: torch.Tensor) -> torch.Tensor:
        if isinstance(mlp, Moe):
            return self.routed(mlp, x)
        row = torch.cat([self.linear(linear, x) for linear in mlp.up], -1)
        if not mlp.gated:
            y = _ACTIVATIONS[mlp.activation](row)
            return self.linear(mlp.down, self.note(y, 10 * U * row.abs()))
        first, second = row.chunk(2, -1)
        gate, up = (second, first) if mlp.up_first else (first, second)
        y = _ACTIVATIONS[mlp.activation](gate) * up
        return self.linear(mlp.down, self.note(y, 10 * U * (gate * up).abs() + U * y.abs()))
