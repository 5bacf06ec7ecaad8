"""An executor of torch operations, on any device: the definition that the native one is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_lowbit.ops.elementwise import route
from dist_lowbit.parallel import LowBitLinear

from .program import Attention, Layer, Mlp, Moe, Program
from .rope import rope_table
from .step import KvStore, Step
from .torch_steps import (
    activated,
    activated_gate,
    attended,
    heads_of,
    normed,
    read_rows,
    rotated,
    softcapped,
    write_rows,
)


@dataclass(frozen=True)
class _Rows:
    """What all layers of a step share: cos and sin of every rope, and each sequence's rows, length and blocks."""

    turns: list[tuple[torch.Tensor, torch.Tensor]]
    sequences: list[tuple[int, int, int, torch.Tensor]]  # first row, last row + 1, length, blocks
    store: KvStore


class TorchDecoder:
    """Run a program with torch operations (see program.py for the formula).

    On the cpu each step has fixed bits: a row's result depends on its sequence alone. Not made fast.
    """

    name = "torch"

    def __init__(self, program: Program) -> None:
        self.program = program

    @staticmethod
    def why_not(program: Program, store_dtype: str, device: str) -> str | None:
        """Return None: any program, cache and device will do."""
        return None

    def close(self) -> None:
        """Do nothing: nothing is held beside the program."""

    def step(self, step: Step, logits: bool) -> torch.Tensor:
        """Run a step (see Executor.step)."""
        program = self.program
        x = self._embedded(step)
        begins, lengths = step.row_begin.tolist(), step.lengths.tolist()
        rows = _Rows(
            [tuple(t.to(x.device) for t in rope_table(r, step.positions, step.row_begin)) for r in program.ropes],  # type: ignore[misc]
            [(begins[s], begins[s + 1], lengths[s], step.table[s]) for s in range(len(lengths))],
            step.store,
        )
        for index, layer in enumerate(program.layers):
            x = self._layer(layer, index, x, rows)
        x = normed(program.final_norm, x[step.wanted])
        if program.final_project is not None:
            x = program.final_project(x)
        if not logits:
            return x
        y = program.lm_head(x)
        if program.logit_scale != 1.0:
            y = y * program.logit_scale
        return softcapped(y, program.logit_softcap)

    def _embedded(self, step: Step) -> torch.Tensor:
        program = self.program
        if step.embeds is not None:
            x = step.embeds.float()
        else:
            assert step.ids is not None
            x = program.embed(step.ids.long())
            if program.embed_scale != 1.0:
                x = x * program.embed_scale
        if program.embed_project is not None:
            x = program.embed_project(x)
        if program.positions is not None:
            x = x + program.positions[step.positions.long() + program.position_offset]
        return normed(program.embed_norm, x)

    def _layer(self, layer: Layer, index: int, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        if layer.norm_after:
            x = normed(layer.attn_norm, x + self._attention(layer.attention, index, x, rows))
            return normed(layer.mlp_norm, x + self._mlp(layer.mlp, x))
        a = normed(layer.attn_norm, x)
        o = normed(layer.attn_post_norm, self._attention(layer.attention, index, a, rows))
        if layer.parallel:
            m = self._mlp(layer.mlp, a if layer.mlp_norm is None else normed(layer.mlp_norm, x))
            return x + (o + normed(layer.mlp_post_norm, m))
        x = (a if layer.residual_normed else x) + o
        b = normed(layer.mlp_norm, x)
        return (b if layer.residual_normed else x) + normed(layer.mlp_post_norm, self._mlp(layer.mlp, b))

    def _attention(self, a: Attention, index: int, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        row = _side_by_side(a.qkv, x)
        if a.clip > 0:
            row = row.clamp(-a.clip, a.clip)
        q, k, v = (heads_of(row, at, a.head_dim) for at in (a.q_at, a.k_at, a.v_at))
        q, k = normed(a.q_norm, q), normed(a.k_norm, k)
        if a.rope >= 0:
            rope = self.program.ropes[a.rope]
            q, k = (rotated(part, *rows.turns[a.rope], rope.interleaved) for part in (q, k))
        out = x.new_zeros(x.shape[0], a.heads.heads * a.head_dim)
        index_of = torch.tensor(a.heads.kv_index, dtype=torch.int32, device=x.device)
        for first, last, length, table in rows.sequences if a.heads.heads else ():
            write_rows(rows.store, index, table, length - (last - first), k[first:last], v[first:last])
            keys, values = read_rows(rows.store, index, table, length)
            out[first:last] = attended(a, q[first:last], keys, values, index_of)
        return a.o(out)  # type: ignore[no-any-return]

    def _mlp(self, mlp: Mlp | Moe, x: torch.Tensor) -> torch.Tensor:
        if isinstance(mlp, Moe):
            return self._routed(mlp, x)
        row = _side_by_side(mlp.up, x)
        if not mlp.gated:
            return mlp.down(activated(mlp.activation, row))  # type: ignore[no-any-return]
        first, second = row.chunk(2, -1)
        gate, up = (second, first) if mlp.up_first else (first, second)
        return mlp.down(activated_gate(mlp.activation, gate, up))  # type: ignore[no-any-return]

    def _routed(self, moe: Moe, x: torch.Tensor) -> torch.Tensor:
        ids, weights = route(moe.router(x), moe.top_k, moe.renormalise)
        if moe.shared is None:
            return moe.experts.weighted_sum(x, ids, weights)
        # The shared expert is the last one, in a slot of its own.
        own = ids.new_full((len(x), 1), moe.experts.down_proj.experts)
        factor = weights.new_ones(len(x), 1)
        if moe.shared_gate is not None:
            factor = activated("sigmoid", moe.shared_gate(x))
        ids, weights = torch.cat((ids, own), 1), torch.cat((weights, factor), 1)
        return moe.experts.weighted_sum(x, ids, weights, (*moe.shared.up, moe.shared.down))


def _side_by_side(linears: tuple[LowBitLinear, ...], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([linear(x) for linear in linears], -1) if len(linears) > 1 else linears[0](x)
