"""What the ranks of tests/comm do. Each body runs on every rank; it asserts, or returns values for the test."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lowbit.comm import BACKENDS, Group, init_group, subgroup_info, tree_sum, why_not
from dist_lowbit.comm.collective import Table
from dist_lowbit.comm.hierarchical import HierarchicalGroup
from dist_lowbit.comm.peers import myself, to_json
from dist_lowbit.comm.tree import DTYPES
from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.core.rank import current
from tests.comm.harness import Job
from tests.comm.torch_calls import torch_ccl  # noqa: F401

# Around every border of the implementations: cache line, inline block, small/large, chunk, several chunks.
COUNTS = (0, 1, 7, 16, 511, 513, 4096, 8192, 8193, 16385, 65536, 65537, 131072, 200003)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def values(seed: int, rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rank `rank`'s operand: every rank can compute every other's."""
    generator = torch.Generator().manual_seed(seed * 64 + rank)
    return (torch.randn(count, generator=generator) * 3).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bits, so that -0 and +0 differ."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)


def check_sum(total: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Compare with float64. A tree over n parts rounds each element at most n - 1 times in fp32 and once to its dtype.

    Each of these errors is at most u times the sum of magnitudes (Higham, Accuracy and Stability, eq. 4.3):
    |error| <= (gamma(n-1) + u_dtype (1 + gamma(n-1))) * sum |x|, with gamma(k) = k u / (1 - k u), u = 2^-24.
    fp16 adds half of its smallest step, 2^-25, where the sum is subnormal.
    """
    exact = torch.stack([part.double() for part in parts]).sum(0)
    magnitude = torch.stack([part.double().abs() for part in parts]).sum(0)
    steps = len(parts) - 1
    gamma = steps * 2.0**-24 / (1 - steps * 2.0**-24)
    last = 0.0 if total.dtype == torch.float32 else UNIT_ROUNDOFF[total.dtype]
    bound = (gamma + last * (1 + gamma)) * magnitude + (2.0**-25 if total.dtype == torch.float16 else 0.0)
    assert bool(((total.double() - exact).abs() <= bound).all())


def check_all_reduce(group: Group) -> None:
    for seed, count in enumerate(COUNTS):
        for dtype in DTYPES:
            parts = [values(seed, rank, count, dtype) for rank in range(group.size)]
            x = parts[group.rank].clone()
            total = group.all_reduce(x)
            assert total is x
            assert same_bits(x, tree_sum(parts)), (count, dtype)
            check_sum(x, parts)


def check_all_gather(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        for shape, dim in (((5,), 0), ((3, 4), 0), ((3, 4), 1), ((1, 7), -1), ((2, 3, 5), 1), ((300, 257), 0)):
            for uneven in (False, True):
                sizes = [(shape[dim] + rank if uneven else shape[dim]) for rank in range(group.size)]
                parts = []
                for rank, size in enumerate(sizes):
                    full = list(shape)
                    full[dim] = size
                    part = values(rank + 7, rank, torch.Size(full).numel(), torch.float32) * 20
                    parts.append(part.to(dtype).view(full))
                expected = torch.cat(parts, dim)
                assert torch.equal(group.all_gather(parts[group.rank], dim), expected)
                assert torch.equal(group.all_gather(parts[group.rank], dim, sizes=sizes), expected)
    empty = group.all_gather(torch.full((group.rank, 2), float(group.rank)), 0)  # rank 0 brings nothing
    assert empty.shape == (sum(range(group.size)), 2)
    turned = group.all_gather(torch.arange(6).view(2, 3).t(), 0)  # not contiguous
    assert torch.equal(turned, torch.cat([torch.arange(6).view(2, 3).t()] * group.size))


def check_broadcast(group: Group) -> None:
    for source in range(group.size):
        for count in (0, 1, 1000, 300001):
            for dtype in (torch.float16, torch.int32, torch.bool):
                x = (values(source, group.rank, count, torch.float32) * 9).to(dtype)
                expected = (values(source, source, count, torch.float32) * 9).to(dtype)
                assert group.broadcast(x, source) is x
                assert torch.equal(x, expected)


def check_objects(group: Group) -> None:
    value = {"names": ["ä", "b"], "n": 3, "none": None, "long": "x" * 400000}
    for source in range(group.size):
        got = group.broadcast_object(value if group.rank == source else None, source)
        assert got == value
    gathered = group.gather_object([group.rank] * group.rank)
    assert gathered == [[rank] * rank for rank in range(group.size)]


def check_barrier(group: Group) -> None:
    for late in range(group.size):
        if group.rank == late:
            time.sleep(0.03)
        moments = group.gather_object(time.monotonic())
        group.barrier()
        assert time.monotonic() >= max(moments)


def check_native(group: Group) -> None:
    """The table of C functions does the same, called as compiled code calls it."""
    collective = group.native_collective()
    if group.size == 1:
        assert collective.address == 0
        return
    table = Table.from_address(collective.address)
    assert (table.rank, table.size) == (group.rank, group.size)
    for count in (0, 1, 4096, 131072):
        parts = [values(count, rank, count + rank, torch.float32) for rank in range(group.size)]
        own = parts[group.rank][:count].clone()
        assert table.all_reduce(table.context, own.data_ptr(), count) == 0
        assert same_bits(own, tree_sum([part[:count] for part in parts]))
        counts = (ctypes.c_int64 * group.size)(*(part.numel() for part in parts))
        out = torch.empty(sum(counts))
        assert table.all_gather(table.context, parts[group.rank].data_ptr(), out.data_ptr(), counts) == 0
        assert same_bits(out, torch.cat(parts))
    collective.check()


def check_arguments(group: Group) -> None:
    """Refused before anything is sent, so the group lives on."""
    for call, text in (
        (lambda: group.all_reduce(torch.zeros(3, dtype=torch.int64)), "int64"),
        (lambda: group.all_reduce(torch.zeros(3, 2).t()), "not contiguous"),
        (lambda: group.all_gather(torch.zeros(3), 1), "along 1"),
        (lambda: group.all_gather(torch.zeros(3), 0, sizes=[3]) if group.size > 1 else refuse(), "sizes"),
        (lambda: group.broadcast(torch.zeros(3), group.size), "from rank"),
        (lambda: group.gather_object({1j}), "JSON"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
    group.barrier()


def refuse() -> None:
    raise UsageError("sizes")


def check_random(group: Group, operations: int = 60) -> None:
    """Random operations in the same order on all ranks, each against what it must give, to the bit.

    What it must give depends on no backend, so all of them agree with one another.
    """
    generator = torch.Generator().manual_seed(group.size)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    for seed in range(operations):
        op, dtype, source = draw(3), DTYPES[draw(3)], draw(group.size)
        count = draw(10 ** (1 + draw(5)))
        parts = [values(1000 + seed, rank, count, dtype) for rank in range(group.size)]
        own = parts[group.rank].clone()
        if op == 0:
            assert same_bits(group.all_reduce(own), tree_sum(parts))
            check_sum(own, parts)
        elif op == 1:
            assert same_bits(group.all_gather(own, 0), torch.cat(parts))
        else:
            assert same_bits(group.broadcast(own, source), parts[source])


def check_special(group: Group) -> None:
    """Infinities, NaN, signed zeros, subnormals, and sums whose bits depend on the order."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-45, 6e-8, 65504.0, 1.0, 2.0**24])
    for dtype in DTYPES:
        parts = [special.roll(rank).to(dtype) for rank in range(group.size)]
        total = group.all_reduce(parts[group.rank].clone())
        expected = tree_sum(parts)
        known = ~expected.isnan()
        assert torch.equal(total.isnan(), expected.isnan())
        assert same_bits(total[known], expected[known])


def check_split(group: Group) -> None:
    """Odd and even ranks, in reverse order; then everyone alone."""
    sub = group.split(group.rank % 2, key=-group.rank)
    members = [rank for rank in reversed(range(group.size)) if rank % 2 == group.rank % 2]
    assert (sub.size, sub.rank) == (len(members), members.index(group.rank))
    parts = [values(5, rank, 3000, torch.float32) for rank in members]
    assert same_bits(sub.all_reduce(values(5, group.rank, 3000, torch.float32)), tree_sum(parts))
    sub.close()
    with group.split(group.rank) as alone:
        assert alone.size == 1
    group.barrier()


def check_fingerprints(group: Group) -> str:
    """Return a digest of sums, to compare ranks and backends with one another."""
    digest = hashlib.sha256()
    for seed, count in enumerate(COUNTS):
        for dtype in DTYPES:
            digest.update(bits(group.all_reduce(values(seed + 50, group.rank, count, dtype))).numpy().tobytes())
    return digest.hexdigest()


def fingerprints_of(size: int) -> str:
    """Return the digest that every backend must give: of the tree's own sums."""
    digest = hashlib.sha256()
    for seed, count in enumerate(COUNTS):
        for dtype in DTYPES:
            parts = [values(seed + 50, rank, count, dtype) for rank in range(size)]
            digest.update(bits(tree_sum(parts)).numpy().tobytes())
    return digest.hexdigest()


CHECKS: dict[str, Callable[[Group], Any]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name != "check_sum"
}


def conformance(job: Job) -> dict[str, Any]:
    """Run every check on groups of 2, 3 and 4 of the ranks, over each backend; report each by itself."""
    report: dict[str, Any] = {}
    world = current()
    if "mpi" in job.args["backends"]:
        from mpi4py import MPI  # starting MPI takes all ranks, also those that sit a group out

        assert MPI.COMM_WORLD.size == job.size
    for backend in job.args["backends"]:
        for size in job.args["sizes"]:
            if job.rank >= size:
                continue
            info = subgroup_info(world, list(range(size)))
            with init_group(backend, info, timeout=20, prefix=f"{backend}{size}") as group:
                assert (group.name, group.size, group.rank) == (backend, size, job.rank)
                for name, check in CHECKS.items():
                    report[f"{backend}-{size}-{name}"] = check(group)
    return report


def many_operations(job: Job) -> list[str]:
    """Run so many random operations over each backend, in groups of each size; return what was run."""
    done = []
    if "mpi" in job.args["backends"]:
        from mpi4py import MPI

        assert MPI.COMM_WORLD.size == job.size
    for size in job.args["sizes"]:
        if job.rank >= size:
            continue
        info = subgroup_info(current(), list(range(size)))
        for backend in job.args["backends"]:
            with init_group(backend, info, timeout=60, prefix=f"many{backend}{size}") as group:
                check_random(group, job.args["operations"])
                done.append(f"{backend}-{size}")
    return done


def failing_call(job: Job, group: Group) -> dict[str, Any]:
    """Call until it fails; return how it ended and how long after the trouble began."""
    x = torch.ones(job.args["count"])
    collective = group.native_collective()
    table = Table.from_address(collective.address)

    def repeat() -> None:
        while True:
            if not job.args["native"]:
                group.all_reduce(x.fill_(1.0))
            elif table.all_reduce(table.context, x.fill_(1.0).data_ptr(), x.numel()):
                assert table.all_reduce(table.context, x.data_ptr(), x.numel())
                collective.check()

    with pytest.raises(CommError) as caught:
        repeat()
    moment = time.monotonic()
    with pytest.raises(CommError) as again:
        group.barrier()
    return {"rank": caught.value.rank, "message": str(caught.value), "moment": moment, "later": str(again.value)}


def trouble(job: Job) -> Any:
    """Rank `victim` meets its fate in the middle of a run of all-reduces; the others report."""
    group = init_group(job.args["backend"], timeout=job.args["timeout"])
    if job.rank != job.args["victim"]:
        return failing_call(job, group)
    for _ in range(20):
        group.all_reduce(torch.ones(job.args["count"]))
    job.note("moment", time.monotonic())
    fate = job.args["fate"]
    if fate in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, fate))
        raise AssertionError("still here")
    if fate == "close":
        group.close()
        time.sleep(60)  # the process lives on; the harness ends it
    elif fate == "raise":
        raise RuntimeError("a rank that raises")
    return failing_call(job, group)


