"""The emulated kernels: built by `make emulated` with SIMDe and a software AMX, run in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated_process import LIBRARY


@pytest.fixture(scope="session")
def emulated() -> Path:
    """The emulated library; a skip where it is not built."""
    if not LIBRARY.is_file():
        pytest.skip("the emulated kernels are not built")
    return LIBRARY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report for report in terminalreporter.stats.get("passed", []) if "tests/emulation/" in report.nodeid]
    if passed:
        terminalreporter.line(
            f"{len(passed)} of these passed under emulation, in software and not on such a CPU: avx_vnni and"
            " avx512_vnni by SIMDe, amx by a software tile"
        )
