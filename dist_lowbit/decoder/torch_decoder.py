"""An executor of torch operations, on any device: the definition that the native one is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_lowbit.parallel import LowBitLinear

from .placement import placed
from .program import Attention, Layer, Mlp, Moe, Program
from .rope import rope_table
from .step import KvStore, Step
from .torch_steps import FixedSteps, PlainSteps, Steps, heads_of, normed, read_rows, rotated, routed, write_rows


@dataclass(frozen=True)
class _Rows:
    """What all layers of a step share: cos and sin of every rope, and each sequence's rows, length and blocks."""

    turns: list[tuple[torch.Tensor, torch.Tensor]]
    sequences: list[tuple[int, int, int, torch.Tensor]]  # first row, last row + 1, length, blocks
    store: KvStore


class TorchDecoder:
    """Run a program with torch operations (see program.py for the formula).

    On the cpu each step has fixed bits: a row's result depends on its sequence alone. On another device (such as
    "cuda" or "xpu") the weights are moved there, still packed, and one matrix at a time is dequantized where no kernel
    takes its codes; activations are not rounded to int8 there, and results agree within rounding. Not made fast.
    """

    name = "torch"

    def __init__(self, program: Program, device: str = "cpu", plain: bool = False) -> None:
        """plain: use torch's own norms, activations and attention on the cpu, too."""
        elsewhere = torch.device(device).type != "cpu"
        self.program = placed(program, torch.device(device)) if elsewhere else program
        self.device = self.program.embed.weight.device
        self.steps: Steps = PlainSteps() if plain or elsewhere else FixedSteps()

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
            [(begins[s], begins[s + 1], lengths[s], step.table[s].to(x.device)) for s in range(len(lengths))],
            step.store,
        )
        for index, layer in enumerate(program.layers):
            x = self._layer(layer, index, x, rows)
        x = normed(self.steps, program.final_norm, x[step.wanted.to(x.device)])
        if program.final_project is not None:
            x = program.final_project(x)
        if not logits:
            return x
        y = program.lm_head(x)
        if program.logit_scale != 1.0:
            y = y * program.logit_scale
        return self.steps.softcap(y, program.logit_softcap) if program.logit_softcap > 0 else y

    def _embedded(self, step: Step) -> torch.Tensor:
        program = self.program
        if step.embeds is not None:
            x = step.embeds.float().to(self.device)
        else:
            assert step.ids is not None
            x = program.embed(step.ids.long().to(self.device))
            if program.embed_scale != 1.0:
                x = x * program.embed_scale
        if program.embed_project is not None:
            x = program.embed_project(x)
        if program.positions is not None:
            x = x + program.positions[step.positions.long().to(x.device) + program.position_offset]
        return normed(self.steps, program.embed_norm, x)

    def _layer(self, layer: Layer, index: int, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        if layer.norm_after:
            x = normed(self.steps, layer.attn_norm, x + self._attention(layer.attention, index, x, rows))
            return normed(self.steps, layer.mlp_norm, x + self._mlp(layer.mlp, x))
        a = normed(self.steps, layer.attn_norm, x)
        o = normed(self.steps, layer.attn_post_norm, self._attention(layer.attention, index, a, rows))
        base = a if layer.residual_normed else x
        if layer.parallel:
            m = self._mlp(layer.mlp, a if layer.mlp_norm is None else normed(self.steps, layer.mlp_norm, x))
            return base + (o + normed(self.steps, layer.mlp_post_norm, m))
        x = base + o
        b = normed(self.steps, layer.mlp_norm, x)
        return (b if layer.residual_normed else x) + normed(self.steps, layer.mlp_post_norm, self._mlp(layer.mlp, b))

    def _attention(self, a: Attention, index: int, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        row = _side_by_side(a.qkv, x)
        if a.clip > 0:
            row = row.clamp(-a.clip, a.clip)
        q, k, v = (heads_of(row, at, a.head_dim) for at in (a.q_at, a.k_at, a.v_at))
        q, k = normed(self.steps, a.q_norm, q), normed(self.steps, a.k_norm, k)
        if a.rope >= 0:
            rope = self.program.ropes[a.rope]
            q, k = (rotated(part, *rows.turns[a.rope], rope.interleaved) for part in (q, k))
        out = x.new_zeros(x.shape[0], a.heads.heads * a.head_dim)
        index_of = torch.tensor(a.heads.kv_index, dtype=torch.int32, device=x.device)
        for first, last, length, table in rows.sequences if a.heads.heads else ():
            write_rows(rows.store, index, table, length - (last - first), k[first:last], v[first:last])
            keys, values = read_rows(rows.store, index, table, length)
            out[first:last] = self.steps.attend(a, q[first:last], keys, values, index_of)
        return a.o(out)  # type: ignore[no-any-return]

    def _mlp(self, mlp: Mlp | Moe, x: torch.Tensor) -> torch.Tensor:
        if isinstance(mlp, Moe):
            return routed(self.steps, mlp, x)
        row = _side_by_side(mlp.up, x)
        if not mlp.gated:
            return mlp.down(self.steps.activation(mlp.activation, row))  # type: ignore[no-any-return]
        first, second = row.chunk(2, -1)
        gate, up = (second, first) if mlp.up_first else (first, second)
        return mlp.down(self.steps.gated(mlp.activation, gate, up))  # type: ignore[no-any-return]


def _side_by_side(linears: tuple[LowBitLinear, ...], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([linear(x) for linear in linears], -1) if len(linears) > 1 else linears[0](x)
