"""The plan of threads, and a pool that survives forks, nesting callers and being started anew."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.formats import quantize
from dist_lowbit.ops.library import start_pool
from dist_lowbit.ops.threads import ThreadPlan, parse_cpu_list, plan

SMT = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 6: 2, 3: 3, 7: 3}  # four cores, cpu i and i + 4 share one


@pytest.mark.parametrize(
    ("environ", "allowed", "fast", "want"),
    [
        ({}, set(range(8)), set(), ThreadPlan(4, (0, 1, 2, 3))),
        ({"OMP_NUM_THREADS": "2"}, set(range(8)), set(), ThreadPlan(2, (0, 1))),
        ({"OMP_NUM_THREADS": "3,1"}, set(range(8)), set(), ThreadPlan(3, (0, 1, 2))),
        ({"OMP_NUM_THREADS": "99"}, {1, 5, 6}, set(), ThreadPlan(2, (1, 6))),
        ({"OMP_NUM_THREADS": "all"}, {2}, set(), ThreadPlan(1, (2,))),
        ({}, set(range(8)), {0, 4, 1, 5}, ThreadPlan(2, (0, 1))),
        ({}, {2, 3}, {0, 1}, ThreadPlan(2, (2, 3))),
    ],
)
def test_plan(environ: dict[str, str], allowed: set[int], fast: set[int], want: ThreadPlan) -> None:
    assert plan(environ, allowed, SMT, fast) == want


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-2,7\n") == {0, 1, 2, 7}
    assert parse_cpu_list("") == set()


def big() -> tuple[torch.Tensor, torch.Tensor, ops.Kernel]:
    """Return x, a packed weight large enough to be shared among threads, and its kernel."""
    weight = quantize(torch.randn(512, 512), "sym_int4")
    spec = ops.LinearSpec.of(weight)
    kernel = ops.choose(spec)
    return torch.randn(8, 512), kernel.prepack(weight, spec), kernel


def test_the_pool_can_be_started_again(library: ctypes.CDLL) -> None:
    x, packed, kernel = big()
    want = ops.linear(x, packed, kernel.name, 512)
    for count in (1, 3, 2, 8, 1, 2):
        start_pool(library, ThreadPlan(count, tuple(sorted(os.sched_getaffinity(0)))))
        assert library.dlb_threads_count() == count
        for _ in range(20):
            assert torch.equal(ops.linear(x, packed, kernel.name, 512), want)


def test_callers_from_many_threads_share_the_pool(library: ctypes.CDLL) -> None:
    x, packed, kernel = big()
    start_pool(library, ThreadPlan(2, ()))
    want = ops.linear(x, packed, kernel.name, 512)
    wrong: list[int] = []

    def call() -> None:
        for i in range(50):
            if not torch.equal(ops.linear(x, packed, kernel.name, 512), want):
                wrong.append(i)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_a_forked_child_has_a_pool_of_its_own(library: ctypes.CDLL) -> None:
    x, packed, kernel = big()
    start_pool(library, ThreadPlan(2, ()))
    out = torch.empty(8, 512)
    kernel.run(x, packed, out)
    child = os.fork()
    if child == 0:  # only the kernel: torch's own operations are not safe here
        again = torch.empty_like(out)
        for _ in range(50):
            kernel.run(x, packed, again)
        same = bytes(again.numpy().data) == bytes(out.numpy().data)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kernel.run(x, packed, out)
