"""Rotary embeddings and ALiBi: tables from a config, as Hugging Face's functions compute them. Both executors take
their cosines and sines from here, so they rotate by the same numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_lowbit.core.errors import PlanError, UsageError

from .program import Rope, RopeOfLength

# Kinds whose frequencies depend on how long a sequence has become.
_BY_LENGTH = ("dynamic", "longrope")


def make_rope(config: Any, head_dim: int, interleaved: bool, dim: int = 0) -> Rope:
    """Return the rotary embedding that a Hugging Face config describes; an unknown kind is a PlanError.

    dim: how many elements of a head turn, where the config's rope_parameters do not say it.
    """
    told = dict(getattr(config, "rope_parameters", None) or {})
    kind = told.get("rope_type", "default")
    if kind == "default":
        turned = dim or int(head_dim * told.get("partial_rotary_factor", 1.0))
        base = told.get("rope_theta", 10000.0)
        return plain_rope(turned, interleaved, base)
    if kind not in ROPE_INIT_FUNCTIONS:
        raise PlanError(f"rope_type is {kind!r}; expected one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    inverse = inverse.float()
    dynamic = _by_length(config, kind, told) if kind in _BY_LENGTH else None
    return Rope(2 * inverse.numel(), interleaved, inverse, float(scaling), dynamic)


def plain_rope(dim: int, interleaved: bool, base: float) -> Rope:
    """Return the rotary embedding of the paper (Su et al., 2021): frequencies base^(-2i / dim)."""
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    return Rope(dim, interleaved, inverse)


def limited(rope: Rope, longest: int) -> Rope:
    """Return a rope that refuses positions from `longest` on with a UsageError; 0 is no limit."""
    if not longest:
        return rope

    def of_length(highest: int) -> tuple[torch.Tensor, float]:
        if highest >= longest:
            raise UsageError(f"a sequence has {highest + 1} tokens; this model is computed here up to {longest}")
        return rope.inv_freq, rope.scaling

    return replace(rope, dynamic=of_length)


def _by_length(config: Any, kind: str, told: dict[str, Any]) -> RopeOfLength:
    """Return the function from a sequence's highest position to its frequencies."""
    original = told.get("original_max_position_embeddings") or config.max_position_embeddings
    limit = original if kind == "longrope" else config.max_position_embeddings

    def of_length(highest: int) -> tuple[torch.Tensor, float]:
        # Below the limit dynamic NTK is the plain rope; above it the length itself counts, for longrope only that it is
        # above.
        length = highest + 1
        shown = (original + 1 if length > limit else None) if kind == "longrope" else max(length, limit)
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=shown)
        return inverse.float(), float(scaling)

    return of_length


def rope_table(rope: Rope, positions: torch.Tensor, row_begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, fp32 [R, dim / 2] each, for a step's rows (positions [R], row_begin [S + 1]).

    angle = fp32(position) * inv_freq in fp32, as Hugging Face computes it; cos and sin of it in fp64, rounded to fp32,
    times the scaling in fp32. Frequencies that depend on the length go by each sequence's own, so that a row does not
    know its neighbours. On the cpu.
    """
    angle = positions.cpu().float()[:, None] * rope.inv_freq.cpu()
    factor = torch.full((positions.numel(), 1), rope.scaling, dtype=torch.float32, device="cpu")
    if rope.dynamic is not None:
        begins = row_begin.tolist()
        for start, stop in itertools.pairwise(begins):
            own = positions[start:stop].cpu()
            inverse, scaling = rope.dynamic(int(own.max()))
            angle[start:stop] = own.float()[:, None] * inverse
            factor[start:stop] = scaling
    wide = angle.double()
    return wide.cos().float() * factor, wide.sin().float() * factor


def alibi_slopes(heads: int, highest: float = 8.0) -> torch.Tensor:
    """Return ALiBi's slopes, fp32 [heads] (Press et al., 2022): 2^(-highest i / heads), i = 1 ...

    A number of heads that is no power of two takes the slopes of the next lower one, then every other one of the next
    higher.
    """
    lower = 2 ** math.floor(math.log2(heads))

    def slopes(count: int) -> torch.Tensor:
        powers = [2.0 ** (-highest * i / count) for i in range(1, count + 1)]
        return torch.tensor(powers, dtype=torch.float64, device="cpu")

    return torch.cat([slopes(lower), slopes(2 * lower)[::2]])[:heads].float()
