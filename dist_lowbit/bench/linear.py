"""Measure the product of activations with one weight: ours in any format, and torch's operators beside it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dist_lowbit import ops
from dist_lowbit.core.errors import KernelError, UsageError
from dist_lowbit.core.log import logger
from dist_lowbit.formats import lookup
from dist_lowbit.formats.table import FORMATS, USER_FORMATS, check_group_size

from .child import Child
from .machine import MemoryReader, beyond_cache, check_isa, check_threads, kernels_on, require_kernels
from .random_weights import generator, random_normal, random_weight

_SECONDS = 0.03  # of runs in a row: far above a thread's wake-up, far below a machine's change of mood
_ALIGNMENT = 64  # bytes: a line of the cache
# What holds torch to an instruction set of ours: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS.
_LIMITS = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
}
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


@dataclass(frozen=True)
class Line:
    """One result. Times are microseconds a run, rates 10^9 a second; benchmarks/README.md explains each field."""

    format: str
    m: int
    n: int
    k: int
    group_size: int
    threads: int
    isa: str
    median_us: float
    gbps: float
    read_gbps: float
    fraction_of_read: float
    gops: float
    peer: str | None
    peer_isa: str | None
    compute: str | None
    p10_us: float
    p90_us: float
    runs: int


@dataclass(frozen=True)
class Sweep:
    """What to measure: every combination. group_size None: each format's own. isas None: the active one."""

    formats: Sequence[str]
    n: Sequence[int]
    k: Sequence[int]
    m: Sequence[int]
    threads: Sequence[int]
    isas: Sequence[str | None] = (None,)
    group_size: int | None = None
    compute: str = "int8"
    peer: bool = False
    rounds: int = 7


