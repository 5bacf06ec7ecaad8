"""The ways to run one prompt and decode greedily after it, each timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from dist_lowbit.assembly.together import together
from dist_lowbit.comm import Group
from dist_lowbit.core.settings import settings

from .child import Child

Prompts = Sequence[Sequence[int]]


class Clock(Protocol):
    """Nanoseconds that all steps since the last reset spent where; decoder.native.Times. `reduce` holds `wait`."""

    @property
    def linear(self) -> int: ...
    @property
    def attention(self) -> int: ...
    @property
    def reduce(self) -> int: ...
    @property
    def wait(self) -> int: ...


@dataclass(frozen=True)
class Parts:
    """Seconds that all steps after the first token took on this rank: in products, in attention, in collectives, and
    of the latter waiting for other ranks; `total` is everything, with what lies around the kernels."""

    linear: float
    attention: float
    reduce: float
    wait: float
    total: float

    @property
    def outside(self) -> float:
        """Return what was spent outside kernels and collectives."""
        return self.total - self.linear - self.attention - self.reduce


@dataclass(frozen=True)
class Times:
    """Seconds: of the prompt and the first token, and of each further step; parts: of the latter, where known."""

    first: float
    steps: list[float]
    parts: Parts | None = None


class Runner(Protocol):
    """A way to run. All ranks call `run` together, with the same prompts of one length."""

    @property
    def how(self) -> str: ...
    @property
    def peer(self) -> str | None: ...

    def run(self, prompts: Prompts, new: int) -> Times:
        """Run prompts and `new` tokens after each, the most likely ones."""
        ...


class Loop(Protocol):
    """Sequences that grow together by their most likely tokens: engine.loop.DecodeLoop, or the one below."""

    def start(self, prompts: Prompts) -> list[int]: ...
    def go_on(self, tokens: Sequence[int]) -> list[int]: ...


class ForwardLoop:
    """Call a Hugging Face model's forward step by step, with its own cache."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._cache = model, DynamicCache()

    def start(self, prompts: Prompts) -> list[int]:
        """Begin anew and return the token after each prompt."""
        self._cache = DynamicCache()
        return self._step(torch.tensor(prompts))

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to each sequence and return the one that follows it."""
        return self._step(torch.tensor(tokens)[:, None])

    def _step(self, ids: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        chosen: list[int] = out.logits[:, -1].argmax(dim=-1).tolist()
        return chosen


class LoopRunner:
    """Run a loop of ours. clock: of its executor, to be read and reset; None where it has none."""

    peer = None

    def __init__(self, how: str, loop: Loop, clock: Callable[[bool], Clock] | None = None) -> None:
        self.how, self._loop, self._clock = how, loop, clock

    def run(self, prompts: Prompts, new: int) -> Times:
        """Run the loop (see Runner)."""
        steps: list[float] = []
        began = time.perf_counter()
        tokens = self._loop.start(prompts)
        first = time.perf_counter() - began
        if self._clock is not None:
            self._clock(True)
        before = time.perf_counter()
        for _ in range(new - 1):
            tokens = self._loop.go_on(tokens)
            now = time.perf_counter()
            steps.append(now - before)
            before = now
        return Times(first, steps, None if self._clock is None else _parts(self._clock(False), sum(steps)))


def _parts(clock: Clock, total: float) -> Parts:
    return Parts(clock.linear / 1e9, clock.attention / 1e9, clock.reduce / 1e9, clock.wait / 1e9, total)


class _Stamps(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when each token came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class GenerateRunner:
    """Call the model's own generate(), as users of Hugging Face do.

    beams: of each prompt; prompts / beams of them are run, so that a step has as many rows as without.
    """

    peer = None

    def __init__(self, model: nn.Module, beams: int = 1) -> None:
        self.how = "generate" if beams == 1 else f"generate, {beams} beams"
        self._model: Any = model
        self._beams = beams
        config: Any = model.generation_config
        config.eos_token_id, config.pad_token_id = None, 0  # random weights must not end a run early

    def run(self, prompts: Prompts, new: int) -> Times:
        """Generate (see Runner)."""
        ids, clock = torch.tensor(prompts[: len(prompts) // self._beams], device=self._model.device), _Stamps()
        criteria = StoppingCriteriaList([clock])
        began = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=self._beams,
                max_new_tokens=new,
                stopping_criteria=criteria,
            )
        at = clock.at
        return Times(at[0] - began, [later - before for before, later in pairwise(at)])


class LlamaCpp:
    """llama.cpp with random Q4_0 weights of a shape, in rank 0's child; the other ranks sleep meanwhile.

    All ranks call everything together. Close it, or use it as a context.
    """

    how = "llama_decode"
    peer = "llama.cpp"

    def __init__(self, config: dict[str, Any], group: Group, cpus: Sequence[int], rows: int, batch: int) -> None:
        """config: a Hugging Face config. cpus: those of all ranks. rows: tokens of a sequence, batch: sequences."""
        self._group, self._child = group, None
        self.weight_bytes = 0
        with together(group):
            if group.rank == 0:
                self._child = Child("llama.cpp", Path(__file__).with_name("llama_peer.py"), cpus, {})
                answer = self._child.ask(op="prepare", config=config, rows=rows, batch=batch)
                self.weight_bytes = int(answer["weight_bytes"])

    def run(self, prompts: Prompts, new: int) -> Times:
        """Have the child run (see Runner)."""
        answer: Any = None
        with together(self._group):
            if self._child is not None:
                answer = self._child.ask(op="run", prompts=[list(each) for each in prompts], new=new)
        answer = self._group.broadcast_object(answer, timeout=settings().load_timeout)
        return Times(answer["first"], answer["steps"])

    def peak_rss(self) -> int:
        """Return the most memory that the child has had resident, in bytes; 0 on ranks without it."""
        return int(self._child.ask(op="memory")["peak_rss_bytes"]) if self._child is not None else 0

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
