"""Measure a whole model: the prompt, then one token at a time, beside Hugging Face's generate and llama.cpp."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from dist_lowbit import ops
from dist_lowbit.assembly.mode import Mode
from dist_lowbit.comm import Group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.decoder.backbone import FusedBackbone
from dist_lowbit.engine.generate import peak_rss
from dist_lowbit.engine.loop import DecodeLoop, backbone_of
from dist_lowbit.formats.packed import part_layout
from dist_lowbit.models import FAMILIES
from dist_lowbit.parallel import LowBitLinear
from dist_lowbit.parallel.experts import ExpertStack

from .machine import MemoryReader, beyond_cache, kernels_on, require_kernels
from .random_model import make_model
from .random_weights import generator
from .runners import ForwardLoop, GenerateRunner, LlamaCpp, LoopRunner, Parts, Prompts, Runner, Times
from .shapes import config_of

_WARM = 2  # tokens of the run that makes a way's caches and wakes its threads


@dataclass(frozen=True)
class Run:
    """What to measure. threads: of each rank. prompt, new: tokens of each of `batch` sequences. rounds: of turns.

    num_beams: more than 1 also measures generate() with so many beams for each of batch / num_beams prompts.
    """

    shape: str
    low_bit: str | None = None
    group_size: int | None = None
    threads: int = 1
    prompt: int = 256
    new: int = 64
    batch: int = 1
    peer: bool = False
    rounds: int = 3
    breakdown: bool = False
    num_beams: int = 1


@dataclass(frozen=True)
class RankParts:
    """Where one rank's time of a step goes, milliseconds: reduce without wait, outside: around the kernels."""

    rank: int
    linear_ms: float
    attention_ms: float
    reduce_ms: float
    wait_ms: float
    outside_ms: float


@dataclass(frozen=True)
class Breakdown:
    """Every rank's parts of a step, and the rank that waits least: the one that the others wait for."""

    ranks: list[RankParts]
    slowest: int


@dataclass(frozen=True)
class Line:
    """One result; benchmarks/README.md explains each field."""

    shape: str
    low_bit: str
    group_size: int
    how: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p90_ms: float
    itl_p99_ms: float
    peak_rss_bytes: int
    read_gbps: float
    fraction_of_read: float
    outside_kernels_fraction: float | None
    threads: int
    tp: int
    batch: int
    prompt: int
    new: int
    peer: str | None
    slowest_decode_tokens_per_s: float
    fastest_decode_tokens_per_s: float
    rounds: int
    breakdown: Breakdown | None


@dataclass(frozen=True)
class Entrant:
    """A runner with what is known of it: its weights' form, and the bytes that a step reads and that it holds at most.

    Both are sums over all ranks.
    """

    runner: Runner
    low_bit: str
    group_size: int
    step_bytes: int
    peak_rss_bytes: int


def run(what: Run, group: Group, mode: Mode, read_bytes: int | None = None) -> Iterator[Line]:
    """Build the model, measure every way to run it in turns, and yield a line for each, on all ranks.

    All ranks must call together. Ours come first: the decoder's own loop where the model runs on it, else Hugging
    Face's forward; then generate(), then the peer. Cost: the model, a gigabyte to read (read_bytes, for
    tests), and the peer's own model.
    """
    require_kernels()
    ops.limit_torch()  # this process is ours: the cores belong to the kernels' own pool
    _check(what)
    with kernels_on(None, what.threads) as plan, ExitStack() as stack:
        subject = make_model(what.shape, what.low_bit, what.group_size, group, _with_cache(what.shape, mode))
        prompts = _prompts(what, int(subject.config.vocab_size))
        ours: list[Runner] = [own_loop(subject.model), GenerateRunner(subject.model)]
        if what.num_beams > 1:
            ours.append(GenerateRunner(subject.model, what.num_beams))
        for runner in ours:
            warm = runner.run(prompts, _WARM)
            if what.breakdown and runner is ours[0] and warm.parts is None:
                raise UsageError(f"--breakdown needs the compiled decoder, and {what.shape} runs by: {runner.how}")
        own = _sum(group, weight_bytes(subject.model, what.batch))
        peak = _sum(group, peak_rss())  # before the buffer that bandwidth is measured with
        entrants = [Entrant(runner, subject.low_bit, subject.group_size, own, peak) for runner in ours]
        if what.peer:
            cpus = [int(cpu) for cpus in group.gather_object(list(plan.cpus)) for cpu in cpus]
            rows = what.prompt + what.new
            peer = stack.enter_context(LlamaCpp(subject.config.to_dict(), group, cpus, rows, what.batch))
            peer.run(prompts, _WARM)
            size, held = _sum(group, peer.weight_bytes), _sum(group, peer.peak_rss())
            entrants.append(Entrant(peer, "q4_0", 32, size, held))
        yield from _measure(what, group, entrants, prompts, _reader(group, read_bytes))


