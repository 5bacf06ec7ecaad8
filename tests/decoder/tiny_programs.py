"""Tiny random programs of every shape that a decoder knows, and steps that run them. No model of Hugging Face's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_lowbit.comm import Group, SingleGroup
from dist_lowbit.decoder.blocks import BlockTables
from dist_lowbit.decoder.program import Attention, Layer, Mlp, Moe, Norm, Program, Rope
from dist_lowbit.decoder.step import Executor, Step
from dist_lowbit.formats import FORMATS, quantize
from dist_lowbit.formats.packed import merge, summation_block
from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding, Split
from dist_lowbit.parallel.experts import ExpertStack, LowBitExperts
from dist_lowbit.parallel.plan import Heads
from dist_lowbit.parallel.split import whole
from dist_lowbit.parallel.units import Range, rank_ranges

GROUP_SIZE = 32
VOCAB_UNIT = 64


@dataclass(frozen=True)
class Kind:
    """What a program is like; `layer`, `attention` and `program` are fields that go to those values as they are."""

    name: str
    format: str = "sym_int4"
    compute: str = "int8"
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 192
    vocab: int = 200
    layers: int = 2
    norm: str = "rms"
    bias: bool = False
    fused: bool = False
    gated: bool = True
    up_first: bool = False
    activation: str = "silu"
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    rope: dict[str, Any] | None = field(default_factory=lambda: {"dim": 32, "interleaved": False})
    head_norms: str = ""  # "one" for all heads, "each" for every head
    alibi: bool = False
    window: int = 0
    embed_width: int = 0
    positions: bool = False
    embed_norm: bool = False
    experts: int = 0
    shared: int = 0  # the inner size of a shared expert
    shared_gate: bool = False
    top_k: int = 2
    layer: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)


class Builder:
    """Builds one rank's program; the numbers go by the names of the parts, so they are the same on every rank."""

    def __init__(self, kind: Kind, group: Group | None = None) -> None:
        self.kind, self.group = kind, group or SingleGroup()
        self.tp = self.group.size

    def numbers(self, name: str, *shape: int) -> torch.Tensor:
        """Return normal numbers that depend on the name alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.kind.name} {name}".encode()))
        return torch.randn(*shape, generator=generator)

    def linear(
        self,
        name: str,
        n: int,
        k: int,
        axis: int | None = None,
        ranges: Sequence[tuple[Range, ...]] = (),
        unit: int = 0,
        gather: bool = False,
        format: str = "",
        compute: str = "",
    ) -> LowBitLinear:
        """Return this rank's part of a random Linear [n, k]."""
        row = FORMATS[format or self.kind.format]
        weight = quantize(self.numbers(name, n, k) / k**0.5, row.name, GROUP_SIZE if row.grouped else None)
        unit = unit or weight.block
        bias = 0.1 * self.numbers(f"{name} bias", n) if self.kind.bias else None
        split = whole((n, k), unit, self.tp)
        if axis is not None and self.tp > 1:
            split = Split((n, k), axis, tuple(ranges), unit, gather)
            held = ranges[self.group.rank]
            weight = merge([weight.split(axis, start, stop) for start, stop in held], axis)
            if bias is not None and axis == 0:
                bias = torch.cat([bias[start:stop] for start, stop in held])
        return LowBitLinear(weight, bias, split, self.group, compute or self.kind.compute)

    def norm(self, name: str, size: int, heads: int = 0) -> Norm:
        """Return a random norm."""
        shape = (heads, size) if heads else (size,)
        bias = None if self.kind.norm == "rms" or heads else 0.1 * self.numbers(f"{name} bias", size)
        return Norm(self.kind.norm, 1 + 0.1 * self.numbers(name, *shape), bias, 1e-5)

    @property
    def block(self) -> int:
        """Return the summation block of the format."""
        row = FORMATS[self.kind.format]
        return summation_block(GROUP_SIZE if row.grouped else -1)

    def attention(self, at: str) -> Attention:
        """Return a layer's attention, its heads cut over the ranks at the units of the output."""
        kind, size = self.kind, self.kind.head_dim
        group = kind.heads // kind.kv_heads
        unit = math.lcm(size, self.block)
        query = rank_ranges(kind.heads * size, unit, self.tp)
        kv = [(a // size // group * size, ((b // size - 1) // group + 1) * size) if b > a else (0, 0) for a, b in query]
        first, last = (edge // size for edge in query[self.group.rank])
        low, high = (edge // size for edge in kv[self.group.rank])
        heads = Heads(last - first, high - low, tuple(head // group - low for head in range(first, last)))
        q_rows, kv_rows = kind.heads * size, kind.kv_heads * size
        if kind.fused:
            pieces = [((a, b), (q_rows + c, q_rows + d), (q_rows + kv_rows + c, q_rows + kv_rows + d))
                      for (a, b), (c, d) in zip(query, kv, strict=True)]  # fmt: skip
            qkv = (self.linear(f"{at} qkv", q_rows + 2 * kv_rows, kind.hidden, 0, pieces),)
        else:
            qkv = tuple(
                self.linear(f"{at} {name}", rows, kind.hidden, 0, [(piece,) for piece in cut])
                for name, rows, cut in (("q", q_rows, query), ("k", kv_rows, kv), ("v", kv_rows, kv))
            )  # type: ignore[assignment]
        keys, values = heads.heads * size, (heads.heads + heads.kv_heads) * size
        counts = {"q": (kind.heads, first, heads.heads), "k": (kind.kv_heads, low, heads.kv_heads)}
        norms: dict[str, Norm] = {}
        for name, (total, start, count) in counts.items():
            if kind.head_norms:
                whole_norm = self.norm(f"{at} {name}_norm", size, total if kind.head_norms == "each" else 0)
                weight = whole_norm.weight[start : start + count] if kind.head_norms == "each" else whole_norm.weight
                norms[f"{name}_norm"] = Norm(whole_norm.kind, weight, whole_norm.bias, whole_norm.eps)
        return Attention(
            qkv=qkv,
            o=self.linear(f"{at} o", kind.hidden, q_rows, 1, [(piece,) for piece in query], unit),
            heads=heads,
            head_dim=size,
            q_at=tuple(i * size for i in range(heads.heads)),
            k_at=tuple(keys + i * size for i in range(heads.kv_heads)),
            v_at=tuple(values + i * size for i in range(heads.kv_heads)),
            scale=size**-0.5,
            rope=-1 if kind.rope is None else 0,
            window=kind.window if at.endswith("0") else 0,
            alibi=torch.tensor([2.0 ** -(1 + h) for h in range(first, last)]) if kind.alibi else None,
            **norms,
            **kind.attention,
        )

    def mlp(self, at: str, inner: int, bias: bool = True) -> Mlp:
        """Return an MLP, cut along its inner axis."""
        kind, cut = self.kind, rank_ranges(inner, self.block, self.tp)
        once, twice = [(piece,) for piece in cut], [((a, b), (inner + a, inner + b)) for a, b in cut]
        if not kind.gated:
            up: tuple[LowBitLinear, ...] = (self.linear(f"{at} up", inner, kind.hidden, 0, once),)
        elif kind.fused:
            up = (self.linear(f"{at} gate_up", 2 * inner, kind.hidden, 0, twice),)
        else:
            up = tuple(self.linear(f"{at} {name}", inner, kind.hidden, 0, once) for name in ("gate", "up"))
        down = self.linear(f"{at} down", kind.hidden, inner, 1, once)
        return Mlp(up, down, kind.activation, kind.gated, kind.up_first)

    def stack(self, name: str, n: int, k: int, axis: int, ranges: Sequence[tuple[Range, ...]]) -> ExpertStack:
        """Return this rank's part of a matrix of every expert; ranges are those of one expert."""
        kind = self.kind
        weight = quantize(self.numbers(name, kind.experts * n, k) / k**0.5, kind.format, GROUP_SIZE)
        split = whole((kind.experts * n, k), GROUP_SIZE, self.tp)
        if self.tp > 1:
            held = list(ranges)
            if axis == 0:
                held = [tuple((e * n + a, e * n + b) for e in range(kind.experts) for a, b in one) for one in ranges]
            split = Split((kind.experts * n, k), axis, tuple(held), GROUP_SIZE)
            weight = merge([weight.split(axis, a, b) for a, b in held[self.group.rank]], axis)
        return ExpertStack(weight, kind.experts, split, self.group, kind.compute)

    def moe(self, at: str) -> Moe:
        """Return routed experts."""
        kind = self.kind
        cut = rank_ranges(kind.inner, GROUP_SIZE, self.tp)
        once, twice = [(piece,) for piece in cut], [((a, b), (kind.inner + a, kind.inner + b)) for a, b in cut]
        experts = LowBitExperts(
            self.stack(f"{at} experts up", 2 * kind.inner, kind.hidden, 0, twice),
            self.stack(f"{at} experts down", kind.hidden, kind.inner, 1, once),
            kind.activation,
            kind.top_k,
        )
        router = self.linear(f"{at} router", kind.experts, kind.hidden, format="fp32", compute="fp32")
        shared = self.mlp(f"{at} shared", kind.shared) if kind.shared else None
        gate = None
        if kind.shared_gate:
            gate = self.linear(f"{at} shared gate", 1, kind.hidden, format="fp32", compute="fp32")
        return Moe(router, experts, kind.top_k, True, shared, gate)

    def program(self) -> Program:
        """Return the program of this rank."""
        kind = self.kind
        width = kind.embed_width or kind.hidden
        rows = rank_ranges(kind.vocab, VOCAB_UNIT, self.tp)
        table = self.numbers("embed", kind.vocab, width).to(torch.float16)
        split = whole((kind.vocab, width), 1, 1)
        if self.tp > 1:
            split = Split((kind.vocab, width), 0, tuple((piece,) for piece in rows), 1)
            table = table[rows[self.group.rank][0] : rows[self.group.rank][1]].clone()
        layers = tuple(
            Layer(
                attention=self.attention(f"layer {i}"),
                mlp=self.moe(f"layer {i}") if kind.experts else self.mlp(f"layer {i}", kind.inner),
                **{name: self.norm(f"layer {i} {name}", kind.hidden) if name in kind.norms else None
                   for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")},
                **kind.layer,
            )
            for i in range(kind.layers)
        )  # fmt: skip
        rope = None if kind.rope is None else Rope(inv_freq=_frequencies(kind.rope["dim"]), **kind.rope)
        project = {
            "embed_project": self.linear("embed_project", kind.hidden, width),
            "final_project": self.linear("final_project", width, kind.hidden),
        }
        return Program(
            hidden=kind.hidden,
            vocab=kind.vocab,
            embed=ParallelEmbedding(table, split, self.group, torch.float32),
            layers=layers,
            final_norm=self.norm("final_norm", kind.hidden) if "final" not in kind.norms else None,
            lm_head=self.linear("lm_head", kind.vocab, width, 0, [(piece,) for piece in rows], gather=True),
            ropes=() if rope is None else (rope,),
            embed_norm=self.norm("embed_norm", kind.hidden) if kind.embed_norm else None,
            positions=self.numbers("positions", 700, kind.hidden) if kind.positions else None,
            **(project if kind.embed_width else {}),
            **kind.program,
        )


def _frequencies(dim: int) -> torch.Tensor:
    return 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)


class Runner:
    """An executor with its own cache: feeds it tokens of numbered sequences and keeps the logits of every row."""

    def __init__(self, executor: Executor, program: Program, sequences: int, dtype: str = "fp32") -> None:
        self.executor, self.program = executor, program
        self.blocks = BlockTables(program, dtype)
        self.blocks.start(sequences)
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(sequences)]

    def feed(self, tokens: dict[int, list[int]], logits: bool = True, last_only: bool = False) -> torch.Tensor:
        """Run one step with new tokens of some sequences."""
        step = self.step(tokens, last_only)
        out = self.executor.step(step, logits)
        if logits and not last_only:
            at = 0
            for sequence, ids in tokens.items():
                self.logits[sequence] += list(out[at : at + len(ids)])
                at += len(ids)
        return out

    def step(self, tokens: dict[int, list[int]], last_only: bool = False) -> Step:
        """Return the step that new tokens make."""
        positions: list[int] = []
        begins = [0]
        for sequence, ids in tokens.items():
            start = self.blocks.lengths[sequence]
            positions += range(start, start + len(ids))
            self.blocks.extend(sequence, len(ids))
            begins.append(begins[-1] + len(ids))
        chosen = list(tokens)
        return Step(
            ids=torch.tensor([token for ids in tokens.values() for token in ids], dtype=torch.int32),
            embeds=None,
            positions=torch.tensor(positions, dtype=torch.int32),
            row_begin=torch.tensor(begins, dtype=torch.int32),
            lengths=torch.tensor([self.blocks.lengths[s] for s in chosen], dtype=torch.int32),
            table=self.blocks.table(chosen),
            wanted=torch.tensor(begins[1:]) - 1 if last_only else torch.arange(begins[-1]),
            store=self.blocks.store,
        )

    def all(self, sequence: int = 0) -> torch.Tensor:
        """Return the logits of every token that a sequence was fed, [tokens, vocab]."""
        return torch.stack(self.logits[sequence])


def tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    """Return random ids."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed(executor: Executor, kind: Kind, program: Any, dtype: str = "fp32") -> torch.Tensor:
    """Return the logits of two sequences: one prefilled, then steps of one's decode row and the other's prefill."""
    text = tokens(40, kind.vocab)
    runner = Runner(executor, program, 2, dtype)
    runner.feed({0: text[:33]})
    runner.feed({0: text[33:34], 1: text[3:9]})
    for token in text[34:]:
        runner.feed({1: [token], 0: [token]})
    return torch.cat([runner.all(0), runner.all(1)])
