"""The roles a matrix can play in a decoder. Names of roles are the words that families use; no model is named.

A role says which axis of the model cuts the matrix, on which side, and of which pieces its outputs are made.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """side "out" cuts N, "in" cuts K. pieces: the dimensions that lie one after the other along the cut axis.

    A dimension is "q" (query heads), "kv" (key/value heads), "mlp" (intermediate) or "vocab". by_head: the pieces come
    once per key/value head (its queries, key, value) instead of once in all. stacked: the matrices of all experts, one
    above the other; each is cut alike.
    """

    side: str
    pieces: tuple[str, ...]
    gather: bool = False
    by_head: bool = False
    stacked: bool = False


ROLES = {
    "q": Role("out", ("q",)),
    "kv": Role("out", ("kv",)),
    "qkv": Role("out", ("q", "kv", "kv")),
    "qkv_by_head": Role("out", ("q", "kv", "kv"), by_head=True),
    "o": Role("in", ("q",)),
    "up": Role("out", ("mlp",)),
    "gate_up": Role("out", ("mlp", "mlp")),
    "down": Role("in", ("mlp",)),
    "expert_gate_up": Role("out", ("mlp", "mlp"), stacked=True),
    "expert_down": Role("in", ("mlp",), stacked=True),
    "embed": Role("out", ("vocab",)),
    "lm_head": Role("out", ("vocab",), gather=True),
}
WHOLE = "whole"  # on every rank in full