class Contender(Protocol):
    """One way to run a Linear of one shape."""

    @property
    def format(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def peer(self) -> str | None: ...
    @property
    def peer_isa(self) -> str | None: ...
    @property
    def compute(self) -> str | None: ...

    def batch(self, m: int, seconds: float) -> list[float]:
        """Run with m rows for some seconds, once at least; return the microseconds of each run."""
        ...


class Ours:
    """Our kernel with random weights, in copies that no cache holds."""

    peer = peer_isa = None

    def __init__(self, format: str, n: int, k: int, group_size: int | None, compute: str, total: int) -> None:
        row = lookup(format)
        self.format, self.group_size = row.name, check_group_size(row, group_size)
        self.compute = compute if ops.exact_codes(row) else "fp32"  # what is done, not what was asked for
        weight = random_weight(row, (n, k), self.group_size, generator(row.name, n, k, self.group_size))
        self.nbytes = weight.nbytes
        spec = ops.LinearSpec.of(weight, compute=compute)
        self.kernel = compiled(spec)
        packed = self.kernel.prepack(weight, spec)
        size = packed.numel()
        self._copies = torch.empty(max(2, -(-total // size)), -(-size // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8)
        self._copies[:, :size] = packed
        self._n, self._k, self._size, self._at = n, k, size, 0

    def batch(self, m: int, seconds: float) -> list[float]:
        """Run on one copy after the other (see Contender)."""
        x = random_normal(generator("x", m, self._k), (m, self._k))
        out = torch.empty(m, self._n)
        times: list[float] = []
        ends = None
        while ends is None or not times or time.perf_counter() < ends:
            packed = self._copies[self._at % len(self._copies), : self._size]
            self._at += 1
            started = time.perf_counter()
            self.kernel.run(x, packed, out)
            ended = time.perf_counter()
            if ends is None:
                ends = ended + seconds  # the first run wakes the threads and is not counted
            else:
                times.append((ended - started) * 1e6)
        return times


class Peer:
    """One of torch's operators, in the child that holds its weights."""

    compute = None

    def __init__(self, child: Child, isa: str, name: str, format: str, group_size: int, nbytes: int) -> None:
        self.format, self.group_size, self.nbytes = format, group_size, nbytes
        self.peer, self.peer_isa, self._child = name, isa, child

    def batch(self, m: int, seconds: float) -> list[float]:
        """Have the child run it (see Contender)."""
        answer = self._child.ask(op="batch", name=self.peer, m=m, seconds=seconds)
        return [float(each) for each in answer["times_us"]]


def compiled(spec: ops.LinearSpec) -> ops.Kernel:
    """Return the kernel of a spec; KernelError where only the reference takes it, which nobody wants measured."""
    kernel = ops.choose(spec)
    if kernel.name == "reference":
        reasons = [f"{each.name}: {each.why_not(spec)}" for each in ops.KERNELS if each.name != "reference"]
        raise KernelError(
            f"no compiled kernel takes {spec.format.name} with N={spec.n}, K={spec.k}: {'; '.join(reasons)}"
        )
    return kernel


def formats_named(text: str) -> list[str]:
    """Return the formats of a list such as "sym_int4,bf16", or all that users choose from for "all"."""
    if text == "all":
        return [name for name in USER_FORMATS if name in FORMATS]
    return [lookup(name.strip(), "format").name for name in text.split(",")]


def run(sweep: Sweep, read_bytes: int | None = None, cache: int | None = None) -> Iterator[Line]:
    """Yield a line for every combination of a sweep, as soon as it is measured.

    Whatever cannot be honoured is an error before the first measurement. Cost: weights of each format of one shape at a
    time, four times the last-level cache each, and 1 GiB to read. read_bytes, cache: their sizes, for tests.
    """
    _check(sweep)
    reader = MemoryReader(read_bytes)
    for isa in sweep.isas:
        for n in sweep.n:
            for k in sweep.k:
                yield from _shape(sweep, isa, n, k, reader, beyond_cache(cache))


def _check(sweep: Sweep) -> None:
    require_kernels()
    for threads in sweep.threads:
        check_threads(threads)
    for isa in sweep.isas:
        if isa is not None:
            check_isa(isa)
    for name in sweep.formats:
        row = lookup(name)
        group = check_group_size(row, sweep.group_size)
        block = 64 if group == -1 else group
        for n in sweep.n:
            for k in sweep.k:
                compiled(ops.LinearSpec(row, n, k, group, ops.whole_cuts(k, block), sweep.compute))
    _check_memory(sweep)


def _check_memory(sweep: Sweep) -> None:
    """Refuse shapes whose weights would not fit, before the machine starts to swap."""
    n, k, m, total = max(sweep.n), max(sweep.k), max(sweep.m), beyond_cache()
    per_weight = [lookup(name).bits for name in sweep.formats] + [4, 8, 32, 16] * sweep.peer
    # Two copies or the caches' worth of each, scales and the fp32 matrix that one of them is drawn from, in and out.
    need = sum(max(total, n * k * bits // 4) for bits in per_weight) + 5 * n * k + 4 * m * (n + k) + (1 << 30)
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > held:
        raise UsageError(
            f"N = {n}, K = {k}, M = {m} takes about {need >> 20} MiB in {len(per_weight)} forms, and this machine has "
            f"{held >> 20} MiB; ask for fewer formats or smaller shapes"
        )


def _shape(sweep: Sweep, isa: str | None, n: int, k: int, reader: MemoryReader, total: int) -> Iterator[Line]:
    ours = [Ours(name, n, k, sweep.group_size, sweep.compute, total) for name in sweep.formats]
    for threads in sweep.threads:
        with kernels_on(isa, threads) as plan, ExitStack() as stack:
            active = ops.active_isa()
            assert active is not None
            contenders: list[Contender] = [*ours]
            if sweep.peer:
                limits = dict(zip(_VARIABLES, _LIMITS.get(isa or "", ()), strict=False))
                child = stack.enter_context(
                    Child("torch", Path(__file__).with_name("torch_peer.py"), plan.cpus, limits)
                )
                contenders += _peers(child, n, k, sweep.group_size or 64, total)
            for m in sweep.m:
                yield from _measure(contenders, (m, n, k), threads, active, reader, sweep.rounds)


def _peers(child: Child, n: int, k: int, group_size: int, total: int) -> list[Peer]:
    answer = child.ask(op="prepare", n=n, k=k, group_size=group_size, bytes=total)
    for name, why in answer["left_out"].items():
        logger.warning("%s is left out: %s", name, why)
    return [
        Peer(child, answer["isa"], each["name"], each["format"], each["group_size"], each["bytes"])
        for each in answer["peers"]
    ]


def _measure(
    contenders: Sequence[Contender],
    shape: tuple[int, int, int],
    threads: int,
    isa: str,
    reader: MemoryReader,
    rounds: int,
) -> Iterator[Line]:
    """Alternate: read memory, a batch of the first contender, read, a batch of the next, and so on, round by round."""
    m, n, k = shape
    times: list[list[float]] = [[] for _ in contenders]
    reads: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        before = reader.gbps()
        for contender, took, read in zip(contenders, times, reads, strict=True):
            took += contender.batch(m, _SECONDS)
            after = reader.gbps()
            read += before + after
            before = after
    for contender, took, read in zip(contenders, times, reads, strict=True):
        median, read_gbps = statistics.median(took), statistics.median(read)
        gbps = contender.nbytes / median / 1e3
        ranked = sorted(took)
        yield Line(
            contender.format,
            m,
            n,
            k,
            contender.group_size,
            threads,
            isa,
            round(median, 2),
            round(gbps, 3),
            round(read_gbps, 3),
            round(gbps / read_gbps, 4),
            round(2e-3 * m * n * k / median, 3),
            contender.peer,
            contender.peer_isa,
            contender.compute,
            round(ranked[len(ranked) // 10], 2),
            round(ranked[len(ranked) * 9 // 10], 2),
            len(ranked),
        )
