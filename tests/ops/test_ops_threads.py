"""The plan of threads, and a pool that survives forks, nesting callers and being started anew."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.formats import quantize
from dist_lowbit.ops.library import start_pool
from dist_lowbit.ops.threads import ThreadPlan, parse_cpu_list, plan, plan_on

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


# A Core i7-1260P as its sysfs shows it: four P-cores with two hyper-threads each, eight E-cores.
HYBRID = {f"{cpu}-{cpu + 1}": (cpu, cpu + 1) for cpu in range(0, 8, 2)} | {str(cpu): (cpu,) for cpu in range(8, 16)}


@pytest.mark.parametrize(
    ("environ", "allowed", "cpus"),
    [
        ({}, range(16), (0, 2, 4, 6)),
        ({"OMP_NUM_THREADS": "3"}, range(16), (0, 2, 4)),
        ({}, range(1, 12), (1, 2, 4, 6)),
        ({}, range(8, 16), (8, 9, 10, 11, 12, 13, 14, 15)),  # bound to the E-cores: those, then
    ],
)
def test_a_hybrid_part_gives_its_performance_cores(
    environ: dict[str, str], allowed: range, cpus: tuple[int, ...], tmp_path: Path
) -> None:
    for siblings, members in HYBRID.items():
        for cpu in members:
            folder = tmp_path / f"system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    for kind, text in (("cpu_core", "0-7\n"), ("cpu_atom", "8-15\n")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "cpus").write_text(text)
    assert plan_on(environ, set(allowed), tmp_path) == ThreadPlan(len(cpus), cpus)


# Prints the pool's threads, torch's, and how many cpus this process's threads may run on together.
COUNT_THREADS = """
import os, torch
from dist_lowbit import ops, optimize_model
model = optimize_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), "sym_int4")
for _ in range(20):
    model(torch.randn(8, 512))
allowed = set().union(*(os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")))
print(ops.library().dlb_threads_count(), torch.get_num_threads(), len(allowed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("omp", [None, "1", "7"])
@pytest.mark.parametrize("count", [1, 2])
def test_taskset_bounds_the_pool(count: int, omp: str | None, library: ctypes.CDLL) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < count:
        pytest.skip("needs 2 CPUs")
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environ |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_NUM_THREADS": omp} if omp else {})
    command = ["taskset", "-c", ",".join(map(str, cpus[:count])), sys.executable, "-c", COUNT_THREADS]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=True)
    cores = plan_on({}, set(cpus[:count])).count
    assert done.stdout.split() == [str(min(int(omp or cores), cores)), "1", str(count)]


def test_a_fork_amid_another_threads_loop_does_not_deadlock(library: ctypes.CDLL) -> None:
    x, packed, kernel = big()
    start_pool(library, ThreadPlan(2, ()))
    want, over = torch.empty(8, 512), threading.Event()
    kernel.run(x, packed, want)

    def keep_busy() -> None:
        out = torch.empty(8, 512)
        while not over.is_set():
            kernel.run(x, packed, out)

    caller = threading.Thread(target=keep_busy)
    caller.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:  # only the kernel: torch's own operations are not safe here
                out = torch.empty_like(want)
                for _ in range(5):
                    kernel.run(x, packed, out)
                os._exit(0 if bytes(out.numpy().data) == bytes(want.numpy().data) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        over.set()
        caller.join()


def test_idle_workers_sleep(library: ctypes.CDLL) -> None:
    x, packed, kernel = big()
    start_pool(library, ThreadPlan(2, ()))
    kernel.run(x, packed, torch.empty(8, 512))
    time.sleep(0.01)  # workers look for the next loop for 50 us
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    # A spinning worker would take all of it where a cpu is free; 0.1 s is for whatever else lives in the process.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.1
