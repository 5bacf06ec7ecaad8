"""How the next token is chosen. Imports nothing heavy: the command line asks it first."""

from __future__ import annotations

from dataclasses import dataclass

from dist_lowbit.core.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or drawn by temperature, top_k and top_p."""

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None  # None: rank 0 draws one for all

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(
                f"temperature is {self.temperature}; expected more than 0, or greedy decoding instead",
                argument="temperature",
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected more than 0 and at most 1", argument="top_p")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; expected 0 to 2^63 - 1", argument="seed")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; expected 0 (off) or more", argument="top_k")


def check_limit(max_new_tokens: int) -> None:
    """Refuse a limit of tokens that leaves nothing to generate."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1", argument="max_new_tokens")