def part_of_a_split(job: Job) -> dict[str, Any] | None:
    """Ranks 0 and 2 go on in a group of their own, then 2 dies; rank 0 tells what it heard."""
    with init_group(job.args["backend"], timeout=10) as world:
        part = world.split(job.rank % 2)
        if job.rank == 1:
            return None
        part.barrier()
        if job.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(CommError) as caught:
            part.barrier()
        with pytest.raises(CommError) as again:
            part.barrier()
        return {"rank": caught.value.rank, "message": str(caught.value), "later": str(again.value)}


def mismatch(job: Job) -> list[dict[str, Any]]:
    """Make different calls; every rank must say who did what."""
    results = []
    calls: tuple[Callable[[Group], object], ...] = (
        lambda group: group.all_reduce(torch.ones(10)) if group.rank else group.all_reduce(torch.ones(11)),
        lambda group: group.barrier() if group.rank else group.all_reduce(torch.ones(11)),
        lambda group: group.all_reduce(torch.ones(5, dtype=torch.bfloat16 if group.rank else torch.float16)),
        lambda group: group.broadcast(torch.ones(5), source=group.rank),
        lambda group: group.all_gather(torch.ones(5, 2 + group.rank), 0),
        lambda group: group.all_reduce(torch.ones(10**6 if group.rank else 10)),
    )
    for number, call in enumerate(calls):
        group = init_group(job.args["backend"], timeout=10, prefix=f"mismatch{number}")
        start = time.monotonic()
        try:
            call(group)
            results.append({"message": "no error", "seconds": 0.0, "rank": None})
        except CommError as error:
            results.append({"message": str(error), "seconds": time.monotonic() - start, "rank": error.rank})
        group.close()
    return results


