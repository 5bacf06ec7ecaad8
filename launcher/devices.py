"""The GPUs of a machine as values: their order, their NUMA nodes, and which of them one rank sees.

Everything here is pure but `read_devices`, so a machine that is not at hand is a text file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import LaunchError

KINDS = ("cpu", "xpu", "cuda")
MASKS = {"xpu": "ZE_AFFINITY_MASK", "cuda": "CUDA_VISIBLE_DEVICES"}
_VENDORS = {"xpu": 0x8086, "cuda": 0x10DE}
_DISPLAY = 0x03  # the PCI class of display controllers, of which GPUs without an outlet are a subclass
_INTEGRATED = "0000:00:"  # bus 0 is on the processor itself

_PCI = re.compile(r"bus/pci/devices/([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])/(vendor|class|numa_node)$")

PCI_FILES = tuple(f"bus/pci/devices/*/{name}" for name in ("vendor", "class", "numa_node"))


@dataclass(frozen=True)
class Device:
    """A GPU. `index` is its number in the mask's variable; `node` its NUMA node, None where nobody says."""

    index: str
    address: str = ""
    node: int | None = None


def from_sysfs(kind: str, files: Mapping[str, str]) -> tuple[Device, ...]:
    """Return the GPUs of a kind in `files` (path below /sys to content), in the order of their PCI addresses.

    An integrated GPU counts only where there is no other: it is no partner for a discrete one.
    """
    facts: dict[str, dict[str, int]] = {}
    for path, content in files.items():
        if match := _PCI.search(path):
            facts.setdefault(match[1], {})[match[2]] = int(content, 0)
    fitting = sorted(a for a, f in facts.items() if f.get("vendor") == _VENDORS[kind] and _is_display(f))
    chosen = [address for address in fitting if not address.startswith(_INTEGRATED)] or fitting
    nodes = [facts[address].get("numa_node", -1) for address in chosen]
    return tuple(
        Device(str(index), address, node if node >= 0 else None)
        for index, (address, node) in enumerate(zip(chosen, nodes, strict=True))
    )


def _is_display(facts: Mapping[str, int]) -> bool:
    return facts.get("class", 0) >> 16 == _DISPLAY


def visible(kind: str, devices: tuple[Device, ...], environ: Mapping[str, str]) -> tuple[Device, ...]:
    """Return what a mask that is set already leaves of `devices`, in the mask's order."""
    mask = environ.get(MASKS[kind])
    if mask is None:
        return devices
    known = {device.index: device for device in devices}
    # "1.0" is a tile of GPU 1; a name such as GPU-8a56a4bc stands for itself.
    return tuple(
        Device(item, *_place(known.get(item.partition(".")[0]))) for item in map(str.strip, mask.split(",")) if item
    )


def _place(device: Device | None) -> tuple[str, int | None]:
    return ("", None) if device is None else (device.address, device.node)


def masks(kind: str, devices: tuple[Device, ...], ranks: int) -> list[dict[str, str]]:
    """Return for each rank the variables that show it one device and hide the others."""
    if ranks > len(devices):
        have = f"{len(devices)} {kind} device{'' if len(devices) == 1 else 's'}"
        raise LaunchError(f"-n {ranks} does not fit --device {kind}: {have} can be used here; lower -n")
    # The numbers are those of PCI order, which is not CUDA's own default.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if kind == "cuda" else {}
    return [{MASKS[kind]: device.index, **order} for device in devices[:ranks]]


def read_devices(kind: str, root: str = "/") -> tuple[Device, ...]:
    """Return this machine's GPUs of a kind, those of which the container has the device file."""
    base = Path(root) / "sys"
    given = _given_nvidia(Path(root)) if kind == "cuda" else _given_intel(Path(root))
    paths = [path for pattern in PCI_FILES for path in base.glob(pattern) if path.parent.name in given]
    return from_sysfs(kind, {str(path.relative_to(base)): path.read_text().strip() for path in paths})


def _given_nvidia(root: Path) -> set[str]:
    given = set()
    for path in root.glob("proc/driver/nvidia/gpus/*/information"):
        minor = re.search(r"Device Minor:\s*(\d+)", path.read_text())
        if minor is not None and os.path.exists(root / f"dev/nvidia{minor[1]}"):
            given.add(path.parent.name.lower())
    return given


def _given_intel(root: Path) -> set[str]:
    nodes = root.glob("sys/bus/pci/devices/*/drm/renderD*")
    return {path.parent.parent.name for path in nodes if os.path.exists(root / "dev/dri" / path.name)}
