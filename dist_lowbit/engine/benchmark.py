"""Time the tokens of Hugging Face's generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from dist_lowbit.core.errors import UsageError


class BenchmarkWrapper:
    """Stand in for a model and time each token that its `generate` makes, with beams and any sampling.

    model: with a `generate` that calls it once for each token (prefill in one piece). After a generate, `first_cost` is
    the seconds until the first token, `rest_costs` those of each further one and `rest_cost_mean` their mean (0 where
    there was one token); None before. do_print: say so on stdout. Everything else is the model's own.
    """

    def __init__(self, model: nn.Module, do_print: bool = True, out: Callable[[str], None] = print) -> None:
        if not hasattr(model, "generate"):
            raise UsageError(f"BenchmarkWrapper takes a model that generates; {type(model).__name__} has no generate")
        self.model, self.do_print = model, do_print
        self._out = out
        self.first_cost: float | None = None
        self.rest_cost_mean: float | None = None
        self.rest_costs: list[float] = []

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # while this object is being made or copied
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the model's generate does, and note the time of every token."""
        ends: list[float] = []
        hook = self.model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
        started = time.perf_counter()
        try:
            result = self.model.generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            hook.remove()
        if ends:
            self.first_cost = ends[0] - started
            self.rest_costs = [later - earlier for earlier, later in pairwise(ends)]
            self.rest_cost_mean = sum(self.rest_costs) / len(self.rest_costs) if self.rest_costs else 0.0
            if self.do_print:
                self._out(f"First token cost {self.first_cost:.4f} s, rest tokens {self.rest_cost_mean:.4f} s each")
        return result
