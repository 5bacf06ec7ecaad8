"""Floor 3: how a model is cut over ranks, as arithmetic, and the Linear that runs a cut."""

from .embedding import ParallelEmbedding
from .linear import LowBitLinear
from .plan import Plan, make_plan, whole_plan
from .split import Split, owned_ranges
from .units import segment_cuts

__all__ = [
    "LowBitLinear",
    "ParallelEmbedding",
    "Plan",
    "Split",
    "make_plan",
    "owned_ranges",
    "segment_cuts",
    "whole_plan",
]
