"""The machine as a value: packages, NUMA nodes, physical cores and their hyper-threads.

Everything here is pure but the three functions at the end, so a machine that is not at hand is a text file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import LaunchError


@dataclass(frozen=True)
class Core:
    """A physical core. `cpus` are its hyper-threads' CPU numbers, ascending; `efficient` marks an E-core."""

    package: int
    node: int
    cpus: tuple[int, ...]
    efficient: bool = False


@dataclass(frozen=True)
class Topology:
    """The cores that may be used, ordered by package, node and first CPU.

    quota: the cgroup's limit in CPUs. memories: NUMA nodes of memory without cores (HBM in flat mode, CXL), each with
    the node of cores that is nearest.
    """

    cores: tuple[Core, ...]
    quota: float | None = None
    memories: tuple[tuple[int, int], ...] = ()

    @property
    def packages(self) -> tuple[int, ...]:
        return tuple(sorted({c.package for c in self.cores}))

    @property
    def nodes(self) -> tuple[int, ...]:
        """NUMA nodes that have usable cores, in the order of the cores: those of one package are neighbours."""
        return tuple(dict.fromkeys(c.node for c in self.cores))

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    @property
    def usable(self) -> tuple[Core, ...]:
        """The cores worth giving to ranks: on a hybrid machine the P-cores, as ranks wait for the slowest."""
        fast = tuple(c for c in self.cores if not c.efficient)
        return fast or self.cores

    def restrict(self, allowed: Iterable[int]) -> Topology:
        """Return the part of the machine that consists of the CPUs in `allowed`."""
        keep = set(allowed)
        cores = [replace(c, cpus=tuple(cpu for cpu in c.cpus if cpu in keep)) for c in self.cores]
        return replace(self, cores=tuple(c for c in cores if c.cpus))

    def restrict_memory(self, allowed: Iterable[int]) -> Topology:
        """Return the same cores with the memory nodes in `allowed` only."""
        keep = set(allowed)
        return replace(self, memories=tuple(pair for pair in self.memories if pair[0] in keep))

    def describe(self) -> str:
        """Return one line for people."""
        parts = [
            _count(len(self.packages), "package"),
            _count(len(self.nodes), "NUMA node"),
            _count(len(self.cores), "physical core"),
            _count(len(self.cpus), "CPU"),
        ]
        efficient = sum(c.efficient for c in self.cores)
        if efficient:
            parts[2] += f" ({efficient} of them efficient)"
        if self.memories:
            parts.insert(2, _count(len(self.memories), "memory node") + " without cores")
        if self.quota is not None:
            parts.append(f"a quota of {self.quota:g} CPUs")
        return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def parse_cpulist(text: str) -> tuple[int, ...]:
    """Return the CPUs of a kernel list such as "0-3,8,10-14:2" (stride 2), ascending."""
    found: set[int] = set()
    for item in text.strip().split(","):
        if not item.strip():
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", item.strip())
        if match is None:
            raise LaunchError(f"{item.strip()!r} in the CPU list {text.strip()!r} is not of the form 0-3,8")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step == 0:
            raise LaunchError(f"{item.strip()!r} in the CPU list {text.strip()!r} is an empty range")
        found.update(range(first, last + 1, step))
    return tuple(sorted(found))