def forgotten(job: Job) -> str:
    """Leave the group open: the process must still end, and at once."""
    group = init_group(job.args["backend"], timeout=20)
    group.all_reduce(torch.ones(10))
    globals()["kept"] = group
    return group.name


def interrupted(job: Job) -> dict[str, Any]:
    """Rank 0 gets Ctrl-C while it waits; its peer hears of it at once."""
    group = init_group("shm", timeout=20)
    group.barrier()
    start = time.monotonic()
    if job.rank == 0:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(0.8)  # come when rank 0 has left
    try:
        group.barrier()  # rank 0 had come to this one before it was interrupted
        group.barrier()
        how = "none"
    except (KeyboardInterrupt, CommError) as error:
        how = f"{type(error).__name__}: {error}"
    return {"how": how, "seconds": time.monotonic() - start}


def forked(job: Job) -> bool:
    """A forked child that ends must not close its parent's group."""
    group = init_group("shm", timeout=5)
    child = os.fork()
    if child == 0:
        del group
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    group.barrier()
    return same_bits(group.all_reduce(torch.ones(4)), torch.full((4,), float(group.size)))


def shared_memory(job: Job) -> dict[str, Any]:
    """Tell what is visible of the segment while the group lives."""
    before = sorted(os.listdir("/dev/shm"))
    group = init_group("shm", timeout=20)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]
    held = [link for fd in os.listdir("/proc/self/fd") if "/dev/shm" in (link := _link(fd))]
    result = {"new": sorted(set(os.listdir("/dev/shm")) - set(before)), "maps": maps, "open": held}
    group.barrier()
    return result


