"""Every call of torch.distributed that DeepSpeed, transformers and torch's own layers make, over one backend.

Each function is one kind of call; `rank` of `size` runs it, with a barrier between two of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lowbit.comm import tree_sum
from dist_lowbit.core.errors import CommError, UsageError
from tests.comm.harness import Job


def own(rank: int, count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor that tells whose it is."""
    return torch.full((count,), rank, dtype=dtype)


def sums(rank: int, size: int) -> None:
    parts = [torch.randn(1000, generator=torch.Generator().manual_seed(other)) for other in range(size)]
    dist.all_reduce(x := parts[rank].clone())
    assert torch.equal(x, tree_sum(parts))
    work = dist.all_reduce(y := torch.ones(4), async_op=True)
    work.wait()
    assert work.is_completed()
    assert y.tolist() == [size] * 4
    dist.all_reduce(turned := torch.ones(3, 2).t())
    assert turned.tolist() == [[size] * 3] * 2
    dist.reduce(z := torch.ones(3), 0)
    assert rank or z.tolist() == [size] * 3


def reductions(rank: int, size: int) -> None:
    kinds = {dist.ReduceOp.MAX: 3, dist.ReduceOp.MIN: 1, dist.ReduceOp.PRODUCT: 6, dist.ReduceOp.SUM: 6}
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64, torch.bfloat16):
        for op, expected in (kinds | {dist.ReduceOp.AVG: 2}).items():
            dist.all_reduce(x := own(rank + 1, dtype=dtype), op)
            assert x.tolist() == [expected] * 3, (op, dtype)
    for op, expected in {dist.ReduceOp.BOR: 7, dist.ReduceOp.BAND: 0, dist.ReduceOp.BXOR: 7}.items():
        dist.all_reduce(x := torch.tensor([1 << rank]), op)
        assert int(x) == expected, op
    dist.all_reduce(x := torch.tensor([rank == 0]), dist.ReduceOp.MAX)
    assert bool(x)
    with pytest.raises(UsageError, match="the backend ccl cannot reduce by PREMUL_SUM; expected one of SUM, "):
        dist.all_reduce(torch.ones(2), dist._make_nccl_premul_sum(2.0))


