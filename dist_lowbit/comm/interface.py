"""Which of this host's network interfaces leads to the other ranks."""

from __future__ import annotations

import fcntl
import socket
import struct

from dist_lowbit.core.rank import RankInfo

SIOCGIFADDR = 0x8915  # linux/sockios.h


def own_address(info: RankInfo) -> str:
    """Return this host's address on the way to rank 0: the interface that the peers can reach too."""
    with socket.create_connection((info.master_addr, info.master_port), timeout=5.0) as probe:
        return str(probe.getsockname()[0])


def interface_to(info: RankInfo) -> str | None:
    """Return the name of the interface with that address, or None where nothing listens or it is no IPv4 address."""
    try:
        address = own_address(info)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(query, SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