def format_cpulist(cpus: Iterable[int]) -> str:
    """Return the shortest kernel list of `cpus`: the inverse of parse_cpulist."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _ordered(cores: Iterable[Core]) -> tuple[Core, ...]:
    return tuple(sorted(cores, key=lambda c: (c.package, c.node, c.cpus[0])))


def from_lscpu(text: str) -> Topology:
    """Return the topology in the output of `lscpu -p=CPU,CORE,SOCKET,NODE` (more columns are fine).

    lscpu does not tell P-cores from E-cores; record sysfs for a hybrid machine.
    """
    columns = ["cpu", "core", "socket", "node"]
    rows: dict[tuple[int, int], list[int]] = {}
    nodes: dict[tuple[int, int], int] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            if line.lower().startswith("# cpu,"):
                columns = line[1:].strip().lower().split(",")
            continue
        if not line.strip():
            continue
        fields = dict(zip(columns, line.strip().split(","), strict=False))
        try:
            cpu, core = int(fields["cpu"]), int(fields["core"])
            package, node = int(fields.get("socket") or 0), int(fields.get("node") or 0)
        except (KeyError, ValueError):
            raise LaunchError(f"{line!r} is no line of `lscpu -p=CPU,CORE,SOCKET,NODE`") from None
        rows.setdefault((package, core), []).append(cpu)
        nodes[package, core] = node
    if not rows:
        raise LaunchError("the text holds no CPU; expected the output of `lscpu -p=CPU,CORE,SOCKET,NODE`")
    return Topology(_ordered(Core(k[0], nodes[k], tuple(sorted(cpus))) for k, cpus in rows.items()))


_PACKAGE = re.compile(r"devices/system/cpu/cpu(\d+)/topology/physical_package_id$")
_SIBLINGS = re.compile(r"devices/system/cpu/cpu(\d+)/topology/(?:core_cpus_list|thread_siblings_list)$")
_NODE = re.compile(r"devices/system/node/node(\d+)/cpulist$")
_DISTANCE = re.compile(r"devices/system/node/node(\d+)/distance$")


def from_sysfs(files: Mapping[str, str]) -> Topology:
    """Return the topology in `files`: path (with or without /sys/ in front) to content, as SYSFS_FILES lists them."""
    package_of: dict[int, int] = {}
    siblings_of: dict[int, tuple[int, ...]] = {}
    node_of: dict[int, int] = {}
    distance_of: dict[int, list[int]] = {}
    memory: tuple[int, ...] = ()
    slow: set[int] = set()
    online: set[int] | None = None
    for path, content in files.items():
        if match := _PACKAGE.search(path):
            package_of[int(match[1])] = max(0, int(content))  # firmware without an answer gives -1
        elif match := _SIBLINGS.search(path):
            siblings_of[int(match[1])] = parse_cpulist(content)
        elif match := _NODE.search(path):
            node_of.update(dict.fromkeys(parse_cpulist(content), int(match[1])))
        elif match := _DISTANCE.search(path):
            distance_of[int(match[1])] = [int(item) for item in content.split()]
        elif path.endswith("devices/system/node/has_memory"):
            memory = parse_cpulist(content)
        elif path.endswith("devices/cpu_atom/cpus"):
            slow.update(parse_cpulist(content))
        elif path.endswith("devices/system/cpu/online"):
            online = set(parse_cpulist(content))
    present = set(package_of) | set(siblings_of)
    present = present & online if online is not None and present else present or (online or set())
    if not present:
        raise LaunchError("the text holds no CPU; expected files of /sys/devices/system/cpu")
    cores: dict[int, Core] = {}
    for cpu in sorted(present):
        cpus = tuple(c for c in siblings_of.get(cpu, (cpu,)) if c in present) or (cpu,)
        cores[cpus[0]] = Core(package_of.get(cpu, 0), node_of.get(cpu, 0), cpus, cpus[0] in slow)
    return Topology(_ordered(cores.values()), memories=_memories(memory, set(node_of.values()), distance_of))


def _memories(
    memory: tuple[int, ...], with_cores: set[int], distance_of: Mapping[int, list[int]]
) -> tuple[tuple[int, int], ...]:
    """Return each node of `memory` without cores, with the nearest that has some (the lowest among equals)."""
    nodes = sorted({*distance_of, *with_cores})  # a row of distances has an entry for each node, in this order
    found = []
    for node in memory:
        row = dict(zip(nodes, distance_of.get(node, ()), strict=False))
        near = min((n for n in nodes if n in with_cores and n in row), key=lambda n: row[n], default=None)
        if node not in with_cores and near is not None:
            found.append((node, near))
    return tuple(found)


def from_text(text: str) -> Topology:
    """Return the topology recorded in `text`.

    Either `lscpu -p=CPU,CORE,SOCKET,NODE` or `grep -s . FILES` over SYSFS_FILES, which prints "path:content".
    """
    return from_sysfs(sysfs_files(text)) if text.lstrip().startswith("/sys/") else from_lscpu(text)


def sysfs_files(text: str) -> dict[str, str]:
    """Return the files in a text of lines "path:content"; paths of PCI devices hold colons themselves."""
    lines = (re.fullmatch(r"\s*(/sys/.*?/[a-z_]+):(.*)", line) for line in text.splitlines() if line.strip())
    return {match[1]: match[2].strip() for match in lines if match is not None}


def parse_cpu_max(text: str) -> float | None:
    """Return the limit in CPUs of a cgroup v2 `cpu.max` ("200000 100000" is 2.0), None for "max"."""
    quota, _, period = text.strip().partition(" ")
    if quota in ("", "max"):
        return None
    return int(quota) / int(period or 100_000)


SYSFS_FILES = (
    "devices/system/cpu/online",
    "devices/system/cpu/cpu[0-9]*/topology/physical_package_id",
    "devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list",
    "devices/system/node/node[0-9]*/cpulist",
    "devices/system/node/node[0-9]*/distance",
    "devices/system/node/has_memory",
    "devices/cpu_atom/cpus",
)


def read_sysfs(root: str = "/sys") -> dict[str, str]:
    """Read SYSFS_FILES below `root`; a file that is missing is left out."""
    base = Path(root)
    found: dict[str, str] = {}
    for pattern in SYSFS_FILES:
        for path in sorted(base.glob(pattern)):
            try:
                found[str(path.relative_to(base))] = path.read_text().strip()
            except OSError:  # an offline CPU has no topology
                continue
    return found


def parse_cfs(quota: str, period: str) -> float | None:
    """Return the limit in CPUs of a cgroup v1's two files (-1 is none)."""
    return None if int(quota) <= 0 else int(quota) / int(period)


