"""What a backend of collectives needs before its ranks start: variables, and a step of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping

BACKEND = "DIST_LOWBIT_BACKEND"

# Without a process manager that oneCCL knows, ranks meet by the address that they are given, over libfabric. Each value
# holds only where the user has set none; CCL_LOCAL_RANK and _SIZE are set by the backend itself, in every style.
_DEFAULTS = {"ccl": {"CCL_PROCESS_LAUNCHER": "none", "CCL_ATL_TRANSPORT": "ofi", "FI_PROVIDER": "tcp"}}
_MANAGED = ("mpirun",)  # styles whose ranks have such a manager: oneCCL's own choice is faster there

# What must be there before N ranks want it at once: the shim for oneCCL is compiled on the user's machine.
_PREPARE = {"ccl": ("-m", "dist_lowbit.kernels.ccl")}


def backend_defaults(environ: Mapping[str, str], style: str = "local") -> dict[str, str]:
    """Return the variables that the backend named in `environ` wants where they are unset."""
    if style in _MANAGED:
        return {}
    return dict(_DEFAULTS.get(environ.get(BACKEND, ""), {}))


def prepare_command(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the command to run once before the ranks of this backend start, None where there is none."""
    words = _PREPARE.get(environ.get(BACKEND, ""))
    return None if words is None else (sys.executable, *words)
