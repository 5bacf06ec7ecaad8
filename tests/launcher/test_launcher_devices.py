"""GPUs and memory without cores: which device and which nodes a rank gets, on machines laid out in golden files."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_launcher_topology import GOLDEN, machine

from dist_lowbit.launcher.__main__ import main
from dist_lowbit.launcher.binding import bind
from dist_lowbit.launcher.devices import Device, from_sysfs, masks, read_devices, visible
from dist_lowbit.launcher.errors import LaunchError
from dist_lowbit.launcher.topology import format_cpulist, sysfs_files

XPU = [
    Device(str(i), f"0000:{bus}:00.0", i // 4) for i, bus in enumerate(["18", "2a", "3c", "4e", "99", "ab", "bd", "cf"])
]


def devices(name: str, kind: str) -> tuple[Device, ...]:
    return from_sysfs(kind, sysfs_files((GOLDEN / name).read_text()))


def test_devices_are_in_the_order_of_their_addresses() -> None:
    assert list(devices("two_sockets_8_xpu.sysfs", "xpu")) == XPU  # the network card and the console are left out
    assert devices("two_sockets_8_xpu.sysfs", "cuda") == ()


def test_an_integrated_gpu_is_left_out_where_there_are_others() -> None:
    found = devices("one_socket_2_arc_1_geforce.sysfs", "xpu")
    assert [(d.index, d.address, d.node) for d in found] == [("0", "0000:03:00.0", None), ("1", "0000:07:00.0", None)]
    assert [d.address for d in devices("one_socket_2_arc_1_geforce.sysfs", "cuda")] == ["0000:0a:00.0"]
    only = {"bus/pci/devices/0000:00:02.0/vendor": "0x8086", "bus/pci/devices/0000:00:02.0/class": "0x030000"}
    assert len(from_sysfs("xpu", only)) == 1


def test_a_mask_that_is_set_is_kept_to() -> None:
    mask = {"ZE_AFFINITY_MASK": "5,1.0,1.1"}
    left = visible("xpu", tuple(XPU), mask)
    assert [(d.index, d.node) for d in left] == [("5", 1), ("1.0", 0), ("1.1", 0)]
    assert masks("xpu", left, 2) == [{"ZE_AFFINITY_MASK": "5"}, {"ZE_AFFINITY_MASK": "1.0"}]
    named = visible("cuda", (), {"CUDA_VISIBLE_DEVICES": "GPU-8a56a4bc"})
    assert masks("cuda", named, 1) == [{"CUDA_VISIBLE_DEVICES": "GPU-8a56a4bc", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}]


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(LaunchError, match="-n 9 does not fit --device xpu: 8 xpu devices can be used here; lower -n"):
        masks("xpu", tuple(XPU), 9)


NEAR = [
    (8, [f"{8 * i}-{8 * i + 7}" for i in range(8)], [*"00001111"]),
    (2, ["0-15", "16-31"], ["0", "0"]),
    (3, ["0-9", "10-20", "21-31"], ["0", "0", "0"]),
    (5, ["0-7", "8-15", "16-23", "24-31", "32-63"], [*"00001"]),
]


@pytest.mark.parametrize(("ranks", "cpus", "nodes"), NEAR)
def test_ranks_are_bound_near_their_gpus(ranks: int, cpus: list[str], nodes: list[str]) -> None:
    slots = bind(machine("two_sockets_8_xpu.sysfs"), ranks, "auto", near=[d.node for d in XPU[:ranks]])
    assert [format_cpulist(s.cpus) for s in slots] == cpus
    assert [format_cpulist(s.nodes) for s in slots] == nodes


def test_where_a_gpu_is_unknown_cores_are_cut_evenly() -> None:
    slots = bind(machine("one_socket_2_arc_1_geforce.sysfs"), 2, "auto", near=[None, None])
    assert [format_cpulist(s.cpus) for s in slots] == ["0-3", "4-7"]


@pytest.mark.parametrize("switch", [[], ["--no-mask"]])
def test_each_rank_sees_one_gpu_unless_told_otherwise(switch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    topology = ["--dry-run", "--topology", str(GOLDEN / "two_sockets_8_xpu.sysfs")]
    assert main(["-n", "auto", "--device", "xpu", *switch, *topology, "-m", "mod"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 8
    assert [f" ZE_AFFINITY_MASK={rank} " in line for rank, line in enumerate(commands)] == [not switch] * 8


def test_no_device_here(capsys: pytest.CaptureFixture[str]) -> None:
    topology = ["--dry-run", "--topology", str(GOLDEN / "two_sockets_ht.lscpu")]
    assert main(["-n", "auto", "--device", "xpu", *topology, "-m", "mod"]) == 2
    assert "-n auto finds no xpu device here" in capsys.readouterr().err


def test_only_devices_whose_files_are_there_count(tmp_path: Path) -> None:
    for bus, minor in (("17", 0), ("65", 1)):
        pci = tmp_path / f"sys/bus/pci/devices/0000:{bus}:00.0"
        pci.mkdir(parents=True)
        for name, content in (("vendor", "0x10de\n"), ("class", "0x030200\n"), ("numa_node", "1\n")):
            (pci / name).write_text(content)
        info = tmp_path / f"proc/driver/nvidia/gpus/0000:{bus}:00.0"
        info.mkdir(parents=True)
        (info / "information").write_text(f"Model: \t\t H\nDevice Minor: \t {minor}\n")
    (tmp_path / "dev").mkdir()
    assert read_devices("cuda", str(tmp_path)) == ()
    (tmp_path / "dev/nvidia1").touch()
    assert read_devices("cuda", str(tmp_path)) == (Device("0", "0000:65:00.0", 1),)
    pci = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    (pci / "drm/renderD128").mkdir(parents=True)
    for name, content in (("vendor", "0x8086\n"), ("class", "0x030000\n"), ("numa_node", "-1\n")):
        (pci / name).write_text(content)
    assert read_devices("xpu", str(tmp_path)) == ()
    (tmp_path / "dev/dri").mkdir()
    (tmp_path / "dev/dri/renderD128").touch()
    assert read_devices("xpu", str(tmp_path)) == (Device("0", "0000:03:00.0", None),)


def test_memory_without_cores_is_found_and_preferred() -> None:
    topology = machine("two_sockets_hbm_flat.sysfs")
    assert topology.memories == ((2, 0), (3, 1))
    assert topology.nodes == (0, 1)
    near = bind(topology, 2, "numa")
    assert [(s.nodes, s.prefer) for s in near] == [((0,), False), ((1,), False)]
    hbm = bind(topology, 2, "numa", memory="hbm")
    assert [(s.nodes, s.prefer) for s in hbm] == [((2,), True), ((3,), True)]
    assert [(s.nodes, s.prefer) for s in bind(topology, 1, "numa", memory="hbm")] == [((2, 3), True)]
    assert [(s.nodes, s.prefer) for s in bind(topology.restrict_memory([0, 1, 2]), 2, "numa", memory="hbm")] == [
        ((2,), True), ((1,), False)]  # fmt: skip


def test_hbm_that_is_not_there_is_refused() -> None:
    with pytest.raises(LaunchError, match="--memory hbm does not fit: no NUMA node here"):
        bind(machine("two_sockets_ht.lscpu"), 2, "numa", memory="hbm")


def test_a_preference_is_told_from_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    topology = ["--dry-run", "--topology", str(GOLDEN / "two_sockets_hbm_flat.sysfs"), "--memory", "hbm"]
    for style in ("local", "torchrun"):
        assert main(["-n", "auto", "--style", style, *topology, "-m", "mod"]) == 0
        out = capsys.readouterr().out
        assert "memory of NUMA node 3 first" in out
        assert ("--prefer '2;3'" in out) == (style == "torchrun")