def _link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # the listing's own
        return ""


def small_shm(job: Job) -> dict[str, Any]:
    """Form a group where /dev/shm has no room; tell why those that were asked for by name refused."""
    refusals = {}
    for name in job.args["refused"]:
        with pytest.raises(CommError) as caught:
            init_group(name, timeout=10)
        refusals[name] = str(caught.value)
    with init_group("auto", timeout=10) as group:
        check_random(group, 20)
        return {"name": group.name, **refusals}


def beside_torch(job: Job) -> list[float]:
    """Our group and torch's default one live side by side, whichever comes first, at the same MASTER_PORT."""
    import torch.distributed as dist

    if job.args["first"] == "ours":
        group = init_group(job.args["backend"], timeout=20)
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo")
        group = init_group(job.args["backend"], timeout=20)
    x, y = torch.ones(4), torch.full((4,), 2.0)
    dist.all_reduce(x)
    group.all_reduce(y)
    group.close()
    dist.all_reduce(x)
    dist.destroy_process_group()
    return [float(x[0]), float(y[0])]


def rejoin(job: Job) -> int:
    """Form and close groups in quick succession at the same address."""
    for number in range(8):
        with init_group("auto", timeout=20) as group:
            assert float(group.all_reduce(torch.full((1,), float(number)))[0]) == number * group.size
    return number


