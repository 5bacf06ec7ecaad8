"""The sets that ranks get are disjoint, complete and within what is allowed, on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_launcher_topology import machine

from dist_lowbit.launcher.binding import RANKS_PER_CPU, Slot, bind, resolve
from dist_lowbit.launcher.errors import LaunchError
from dist_lowbit.launcher.topology import Core, Topology, format_cpulist

GOLDEN = [
    # machine, ranks, mode, CPUs by rank, memory nodes by rank
    ("one_socket_2_cores.lscpu", 2, "core", ["0", "1"], ["", ""]),
    ("one_socket_2_cores.lscpu", 2, "auto", ["0", "1"], ["", ""]),
    ("one_socket_2_cores.lscpu", 1, "numa", ["0-1"], [""]),
    ("one_socket_2_cores.lscpu", 3, "auto", ["", "", ""], ["", "", ""]),
    ("two_sockets_ht.lscpu", 2, "auto", ["0-27", "28-55"], ["0", "1"]),
    ("two_sockets_ht.lscpu", 2, "socket", ["0-27", "28-55"], ["0", "1"]),
    ("two_sockets_ht.lscpu", 3, "core", ["0-17", "18-36", "37-55"], ["", "", ""]),
    ("two_sockets_ht.lscpu", 1, "numa", ["0-55"], [""]),
    ("two_sockets_snc4_ht.lscpu", 2, "socket", ["0-55", "56-111"], ["0-3", "4-7"]),
    ("two_sockets_snc4_ht.lscpu", 2, "numa", ["0-55", "56-111"], ["0-3", "4-7"]),
    ("two_sockets_snc4_ht.lscpu", 3, "numa", ["0-27", "28-69", "70-111"], ["0-1", "2-4", "5-7"]),
    ("two_sockets_snc4_ht.lscpu", 3, "auto", ["0-36", "37-73", "74-111"], ["", "", ""]),
    ("two_sockets_snc4_ht.lscpu", 8, "auto", [f"{14 * i}-{14 * i + 13}" for i in range(8)], [*"01234567"]),
    ("hybrid_8p_16e.sysfs", 2, "auto", ["0,2,4,6", "8,10,12,14"], ["", ""]),
    ("hybrid_8p_16e.sysfs", 3, "core", ["0,2", "4,6,8", "10,12,14"], ["", "", ""]),
]


@pytest.mark.parametrize(("name", "ranks", "mode", "cpus", "nodes"), GOLDEN)
def test_golden(name: str, ranks: int, mode: str, cpus: list[str], nodes: list[str]) -> None:
    slots = bind(machine(name), ranks, mode)
    assert [format_cpulist(s.cpus) for s in slots] == cpus
    assert [format_cpulist(s.nodes) for s in slots] == nodes


def test_hyper_threads_on_demand() -> None:
    first, _ = bind(machine("two_sockets_ht.lscpu"), 2, "socket", hyper_threads=True)
    assert (format_cpulist(first.cpus), first.threads) == ("0-27,56-83", 56)


def test_unbound_ranks_share_the_physical_cores() -> None:
    assert bind(machine("two_sockets_ht.lscpu"), 3, "none") == (Slot((), (), 18),) * 3
    assert bind(machine("one_socket_2_cores.lscpu"), 4, "none") == (Slot((), (), 1),) * 4


def test_quota_limits_threads_but_not_cores() -> None:
    cores = tuple(Core(0, 0, (cpu,)) for cpu in range(64))
    assert [(len(s.cpus), s.threads) for s in bind(Topology(cores, 8.0), 2, "core")] == [(32, 4), (32, 4)]
    assert bind(Topology(cores, 0.5), 2, "none")[0].threads == 1


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Packages of nodes of cores of hyper-threads, all uneven, some cores efficient, some CPUs forbidden."""
    cores, cpu, node = [], 0, 0
    for package in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 3))):
            for _ in range(draw(st.integers(1, 5))):
                threads = draw(st.integers(1, 2))
                cores.append(Core(package, node, tuple(range(cpu, cpu + threads)), draw(st.booleans())))
                cpu += threads
            node += 1
    allowed = draw(st.sets(st.integers(0, cpu - 1), min_size=1))
    return Topology(tuple(cores)).restrict(allowed)


@given(machines(), st.integers(1, 12), st.sampled_from(["auto", "core", "numa", "socket"]), st.booleans())
def test_sets_are_disjoint_complete_and_allowed(topology: Topology, ranks: int, mode: str, smt: bool) -> None:
    pieces = {"auto": RANKS_PER_CPU * len(topology.cpus), "core": len(topology.usable)}
    pieces |= {"numa": len({c.node for c in topology.usable}), "socket": len({c.package for c in topology.usable})}
    if ranks > pieces[mode]:
        with pytest.raises(LaunchError, match="does not fit"):
            bind(topology, ranks, mode, hyper_threads=smt)
        return
    slots = bind(topology, ranks, mode, hyper_threads=smt)
    assert len(slots) == ranks
    assert all(slot.threads >= 1 for slot in slots)
    if resolve(topology, ranks, mode) == "none":
        assert all(not slot.cpus for slot in slots)
        return
    given_out = [cpu for slot in slots for cpu in slot.cpus]
    expected = {cpu for core in topology.usable for cpu in (core.cpus if smt else core.cpus[:1])}
    assert len(given_out) == len(set(given_out))
    assert set(given_out) == expected <= set(topology.cpus)
    assert all(slot.cpus and slot.threads == len(slot.cpus) for slot in slots)
    node_of = {cpu: core.node for core in topology.cores for cpu in core.cpus}
    for slot in slots:
        assert slot.nodes in ((), tuple(sorted({node_of[cpu] for cpu in slot.cpus})))
    if resolve(topology, ranks, mode) == "core":
        sizes = [len({c for c in topology.usable if set(c.cpus) & set(slot.cpus)}) for slot in slots]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("ranks", "mode", "sentence"),
    [
        (0, "auto", "-n 0 does not fit: a job has at least 1 rank"),
        (-1, "none", "-n -1 does not fit: a job has at least 1 rank"),
        (3, "core", "-n 3 does not fit --bind core: 2 physical cores can be used here; lower -n or use --bind none"),
        (2, "numa", "-n 2 does not fit --bind numa: 1 NUMA node can be used here; lower -n or use --bind core"),
        (2, "socket", "-n 2 does not fit --bind socket: 1 socket can be used here; lower -n or use --bind core"),
        (33, "none", "-n 33 does not fit: 2 CPUs can be used here, for at most 32 ranks"),
        (1, "node", "--bind node is unknown; the modes are auto, none, core, numa, socket"),
    ],
)
def test_what_does_not_fit_is_one_sentence(ranks: int, mode: str, sentence: str) -> None:
    with pytest.raises(LaunchError) as caught:
        bind(machine("one_socket_2_cores.lscpu"), ranks, mode)
    assert str(caught.value) == sentence
