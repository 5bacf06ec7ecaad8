"""Recorded machines are read as they are, and this machine as the kernel describes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lowbit.launcher.errors import LaunchError
from dist_lowbit.launcher.topology import (
    Topology,
    format_cpulist,
    from_lscpu,
    from_sysfs,
    from_text,
    parse_cpu_max,
    parse_cpulist,
    read_allowed_memory,
    read_machine,
    read_quota,
    read_sysfs,
)

GOLDEN = Path(__file__).parent / "golden"

MACHINES = {
    "one_socket_2_cores.lscpu": "1 package, 1 NUMA node, 2 physical cores, 2 CPUs",
    "two_sockets_ht.lscpu": "2 packages, 2 NUMA nodes, 56 physical cores, 112 CPUs",
    "two_sockets_snc4_ht.lscpu": "2 packages, 8 NUMA nodes, 112 physical cores, 224 CPUs",
    "two_sockets_hbm_flat.sysfs": "2 packages, 2 NUMA nodes, 2 memory nodes without cores, 112 physical cores, "
    "224 CPUs",
    "two_sockets_8_xpu.sysfs": "2 packages, 2 NUMA nodes, 64 physical cores, 128 CPUs",
    "hybrid_8p_16e.sysfs": "1 package, 1 NUMA node, 24 physical cores (16 of them efficient), 32 CPUs",
}


def machine(name: str) -> Topology:
    return from_text((GOLDEN / name).read_text())


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_machine(name: str) -> None:
    assert machine(name).describe() == MACHINES[name]


def test_hyper_threads_of_a_core_are_found() -> None:
    cores = machine("two_sockets_ht.lscpu").cores
    assert cores[0].cpus == (0, 56)
    assert cores[-1].cpus == (55, 111)
    assert (cores[-1].package, cores[-1].node) == (1, 1)


def test_snc_nodes_of_a_package_are_neighbours() -> None:
    topology = machine("two_sockets_snc4_ht.lscpu")
    assert topology.nodes == tuple(range(8))
    assert [next(c.package for c in topology.cores if c.node == node) for node in range(8)] == [0] * 4 + [1] * 4


def test_efficient_cores_are_told_and_left_out() -> None:
    topology = machine("hybrid_8p_16e.sysfs")
    assert [c.cpus for c in topology.usable] == [(i, i + 1) for i in range(0, 16, 2)]
    only_efficient = topology.restrict(range(16, 20))
    assert [c.cpus for c in only_efficient.usable] == [(16,), (17,), (18,), (19,)]


def test_offline_cpus_memory_only_nodes_and_missing_packages() -> None:
    files = {
        "devices/system/cpu/online": "0-1,3",
        **{f"devices/system/cpu/cpu{c}/topology/physical_package_id": "-1" for c in (0, 1, 3)},
        "devices/system/cpu/cpu0/topology/thread_siblings_list": "0-1",
        "devices/system/cpu/cpu1/topology/thread_siblings_list": "0-1",
        "devices/system/cpu/cpu3/topology/thread_siblings_list": "2-3",
        "devices/system/node/node0/cpulist": "0-3",
        "devices/system/node/node1/cpulist": "",  # HBM or CXL memory without cores
    }
    topology = from_sysfs(files)
    assert [c.cpus for c in topology.cores] == [(0, 1), (3,)]
    assert (topology.packages, topology.nodes) == ((0,), (0,))


def test_restriction_keeps_the_allowed_hyper_thread() -> None:
    topology = machine("two_sockets_ht.lscpu").restrict([1, 56, 60])
    assert [c.cpus for c in topology.cores] == [(56,), (1,), (60,)]  # cores 0, 1 and 4
    assert topology.cpus == (1, 56, 60)


@given(st.sets(st.integers(0, 300)))
def test_cpulists_round_trip(cpus: set[int]) -> None:
    assert parse_cpulist(format_cpulist(cpus)) == tuple(sorted(cpus))


@pytest.mark.parametrize(
    ("text", "cpus"), [("", ()), ("0-3,8\n", (0, 1, 2, 3, 8)), ("0-6:2", (0, 2, 4, 6)), ("5", (5,))]
)
def test_cpulist(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpulist(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "3-1", "1;2", "0-4:0"])
def test_bad_cpulist(text: str) -> None:
    with pytest.raises(LaunchError, match="CPU list"):
        parse_cpulist(text)


@pytest.mark.parametrize("text", ["", "# CPU,Core,Socket,Node\n", "x,0,0,0\n", "/sys/nothing:1\n"])
def test_text_that_is_no_machine(text: str) -> None:
    with pytest.raises(LaunchError):
        from_text(text)


def test_lscpu_with_other_columns() -> None:
    topology = from_lscpu("# CPU,Node,Socket,Core,MaxMHz\n0,1,0,0,3500\n1,1,0,0,3500\n")
    assert [(c.cpus, c.node) for c in topology.cores] == [((0, 1), 1)]


def test_quota(tmp_path: Path) -> None:
    assert parse_cpu_max("max 100000\n") is None
    assert parse_cpu_max("250000 100000") == 2.5
    (tmp_path / "fs" / "a" / "b").mkdir(parents=True)
    (tmp_path / "fs" / "a" / "cpu.max").write_text("300000 100000\n")
    (tmp_path / "fs" / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert read_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs")) == 3.0
    assert read_quota(str(tmp_path / "none"), str(tmp_path / "fs")) is None


def test_quota_of_cgroup_v1(tmp_path: Path) -> None:
    own = tmp_path / "fs" / "cpu" / "docker" / "x"
    own.mkdir(parents=True)
    (own / "cpu.cfs_quota_us").write_text("150000\n")
    (own / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup").write_text("4:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n0::/\n")
    assert read_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs")) == 1.5
    (own / "cpu.cfs_quota_us").write_text("-1\n")
    assert read_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs")) is None


def test_memory_nodes_that_the_cpuset_allows(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tcat\nMems_allowed_list:\t0-1,3\n")
    assert read_allowed_memory(str(tmp_path / "status")) == (0, 1, 3)


def test_this_machine() -> None:
    assert set(read_machine().cpus) == os.sched_getaffinity(0)


def test_machine_without_sysfs(tmp_path: Path) -> None:
    assert read_sysfs(str(tmp_path)) == {}
    with pytest.raises(LaunchError):
        from_sysfs({})
