"""A port for the rendezvous that stays ours until rank 0 listens on it."""

from __future__ import annotations

import socket

from .errors import LaunchError


class Port:
    """A reserved TCP port. Keep it open while the job runs, then `close()` it.

    The socket is bound without SO_REUSEADDR, so the number is nobody's, and gets SO_REUSEADDR after that without
    ever listening. From then on the kernel gives the number to nobody who asks for any port, or for this one
    exclusively; only a socket with SO_REUSEADDR may join it, as rank 0's listener has (socket(7), Linux).
    """

    def __init__(self, wanted: int | None = None) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.bind(("", wanted or 0))
        except OSError as error:
            if wanted is None or _listening(wanted):
                self._socket.close()
                raise LaunchError(f"--master-port {wanted} cannot be used: {error.strerror}") from None
            # Only connections of an earlier job linger there (TIME_WAIT): rank 0 can listen, as it reuses.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.number: int = wanted or self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def _listening(port: int) -> bool:
    """Return whether a listener like rank 0's could not be had on `port`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return True
    return False
