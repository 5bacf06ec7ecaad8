"""From the options to the jobs of this host, as values: nothing is started, reserved or read here but the machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .binding import Slot, auto_ranks, bind, resolve
from .devices import Device, masks, read_devices, visible
from .devices import from_sysfs as devices_from_sysfs
from .errors import LaunchError
from .hosts import Host, master_of, own_names, parse_hostfile, parse_hosts
from .job import Place
from .options import number
from .runners.slurm import Allocation, allocation
from .topology import Topology, from_text, read_machine, sysfs_files

MOST = 1 << 31


@dataclass(frozen=True)
class Machine:
    """This host, or the one recorded in a file."""

    topology: Topology
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class Cast:
    """Who takes part: the ranks of each host, which host this is, and what each local rank gets."""

    counts: tuple[int, ...]
    node: int
    hosts: tuple[str, ...]
    master_addr: str
    slots: tuple[Slot, ...]
    masks: tuple[Mapping[str, str], ...]
    bind: str

    @property
    def local(self) -> int:
        return len(self.slots)

    def instances(self, number: int) -> list[Cast]:
        """Return the parts of this cast: as many casts of as many ranks each, one after the other."""
        each = self.local // number
        return [
            replace(self, counts=(each,), slots=self.slots[i : i + each], masks=self.masks[i : i + each])
            for i in range(0, self.local, each)
        ]


def read_host_list(options: argparse.Namespace) -> tuple[Host, ...]:
    """Return the hosts of --hosts or --hostfile, none without them."""
    if options.hosts is None and options.hostfile is None:
        return ()
    given = [name for name in ("hosts", "hostfile", "nnodes", "node_rank", "instances") if getattr(options, name)]
    if len(given) > 1:
        first, second = (name.replace("_", "-") for name in given[:2])
        raise LaunchError(f"--{first} and --{second} exclude each other")
    if options.ranks == "auto":
        raise LaunchError("-n auto is for one host, or --nnodes of one kind; --hosts and --hostfile say it: a:2,b:2")
    each = None if options.ranks is None else number("-n", options.ranks, 1, MOST)
    if options.hosts is not None:
        return parse_hosts(options.hosts, each)
    try:
        text = Path(options.hostfile).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {options.hostfile} cannot be read: {error}") from None
    return parse_hostfile(text, options.hostfile, each)


def read_this_machine(options: argparse.Namespace, environ: Mapping[str, str]) -> Machine:
    """Return what this host has, of GPUs those of --device."""
    text = _recorded(options)
    topology = read_machine() if text is None else from_text(text)
    if options.device == "cpu":
        return Machine(topology)
    found = read_devices(options.device) if text is None else devices_from_sysfs(options.device, sysfs_files(text))
    return Machine(topology, visible(options.device, found, environ))


def _recorded(options: argparse.Namespace) -> str | None:
    if options.topology is None:
        return None
    if not options.dry_run:
        raise LaunchError("--topology describes another machine, so it needs --dry-run")
    try:
        return Path(options.topology).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--topology {options.topology} cannot be read: {error}") from None


def make_cast(options: argparse.Namespace, machine: Machine, hosts: Sequence[Host], environ: Mapping[str, str]) -> Cast:
    """Return who takes part; LaunchError for what does not fit."""
    given = allocation(environ) if options.style == "slurm" else None
    counts, node = _counts(options, machine, hosts, given)
    groups = 1 if options.instances is None else number("--instances", options.instances, 1, MOST)
    if groups > 1 and (options.style != "local" or len(counts) > 1):
        raise LaunchError("--instances goes with one host and the style local")
    # One that starts all hosts from here takes them all to be like this one; the largest number fits all.
    local = (max(counts) if hosts else counts[node]) * groups
    try:
        slots, shown = place(options, machine, local)
    except LaunchError as error:
        raise (LaunchError(f"--instances {groups} makes {local} ranks: {error}") if groups > 1 else error) from None
    names = tuple(host.name for host in hosts)
    master = options.master_addr or (given.nodes[0] if given else master_of(tuple(hosts), own_names()) if hosts else "")
    if not master and len(counts) > 1:
        raise LaunchError("--nnodes needs --master-addr and --master-port: an address of host 0, the same on all hosts")
    mode = resolve(machine.topology, local, options.bind)
    return Cast(counts, node, names, master or "127.0.0.1", slots, shown, mode)


def place(
    options: argparse.Namespace, machine: Machine, ranks: int
) -> tuple[tuple[Slot, ...], tuple[Mapping[str, str], ...]]:
    """Return the slot of each rank of this host, and the variables that show it its GPU."""
    shown: list[dict[str, str]] = [{}] * ranks
    near: list[int | None] = []
    if options.device != "cpu":
        shown = masks(options.device, machine.devices, ranks)
        near = [device.node for device in machine.devices[:ranks]]
    slots = bind(
        machine.topology,
        ranks,
        options.bind,
        hyper_threads=options.hyper_threads,
        memory=options.memory,
        near=near,
    )
    return slots, tuple([{}] * ranks if options.no_mask else shown)


def _counts(
    options: argparse.Namespace, machine: Machine, hosts: Sequence[Host], given: Allocation | None
) -> tuple[tuple[int, ...], int]:
    """Return the ranks of each host, and which of them this is."""
    if hosts:
        return tuple(host.ranks for host in hosts), 0
    if options.ranks is None:
        raise LaunchError("the following arguments are required: -n (or --hosts, or --hostfile)")
    nnodes = len(given.nodes) if given else 1
    if options.nnodes is not None:
        nnodes = number("--nnodes", options.nnodes, 1, nnodes if given else 1 << 16)
    if options.node_rank is None and nnodes > 1 and not given:
        raise LaunchError("--nnodes needs --node-rank: which of the hosts this is, from 0")
    node = 0 if options.node_rank is None else number("--node-rank", options.node_rank, 0, nnodes - 1)
    if options.ranks == "auto":
        return (_auto(options, machine),) * nnodes, node
    each = [number("-n", item, -MOST, MOST) for item in options.ranks.split(",")]
    if len(each) not in (1, nnodes):
        raise LaunchError(f"-n {options.ranks} names {len(each)} hosts, but --nnodes says {nnodes}")
    counts = tuple(each * nnodes) if len(each) == 1 else tuple(each)
    if len(counts) > 1 and min(counts) < 1:
        raise LaunchError(f"-n {options.ranks} does not fit: a host has at least 1 rank")
    return counts, node


def _auto(options: argparse.Namespace, machine: Machine) -> int:
    if options.device == "cpu":
        groups = 1 if options.instances is None else number("--instances", options.instances, 1, MOST)
        return max(1, auto_ranks(machine.topology) // groups)
    if not machine.devices:
        raise LaunchError(f"-n auto finds no {options.device} device here")
    return len(machine.devices)


def place_of(cast: Cast, host: str, port: int, launch_id: str, user_env: Mapping[str, str], stdin: bool) -> Place:
    """Return where the ranks of a cast meet."""
    return Place(host, port, launch_id, cast.master_addr, user_env, cast.counts, cast.node, cast.hosts, stdin)
