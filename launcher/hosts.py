"""The hosts of a job as values: --hosts and --hostfile, and a number of ranks for each."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import LaunchError

# A name, an IPv4 address, or an IPv6 address in brackets where a number of ranks follows it.
_HOST = r"\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
_ENTRY = re.compile(rf"(?:{_HOST})(?::(?P<ranks>\d+))?")
# DeepSpeed and Open MPI write `host slots=2`; Hydra writes `host:2`, and may say more behind it (binding=...).
_SLOTS = re.compile(r"(?<![\w-])slots\s*=\s*(\S+)")
_OTHER = re.compile(r"[A-Za-z_-]+\s*=\s*\S+")

MOST_RANKS = 1024  # on one host; more is a slip of the finger


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it gets."""

    name: str
    ranks: int


def parse_hosts(text: str, each: int | None) -> tuple[Host, ...]:
    """Return the hosts of "a:2,b:2"; `each` is for entries without a number."""
    return _merge(_entry(item.strip(), each, f"--hosts {text}") for item in text.split(",") if item.strip())


def parse_hostfile(text: str, name: str, each: int | None) -> tuple[Host, ...]:
    """Return the hosts of a file in DeepSpeed's (`host slots=2`) or MPI's (`host:2`) manner; # begins a comment.

    A host that stands there several times gets the sum, as MPI counts it.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        entry, more = [*words.split(maxsplit=1), ""][:2]
        where = f"line {number} of {name}"
        slots = _SLOTS.findall(more)
        if _OTHER.sub("", more).strip() or len(slots) > 1 or not all(re.fullmatch("[0-9]+", text) for text in slots):
            raise LaunchError(f"{where} is {words!r}; expected host slots=2 or host:2")
        host = _entry(entry, int(slots[0]) if slots else each, where)
        if slots and host.ranks != int(slots[0]):
            raise LaunchError(f"{where} is {words!r}, which says both {host.ranks} ranks and {slots[0]}; keep one")
        found.append(host)
    return _merge(found)


def _entry(text: str, each: int | None, where: str) -> Host:
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise LaunchError(f"{text!r} in {where} is no host; expected a name, or name:2 for two ranks there")
    ranks = int(match["ranks"]) if match["ranks"] else each
    name = match["v6"] or match["name"]
    if ranks is None:
        raise LaunchError(f"{where} does not say how many ranks {name} gets; write {name}:2, or give -n")
    if not 1 <= ranks <= MOST_RANKS:
        raise LaunchError(f"{where} gives {name} {ranks} ranks; expected 1 to {MOST_RANKS}")
    return Host(name, ranks)


def _merge(hosts: Iterable[Host]) -> tuple[Host, ...]:
    ranks: dict[str, int] = {}
    for host in hosts:
        ranks[host.name] = ranks.get(host.name, 0) + host.ranks
    if not ranks:
        raise LaunchError("the list of hosts is empty; expected entries such as a:2,b:2")
    return tuple(Host(name, number) for name, number in ranks.items())


def own_names() -> frozenset[str]:
    """Return the names by which this host is itself."""
    return frozenset({"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()})


def master_of(hosts: tuple[Host, ...], own: frozenset[str]) -> str:
    """Return the address at which all hosts reach the first: loopback where all of them are this one."""
    if all(host.name in own for host in hosts):
        return "127.0.0.1"
    first = hosts[0].name
    # Not the full name: where the resolver knows no domain, that is "localhost".
    return socket.gethostname() if first in ("localhost", "127.0.0.1", "::1") else first
