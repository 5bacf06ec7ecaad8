"""The emulated kernels: built by `make emulated` with SIMDe and a software AMX, run once in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build" / "emulated" / "libdist_lowbit_emulated.so"

Differences = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="session")
def differences() -> Differences:
    """What differs, by ISA and format; a skip where the emulated library is not built."""
    if not LIBRARY.is_file():
        pytest.skip("the emulated kernels are not built")
    environ = os.environ | {
        "DIST_LOWBIT_LIBRARY": str(LIBRARY),
        "DIST_LOWBIT_ISA": "auto",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, str(Path(__file__).with_name("compare.py"))]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found: Differences = json.loads(done.stdout)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report for report in terminalreporter.stats.get("passed", []) if "tests/emulation/" in report.nodeid]
    if passed:
        terminalreporter.line(
            f"{len(passed)} of these passed under emulation, in software and not on such a CPU: avx_vnni and"
            " avx512_vnni by SIMDe, amx by a software tile"
        )