def idle(job: Job) -> float:
    """Return the processor time that waiting 1 s costs rank 0."""
    group = init_group("shm", timeout=20)
    group.barrier()
    start = time.process_time()
    if job.rank:
        time.sleep(1.0)
    group.barrier()
    return time.process_time() - start


def disagree(job: Job) -> str:
    """Rank-dependent arguments of init_group."""
    try:
        init_group(job.args["backends"][job.rank], timeout=job.args.get("timeout", 20))
    except (CommError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def told_sizes(job: Job) -> dict[str, Any]:
    """Each rank believes in a rank and a size of its own, and comes when it is told to."""
    rank, size, seconds = job.args["places"][job.rank]
    info = replace(current(), rank=rank, world_size=size, local_rank=rank, local_size=size)
    why_not(info)  # looks for libraries once, which may take its time
    time.sleep(seconds)
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        init_group("auto", info, timeout=job.args["timeout"])
    return {"message": str(caught.value), "seconds": time.monotonic() - start}


def dies_forming(job: Job) -> str:
    """Rank 1 has come to the meeting and dies before the group is complete."""
    from dist_lowbit.comm import meeting

    if job.rank == 1:
        info = current()
        facts = {"peer": to_json(myself(1)), "why_not": why_not(info), "backend": job.args["backend"]}
        meeting.meet(info, 20, "world", facts)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        init_group(job.args["backend"], timeout=10)
    except CommError as error:
        return str(error)
    return "no error"


def absent(job: Job) -> str:
    """The last rank never comes."""
    if job.rank == job.size - 1:
        time.sleep(1.5)
        return ""
    try:
        init_group("auto", timeout=0.7)
    except CommError as error:
        return str(error)
    return "no error"


def pretended(job: Job) -> Group:
    """Form a hierarchical group of ranks that say they are on several machines."""
    from dist_lowbit.comm import backends, hierarchical

    per_host = job.args["per_host"]
    backends.myself = lambda rank: replace(myself(rank), machine=f"machine {rank // per_host}")  # type: ignore[attr-defined]
    hierarchical.OUTER = (BACKENDS[job.args["outer"]],)
    info = replace(current(), local_size=per_host, local_rank=job.rank % per_host)
    return init_group("auto", info, timeout=20)


def hierarchy(job: Job) -> dict[str, Any]:
    """Run every check, or as many random operations as asked for, on a group of pretended machines."""
    with pretended(job) as group:
        assert isinstance(group, HierarchicalGroup)
        between = None if group.outer is None else group.outer.name
        if "operations" in job.args:
            check_random(group, job.args["operations"])
            return {"between": between}
        return {"between": between, **{name: check(group) for name, check in CHECKS.items()}}


def flat(job: Job) -> str:
    """Form a group of pretended machines that cannot be added one by one."""
    with pretended(job) as group:
        check_random(group, 20)
        return group.name


def hierarchy_trouble(job: Job) -> dict[str, Any]:
    """Rank `victim` dies; the others tell what they heard and how long it took."""
    group = pretended(job)
    x = torch.ones(1000)
    for _ in range(10):
        group.all_reduce(x)
    if job.rank == job.args["victim"]:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while True:
            group.all_reduce(x)
    except CommError as error:
        return {"message": str(error), "rank": error.rank, "seconds": time.monotonic() - start}


def device(job: Job) -> dict[str, Any]:
    """Run every check on the class behind nccl and xccl, with gloo and the CPU in the place of a GPU."""
    from torch.distributed import ProcessGroupGloo

    from dist_lowbit.comm import backends
    from dist_lowbit.comm.device import DeviceGroup

    class OnCpu(DeviceGroup):
        name = "device"
        device_type = "cpu"

        @classmethod
        def why_not(cls, info: Any) -> str | None:
            return None

        @classmethod
        def _device(cls, place: int) -> torch.device:
            return torch.device("cpu")

        @classmethod
        def _connected(cls, store: Any, rank: int, size: int) -> Any:
            return ProcessGroupGloo(store, rank, size)

    backends.BACKENDS = {**backends.BACKENDS, "device": OnCpu}
    with init_group("device", timeout=20) as group:
        return {name: check(group) for name, check in CHECKS.items()}