def _with_cache(shape: str, mode: Mode) -> Mode:
    """Return the mode with the peer's cache, fp16, where none is named and the decoder runs the model."""
    runs = mode.optimize_llm and config_of(shape).model_type in FAMILIES
    return replace(mode, kv_cache_dtype="fp16") if runs and mode.kv_cache_dtype == "auto" else mode


def own_loop(model: nn.Module) -> LoopRunner:
    """Return the decoder's own loop over a model, or one over its forward where Hugging Face's runs it."""
    if any(isinstance(module, FusedBackbone) for module in model.modules()):
        backbone = backbone_of(model)
        clock = getattr(backbone.executor, "times", None)  # only the compiled one knows
        return LoopRunner(f"decoder {backbone.executor.name}", DecodeLoop(backbone), clock)
    return LoopRunner("forward", ForwardLoop(model))


def weight_bytes(model: nn.Module, batch: int) -> int:
    """Return the bytes of this rank's matrices that a step of one token each reads, in their format.

    Without the embedding, of which a step reads a row, and the cache. Of experts: as many as `batch` tokens choose
    on average, each top_k of E with equal chances: E (1 - (1 - top_k / E)^batch).
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            total += _bytes(module.spec)
        elif isinstance(module, ExpertStack):
            chosen = int(getattr(model.config, "num_experts_per_tok", module.experts))
            total += module.experts * (1 - (1 - chosen / module.experts) ** batch) * _bytes(module.spec)
    return int(total)


def _bytes(spec: ops.LinearSpec) -> int:
    layout = part_layout(spec.format, (spec.n, spec.k), spec.group_size)
    return sum(part.shape[0] * part.shape[1] * part.dtype.itemsize for part in layout.values())


def _check(what: Run) -> None:
    for name in ("prompt", "new", "batch", "rounds"):
        least = 2 if name == "new" else 1  # one new token has no time between tokens
        if getattr(what, name) < least:
            raise UsageError(f"--{name} is {getattr(what, name)}; expected {least} or more")
    if what.num_beams < 1 or what.batch % what.num_beams:
        raise UsageError(f"--num-beams is {what.num_beams}; expected a divisor of --batch, which is {what.batch}")
    limit = getattr(config_of(what.shape), "max_position_embeddings", None)
    if limit is not None and what.prompt + what.new > limit:
        raise UsageError(f"--prompt {what.prompt} and --new {what.new} exceed the {limit} tokens of {what.shape}")


def _prompts(what: Run, vocab: int) -> Prompts:
    rng = generator("prompts", what.batch, what.prompt)
    found: list[list[int]] = rng.integers(0, vocab, size=(what.batch, what.prompt)).tolist()
    return found


def _sum(group: Group, value: int) -> int:
    answers: list[Any] = group.gather_object(value)
    return sum(answers)


def _read(group: Group, reader: MemoryReader) -> float:
    """Return the 10^9 bytes a second that all ranks read together, each with its threads at the same time."""
    group.barrier()
    answers: list[Any] = group.gather_object(statistics.median(reader.gbps()))
    return float(sum(answers))


def _reader(group: Group, size: int | None) -> MemoryReader:
    """Return a reader of this rank's share of a gigabyte, or of what no cache holds."""
    return MemoryReader(size or max((1 << 30) // group.size, beyond_cache()))


def _measure(
    what: Run, group: Group, entrants: Sequence[Entrant], prompts: Prompts, reader: MemoryReader
) -> Iterator[Line]:
    """Alternate: read memory, run the first, read memory, run the next, and so on, round by round."""
    times: list[list[Times]] = [[] for _ in entrants]
    reads: list[list[float]] = [[] for _ in entrants]
    for _ in range(what.rounds):
        before = _read(group, reader)
        for entrant, took, read in zip(entrants, times, reads, strict=True):
            group.barrier()
            took.append(entrant.runner.run(prompts, what.new))
            after = _read(group, reader)
            read += [before, after]
            before = after
    for entrant, took, read in zip(entrants, times, reads, strict=True):
        yield _line(what, group.size, entrant, took, statistics.median(read), _gathered(group, took))


def _gathered(group: Group, took: Sequence[Times]) -> list[Parts]:
    """Return every rank's parts of a step, the mean over all of its runs; none where a run does not know them."""
    known = [each.parts for each in took if each.parts is not None]
    steps = sum(len(each.steps) for each in took)
    if len(known) < len(took):
        return []
    names = [field.name for field in fields(Parts)]
    answers: list[Any] = group.gather_object([sum(getattr(part, name) for part in known) / steps for name in names])
    return [Parts(*answer) for answer in answers]


def broken_down(ranks: Sequence[Parts]) -> Breakdown:
    """Return the parts of all ranks as they are shown."""
    rows = [
        RankParts(
            rank,
            *(round(1e3 * t, 4) for t in (p.linear, p.attention, p.reduce - p.wait, p.wait, p.outside)),
        )
        for rank, p in enumerate(ranks)
    ]
    return Breakdown(rows, min(range(len(rows)), key=lambda rank: ranks[rank].wait))


def _line(
    what: Run, tp: int, entrant: Entrant, took: Sequence[Times], read_gbps: float, ranks: Sequence[Parts]
) -> Line:
    first = statistics.median(each.first for each in took)
    steps = sorted(step * 1e3 for each in took for step in each.steps)
    rates = sorted(what.batch * len(each.steps) / sum(each.steps) for each in took)
    rate = statistics.median(rates)
    return Line(
        shape=what.shape,
        low_bit=entrant.low_bit,
        group_size=entrant.group_size,
        how=entrant.runner.how,
        prefill_tokens_per_s=round(what.batch * what.prompt / first, 2),
        decode_tokens_per_s=round(rate, 3),
        ttft_ms=round(first * 1e3, 3),
        itl_p50_ms=round(percentile(steps, 50), 3),
        itl_p90_ms=round(percentile(steps, 90), 3),
        itl_p99_ms=round(percentile(steps, 99), 3),
        peak_rss_bytes=entrant.peak_rss_bytes,
        read_gbps=round(read_gbps, 3),
        fraction_of_read=round(entrant.step_bytes * rate / what.batch / 1e9 / read_gbps, 4),
        outside_kernels_fraction=round(sum(p.outside for p in ranks) / sum(p.total for p in ranks), 4)
        if ranks
        else None,
        threads=what.threads,
        tp=tp,
        batch=what.batch,
        prompt=what.prompt,
        new=what.new,
        peer=entrant.runner.peer,
        slowest_decode_tokens_per_s=round(rates[0], 3),
        fastest_decode_tokens_per_s=round(rates[-1], 3),
        rounds=what.rounds,
        breakdown=broken_down(ranks) if ranks and what.breakdown else None,
    )


def percentile(ranked: Sequence[float], percent: int) -> float:
    """Return the smallest of some ranked values that so many percent of them do not exceed."""
    return ranked[max(0, -(-len(ranked) * percent // 100) - 1)]
