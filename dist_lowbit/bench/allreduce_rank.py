"""One rank of `dist-lowbit bench allreduce`: forms a group over each backend and times them in turns."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from dist_lowbit import comm
from dist_lowbit.comm.base import BaseGroup
from dist_lowbit.core.errors import DistLowbitError
from dist_lowbit.core.native import native
from dist_lowbit.core.rank import current

from .allreduce import Line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TURN = 0.02  # seconds that a turn of one way is to take
RUNS = (3, 300)  # calls in a turn, at least and at most

Timer = Callable[[int], list[float]]  # so many calls -> seconds of each


def _by_table(group: BaseGroup, x: torch.Tensor) -> Timer:
    library = native()
    assert library is not None
    doubles = ctypes.POINTER(ctypes.c_double)
    library.dlb_collective_time.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, doubles]
    collective = group.native_collective()

    def time(runs: int) -> list[float]:
        seconds = (ctypes.c_double * runs)()
        if library.dlb_collective_time(collective.address, x.data_ptr(), x.numel(), runs, seconds):
            collective.check()
        return list(seconds)

    return time


def _by_python(call: Callable[[], object]) -> Timer:
    def time(runs: int) -> list[float]:
        moments = [perf_counter()]
        for _ in range(runs):
            call()
            moments.append(perf_counter())
        return [stop - start for start, stop in pairwise(moments)]

    return time


def _native(group: BaseGroup, x: torch.Tensor) -> Timer | None:
    """Time the library itself, without our deadlines: what the others must be measured against."""
    if group.name == "mpi":
        if x.dtype != torch.float32:
            return None
        from mpi4py import MPI

        buffer = [MPI.buffer.fromaddress(x.data_ptr(), x.numel() * 4), x.numel(), MPI.FLOAT]
        return _by_python(lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer))
    if group.name in ("ccl", "gloo"):
        return _by_python(lambda: group.all_reduce(x, native=True))
    return None


def ways(groups: list[BaseGroup], x: torch.Tensor) -> Iterator[tuple[str, str, Timer]]:
    """Yield each backend's ways to sum x: backend, call, timer."""
    for group in groups:
        if x.dtype == torch.float32 and group.name in ("shm", "ccl"):
            yield group.name, "table", _by_table(group, x)
        yield group.name, "python", _by_python(lambda group=group: group.all_reduce(x))  # type: ignore[misc]
        native_way = _native(group, x)
        if native_way is not None:
            yield group.name, "native", native_way


def measure(groups: list[BaseGroup], bytes_: int, dtype: str, rounds: int) -> Iterator[Line]:
    """Time every way on zeros of so many bytes, in turns, and yield a line for each on every rank."""
    x = torch.zeros(bytes_ // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
    teller = groups[0]
    known = list(ways(groups, x))
    runs: list[int] = []
    for _, _, time in known:
        first = max(teller.gather_object(min(time(RUNS[0]))))
        runs.append(min(max(int(TURN / first), RUNS[0]), RUNS[1]))
    seconds: list[list[float]] = [[] for _ in known]
    for _ in range(rounds):
        for place, (_, _, time) in enumerate(known):
            teller.barrier()
            seconds[place] += time(runs[place] + 1)[1:]  # the first waits for whoever comes last
    ranks = teller.size
    for (backend, call, _), taken in zip(known, seconds, strict=True):
        slowest = torch.tensor(teller.gather_object(taken), dtype=torch.float64).max(0).values.sort().values
        median = float(slowest.median())
        yield Line(
            backend=backend,
            ranks=ranks,
            bytes=bytes_,
            dtype=dtype,
            call=call,
            median_us=round(median * 1e6, 3),
            p99_us=round(float(slowest[min(int(0.99 * len(slowest)), len(slowest) - 1)]) * 1e6, 3),
            bus_gbps=round(2 * (ranks - 1) / ranks * bytes_ / median / 1e9, 4),
            runs=len(slowest),
        )


def main(request: dict[str, Any]) -> None:
    """Measure what the request (a Sweep, and `out`) says."""
    torch.set_num_threads(1)
    groups: list[Any] = []
    for name in request["backends"]:
        try:
            groups.append(comm.init_group(name, prefix=f"bench-{name}", timeout=60))
        except DistLowbitError as error:
            if current().rank == 0:
                print(f"{name} is left out: {error}", file=sys.stderr)
    if not groups:
        raise DistLowbitError("none of the backends can be measured here")
    with open(request["out"] if groups[0].rank == 0 else "/dev/null", "w", encoding="utf-8") as out:
        for bytes_ in request["bytes"]:
            for dtype in request["dtypes"]:
                for line in measure(groups, bytes_, dtype, request["rounds"]):
                    out.write(json.dumps(asdict(line)) + "\n")
    for group in groups:
        group.barrier()
        group.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