def parameters(rank: int, size: int) -> None:
    dist.broadcast(weight := torch.nn.Parameter(own(rank)), 1)
    assert weight.tolist() == [1] * 3
    dist.all_reduce(weight)
    assert weight.tolist() == [size] * 3
    torch.manual_seed(rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    model(own(rank).view(1, 3)).sum().backward()
    grad = model.module.weight.grad
    assert grad is not None
    assert grad.tolist() == [[(size - 1) / 2] * 3] * 2


def gathers(rank: int, size: int) -> None:
    every = [torch.empty(2, 3, dtype=torch.bool) for _ in range(size)]
    dist.all_gather(every, torch.full((2, 3), rank == 1))
    assert [bool(part.all()) for part in every] == [other == 1 for other in range(size)]
    dist.all_gather([torch.empty(0) for _ in range(size)], torch.empty(0))
    for out in (torch.empty(2 * size), torch.empty(size, 2)):
        dist.all_gather_single(out, own(rank, 2))
        assert out.view(-1).tolist() == [other for other in range(size) for _ in range(2)]
    into = [torch.empty(2) for _ in range(size)] if rank == 1 else None
    dist.gather(own(rank, 2), into, dst=1)
    assert into is None or [float(part[0]) for part in into] == list(range(size))
    dist.scatter(share := torch.empty(2), [own(other, 2) for other in range(size)] if rank == 1 else None, src=1)
    assert share.tolist() == [rank, rank]


def scattered_sums(rank: int, size: int) -> None:
    dist.reduce_scatter_single(share := torch.empty(2), torch.arange(2.0 * size))
    assert share.tolist() == [size * 2.0 * rank, size * (2.0 * rank + 1)]
    dist.reduce_scatter_single(row := torch.empty(1, 3), torch.ones(size, 3), op=dist.ReduceOp.AVG)
    assert row.tolist() == [[1, 1, 1]]
    dist.reduce_scatter(share, [own(other, 2) for other in range(size)], op=dist.ReduceOp.MAX)
    assert share.tolist() == [rank, rank]


def all_to_all(rank: int, size: int) -> None:
    dist.all_to_all_single(swapped := torch.empty(size), torch.arange(size) + 10.0 * rank)
    assert swapped.tolist() == [10.0 * other + rank for other in range(size)]
    into = [torch.empty(rank + 1) for _ in range(size)]
    dist.all_to_all(into, [own(rank, other + 1) for other in range(size)])
    assert [float(part[-1]) for part in into] == list(range(size))
    sizes = list(range(1, size + 1))
    out = torch.empty(size * (rank + 1), 2)
    dist.all_to_all_single(out, torch.full((sum(sizes), 2), float(rank)), [rank + 1] * size, sizes)
    assert out[:: rank + 1, 0].tolist() == list(range(size))


def objects(rank: int, size: int) -> None:
    every: list[Any] = [None] * size
    dist.all_gather_object(every, {"rank": rank, "text": "x" * rank})
    assert every == [{"rank": other, "text": "x" * other} for other in range(size)]
    dist.broadcast_object_list(told := [rank, {"of": rank}], 1)
    assert told == [1, {"of": 1}]
    dist.gather_object(rank, gathered := [None] * size if rank == 0 else None, 0)
    assert gathered in (None, list(range(size)))
    dist.scatter_object_list(share := [None], list(range(size)) if rank == 0 else None, 0)
    assert share == [rank]


def messages(rank: int, size: int) -> None:
    """Also round a ring, where each sends before it receives, by tag, and from anyone."""
    after, before = (rank + 1) % size, (rank - 1) % size
    y = torch.empty(3)
    sent = [dist.isend(own(rank), after, tag=7), dist.isend(own(rank + 10), after, tag=8)]
    dist.recv(y, before, tag=8)
    assert y.tolist() == [before + 10] * 3
    dist.irecv(y, before, tag=7).wait()
    assert y.tolist() == [before] * 3
    assert all(work.wait() for work in sent)
    ends = [dist.P2POp(dist.isend, own(rank), after), dist.P2POp(dist.irecv, y.zero_(), before)]
    for work in dist.batch_isend_irecv(ends):
        work.wait()
    assert y.tolist() == [before] * 3
    if rank == 0:
        assert sorted(int(dist.recv(y)) for _ in range(size - 1)) == list(range(1, size))
        dist.send_object_list([1, "a"], 1)
    else:
        dist.send(own(rank), 0)
    if rank == 1:
        dist.recv_object_list(told := [None, None], 0)
        assert told == [1, "a"]


def several_at_once(rank: int, size: int) -> None:
    xs = [torch.ones(2), torch.ones(3)]
    with dist._coalescing_manager():
        for x in xs:
            dist.all_reduce(x)
    assert [x.tolist() for x in xs] == [[size] * 2, [size] * 3]
    outs = [torch.empty(2 * size), torch.empty(3 * size)]
    with dist._coalescing_manager():
        for x, out in zip(xs, outs, strict=True):
            dist.all_gather_single(out, x)
    assert [out.tolist() for out in outs] == [[size] * 2 * size, [size] * 3 * size]


def layers_of_torch(rank: int, size: int) -> None:
    """Functional collectives and DTensor reach the backend through compiled code, by its name."""
    import torch.distributed._functional_collectives as functional  # a second's work, which not every test needs
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.group.WORLD
    assert functional.all_reduce(torch.ones(3), "sum", world).tolist() == [size] * 3
    assert functional.all_gather_tensor(own(rank, 1), 0, world).tolist() == list(range(size))
    assert functional.reduce_scatter_tensor(torch.ones(size), "sum", 0, world).tolist() == [size]
    assert functional.broadcast(own(rank, 1), 1, world).tolist() == [1]
    mesh = dist.init_device_mesh("cpu", (size,))
    spread = distribute_tensor(torch.arange(2.0 * size), mesh, [Shard(0)])
    assert spread.redistribute(mesh, [Replicate()]).to_local().tolist() == list(range(2 * size))


def subgroups(rank: int, size: int) -> None:
    pair = dist.new_group([1, 2], backend="ccl")
    if rank:
        dist.all_reduce(w := torch.ones(2), group=pair)
        assert w.tolist() == [2, 2]
        if rank == 1:
            dist.send(own(rank), 2, group=pair)
        else:
            dist.recv(y := torch.empty(3), 1, group=pair)
            assert y.tolist() == [1] * 3


CALLS: dict[str, tuple[Callable[[int, int], None], ...]] = {
    "plain": (sums, reductions, gathers, scattered_sums, all_to_all, objects, messages, subgroups),
    "layered": (parameters, several_at_once, layers_of_torch),
}


def torch_ccl(job: Job) -> Any:
    """Make the calls over the backend that the import registers; then wait for a rank that has gone."""
    import dist_lowbit.comm.torch_ccl

    assert dist_lowbit.comm.torch_ccl.register() == "registered before"
    dist.init_process_group("ccl", timeout=timedelta(seconds=30))
    assert dist.get_backend() == "ccl"
    for call in CALLS[job.args["calls"]]:
        dist.barrier()
        call(dist.get_rank(), dist.get_world_size())
    dist.barrier()
    if job.rank == 2:
        job.note("done", True)
        os._exit(0)
    if job.rank == 1:
        time.sleep(0.5)  # a message is no collective: this rank need not take part
        return "done"
    try:
        dist.recv(torch.empty(3), 2)
    except CommError as error:
        return f"{error.rank}: {error}"