def read_quota(cgroup: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """Return the tightest CPU quota of this process's cgroup (v2 or v1) and its ancestors, None without one."""
    try:
        lines = Path(cgroup).read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            quotas += _quotas(Path(root), own, lambda place: parse_cpu_max((place / "cpu.max").read_text()))
        elif "cpu" in controllers.split(","):
            quotas += _quotas(Path(root) / "cpu", own, _cfs)
    return min(quotas, default=None)


def _cfs(place: Path) -> float | None:
    return parse_cfs((place / "cpu.cfs_quota_us").read_text(), (place / "cpu.cfs_period_us").read_text())


def _quotas(root: Path, own: str, read: Callable[[Path], float | None]) -> list[float]:
    """Return the quotas of a group and its ancestors below `root`."""
    found = []
    folder = root / own.strip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            break
        try:
            quota = read(place)
        except (OSError, ValueError):  # the root group has no such file
            continue
        if quota is not None:
            found.append(quota)
    return found


def read_allowed_memory(status: str = "/proc/self/status") -> tuple[int, ...]:
    """Return the NUMA nodes that the cpuset lets this process allocate on."""
    lines = Path(status).read_text().splitlines()
    text = next((line for line in lines if line.startswith("Mems_allowed_list:")), ":")
    return parse_cpulist(text.partition(":")[2])


def read_machine() -> Topology:
    """Return the part of this machine that this process may use.

    The affinity mask already is within the cgroup's cpuset: the kernel sees to it. Where sysfs is hidden (some
    sandboxes) each CPU counts as a core of one node.
    """
    allowed = os.sched_getaffinity(0)
    try:
        whole = from_sysfs(read_sysfs())
    except LaunchError:
        whole = Topology(tuple(Core(0, 0, (cpu,)) for cpu in sorted(allowed)))
    known = whole.restrict(allowed)
    if not known.cores:
        known = Topology(tuple(Core(0, 0, (cpu,)) for cpu in sorted(allowed)))
    return replace(known, quota=read_quota()).restrict_memory(read_allowed_memory())
