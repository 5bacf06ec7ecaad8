"""The library as it is shipped, driven by kernels/cpu/tests: every buffer against a forbidden page.

`make sanitize` runs the same driver on kernels built with sanitizers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "kernels" / "cpu" / "tests").glob("*.cpp"))

pytestmark = pytest.mark.slow


@pytest.fixture
def driver(library: ctypes.CDLL, tmp_path: Path) -> Path:
    """The driver, linked to the library under test."""
    shared = Path(library._name).resolve()
    program = tmp_path / "guarded"
    command = ["c++", "-std=c++17", "-O1", *SOURCES, shared, f"-Wl,-rpath,{shared.parent}", "-o", program]
    subprocess.run(command, check=True, timeout=100)
    return program


def test_nothing_beyond_a_buffer_is_touched(driver: Path) -> None:
    done = subprocess.run([driver], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert " 0 failures, on scalar" in done.stdout


def test_runs_on_a_processor_without_avx(driver: Path) -> None:
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is not installed")
    command = [qemu, "-cpu", "qemu64", str(driver), "--brief"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(" 0 failures, on scalar")
